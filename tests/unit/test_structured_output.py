"""Structured output of the demo model: what it finishes is valid, what is cut is a beginning."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from common.engine.runner import TorchEngine
from common.grammar import LIMITS, load_tokenizer
from common.worker.sequence import Sequence
from kvbaton.sampling import SamplingParams
from tests.unit.sequences import sequence_of
from tests.unit.structured_samples import json_schema, regex

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
PROMPT = "def main():\n    return "
MAX_TOKENS = 240
AT_ONCE = 32
BLOCKS_EACH = 18
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
COMPACT: Any = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    engine = TorchEngine(DEMO)
    size = AT_ONCE * BLOCKS_EACH * engine.info.layout.block_bytes
    engine.attach(memoryview(bytearray(size)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer(engine: TorchEngine) -> Any:
    return load_tokenizer(DEMO, engine.info.eos_token_ids)


def run(
    engine: TorchEngine, prompt: list[int], grammars: list[str], max_tokens: int
) -> list[tuple[list[int], str]]:
    """The output for each grammar, sampled, and why it ended; several sequences share a step."""
    sequences = [
        sequence_of(
            tokens=list(prompt),
            num_prompt_tokens=len(prompt),
            sampling=SamplingParams(grammar=rules, seed=seed, max_tokens=max_tokens),
            block_size=engine.info.layout.block_size,
        )
        for seed, rules in enumerate(grammars)
    ]
    ends: dict[Sequence, str] = {}
    for first in range(0, len(sequences), AT_ONCE):
        running = sequences[first : first + AT_ONCE]
        for place, sequence in enumerate(running):
            sequence.slots = list(range(place * BLOCKS_EACH, (place + 1) * BLOCKS_EACH))
        while running:
            step(engine, running)
            ends |= {each: end for each in running if (end := each.finish_reason(engine.info))}
            running = [each for each in running if each not in ends]
    return [(each.tokens[len(prompt) :], ends[each]) for each in sequences]


def step(engine: TorchEngine, running: list[Sequence]) -> None:
    works = [sequence.work(sequence.num_uncomputed) for sequence in running]
    for sequence, work, sampled in zip(running, works, engine.step_sync(works), strict=True):
        assert sampled is not None, work.error
        sequence.computed(work)
        sequence.tokens.append(sampled.token_id)


def check(
    engine: TorchEngine, tokenizer: Any, grammars: list[str], max_tokens: int
) -> Iterable[str | None]:
    """The texts of what is finished; None for what was cut, which can be gone on from."""
    for rules, (output, end) in zip(
        grammars, run(engine, tokenizer.tokenize_str(PROMPT), grammars, max_tokens), strict=True
    ):
        matcher = LLMatcher(tokenizer, rules, limits=LIMITS)
        if end == "stop":
            assert output[-1] in engine.info.eos_token_ids
            assert matcher.consume_tokens(output[:-1])
            assert matcher.is_accepting()
            yield tokenizer.decode_bytes(output[:-1]).decode()
        else:
            assert (end, len(output)) == ("length", max_tokens)
            assert matcher.validate_tokens(output) == max_tokens
            yield None


def check_schemas(engine: TorchEngine, tokenizer: Any, count: int, max_tokens: int) -> int:
    """Returns how many were finished; each of those is valid and compact."""
    schemas = [json_schema(random.Random(seed)) for seed in range(count)]
    grammars = [LLMatcher.grammar_from_json_schema(each, overrides=COMPACT) for each in schemas]
    num_finished = 0
    texts = check(engine, tokenizer, grammars, max_tokens)
    for schema, text in zip(schemas, texts, strict=True):
        if text is not None:
            jsonschema.validate(json.loads(text), schema)
            assert not re.search(r"\s", _STRING.sub("", text))
            num_finished += 1
    return num_finished


def check_regexes(engine: TorchEngine, tokenizer: Any, count: int, max_tokens: int) -> int:
    """Returns how many were finished; each of those matches."""
    patterns = [regex(random.Random(seed)) for seed in range(count)]
    grammars = [LLMatcher.grammar_from_regex(each) for each in patterns]
    num_finished = 0
    texts = check(engine, tokenizer, grammars, max_tokens)
    for pattern, text in zip(patterns, texts, strict=True):
        if text is not None:
            assert re.fullmatch(pattern, text), pattern
            num_finished += 1
    return num_finished


def test_some_schemas_and_regexes_are_finished(engine: TorchEngine, tokenizer: Any) -> None:
    assert check_schemas(engine, tokenizer, 24, MAX_TOKENS) >= 0.95 * 24
    assert check_regexes(engine, tokenizer, 8, MAX_TOKENS) >= 0.95 * 8


def test_what_is_cut_is_a_beginning_and_says_length(engine: TorchEngine, tokenizer: Any) -> None:
    assert check_schemas(engine, tokenizer, 16, 3) < 16
    assert check_regexes(engine, tokenizer, 8, 1) < 8


@pytest.mark.long
def test_200_schemas_and_50_regexes_are_finished(engine: TorchEngine, tokenizer: Any) -> None:
    assert check_schemas(engine, tokenizer, 200, MAX_TOKENS) >= 0.95 * 200
    assert check_regexes(engine, tokenizer, 50, MAX_TOKENS) >= 0.95 * 50
    check_schemas(engine, tokenizer, 200, 10)
    check_regexes(engine, tokenizer, 50, 4)
