"""A grammar's state is told by the tokens alone, whatever is kept and whoever computes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits
from tokenizers import Tokenizer

from common.engine import grammar
from common.engine.grammar import Grammars
from common.engine.sampler import sample
from common.engine.work import Work
from kvbaton.errors import InvalidRequestError
from kvbaton.sampling import SamplingParams

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
EOS = 1
VOCAB = 2048
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
LETTERS = LLMatcher.grammar_from_regex("[ab]{2,4}")


@pytest.fixture
def grammars() -> Grammars:
    return Grammars(DEMO, (EOS,))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def work_of(output: list[int], rules: str = PERSON, **params: object) -> Work:
    tokens = [7, *output]
    sampling = SamplingParams(grammar=rules, **params)  # type: ignore[arg-type]
    return Work(tokens, 1, len(tokens) - 1, 1, [0], sampling)


def allowed(grammars: Grammars, output: list[int], rules: str = PERSON) -> list[int]:
    mask = grammars.allowed(work_of(output, rules), VOCAB)
    assert mask is not None
    return np.flatnonzero(mask).tolist()


def test_what_is_kept_changes_nothing(grammars: Grammars, tokenizer: Any) -> None:
    text = ids_of(tokenizer, '{"name":"x","age":17}')
    for end in range(len(text) + 1):
        fresh = Grammars(DEMO, (EOS,))
        assert allowed(grammars, text[:end]) == allowed(fresh, text[:end])
        assert allowed(grammars, text[:end]) == allowed(grammars, text[:end])
    assert allowed(grammars, text[:3]) == allowed(Grammars(DEMO, (EOS,)), text[:3])


def test_sequences_of_one_grammar_do_not_share_a_state(grammars: Grammars, tokenizer: Any) -> None:
    rng = random.Random(3)
    letters = ids_of(tokenizer, "a") + ids_of(tokenizer, "b")
    outputs: list[list[int]] = [[] for _ in range(6)]
    for _ in range(4):
        for output in outputs:
            assert allowed(grammars, output, LETTERS) == allowed(
                Grammars(DEMO, (EOS,)), output, LETTERS
            )
            output.append(rng.choice(letters))


def test_little_is_kept(
    grammars: Grammars, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_MAX_STATES", 3)
    monkeypatch.setattr(grammar, "_MAX_COMPILED", 2)
    for letter in "abcdef":
        allowed(grammars, [], LLMatcher.grammar_from_regex(letter))
        allowed(grammars, ids_of(tokenizer, letter), LLMatcher.grammar_from_regex(letter))
    assert len(grammars._states) == 3
    assert len(grammars._compiled) == 2


def test_a_sentence_that_cannot_go_on_is_followed_by_its_end(
    grammars: Grammars, tokenizer: Any
) -> None:
    assert allowed(grammars, ids_of(tokenizer, '{"name":"x","age":17}')) == [EOS]
    assert EOS not in allowed(grammars, ids_of(tokenizer, "a"), LETTERS)
    assert EOS in allowed(grammars, ids_of(tokenizer, "a") * 3, LETTERS)
    assert allowed(grammars, ids_of(tokenizer, "a") * 4, LETTERS) == [EOS]


def test_after_an_end_that_is_ignored_anything_may_come(grammars: Grammars, tokenizer: Any) -> None:
    output = [*ids_of(tokenizer, "a") * 4, EOS]
    for rest in ([], [9], [9, 10]):
        assert grammars.allowed(work_of(output + rest, LETTERS), VOCAB) is None


def test_ids_beyond_the_tokenizers_are_forbidden(grammars: Grammars) -> None:
    mask = grammars.allowed(work_of([]), VOCAB + 500)
    assert mask is not None
    assert len(mask) == VOCAB + 500
    assert not mask[VOCAB:].any()
    assert mask[:VOCAB].any()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_early_ends_give_way_to_the_grammar(
    grammars: Grammars, tokenizer: Any, temperature: float
) -> None:
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, EOS] = 90
    for length, expected in ((2, False), (4, True)):
        work = work_of(
            ids_of(tokenizer, "a") * length, LETTERS, temperature=temperature, min_tokens=9, seed=1
        )
        (result,) = sample(logits, [work], (EOS,), grammars)
        assert result is not None
        assert (result.token_id == EOS) is expected


@pytest.mark.parametrize(
    ("rules", "output", "message"),
    [
        ("start: foo", [], "not valid"),
        ('{"grammars":[{"json_schema":{"type":"nope"}}]}', [], "not valid"),
        (LETTERS, [9], "not the beginning"),
    ],
)
def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(
    grammars: Grammars, rules: str, output: list[int], message: str
) -> None:
    logits = np.zeros((2, VOCAB), dtype=np.float32)
    bad = work_of(output, rules, temperature=0)
    good = work_of([], LETTERS, temperature=0)
    results = sample(logits, [bad, good], (EOS,), grammars)
    assert results[0] is None
    assert results[1] is not None
    assert isinstance(bad.error, InvalidRequestError)
    assert message in bad.error.message
    assert bad.error.field == "grammar"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (LLParserLimits(max_grammar_size=3), "larger than"),
        (LLParserLimits(max_lexer_states=3), "more than this server's limits"),
    ],
)
def test_limits_hold_when_it_is_compiled_and_in_each_step(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, limits: LLParserLimits, message: str
) -> None:
    monkeypatch.setattr(grammar, "LIMITS", limits)
    rules = LLMatcher.grammar_from_lark("start: (a | b)*\na: /.*a.{12}x/\nb: /b+/")
    with pytest.raises(InvalidRequestError, match=message):
        allowed(grammars, [], rules)


def test_the_message_repeats_nothing_of_the_grammar(grammars: Grammars) -> None:
    secret = json.dumps({"grammars": [{"json_schema": {"type": "my-secret"}}]})
    with pytest.raises(InvalidRequestError) as caught:
        allowed(grammars, [], secret)
    assert "secret" not in caught.value.message


def test_a_model_without_tokenizer_or_end_follows_none(tmp_path: Path) -> None:
    for folder, eos, message in ((tmp_path, (EOS,), "tokenizer.json"), (DEMO, (), "end-of-seq")):
        with pytest.raises(InvalidRequestError, match=message):
            allowed(Grammars(folder, eos), [])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRequestError, match=r"tokenizer\.json"):
        allowed(Grammars(tmp_path, (EOS,)), [])
