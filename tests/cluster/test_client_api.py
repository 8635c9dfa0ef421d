"""The msgpack API before real workers: scores, choices and forms are the model's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from kvbaton import Client
from tests.cluster.processes import running

PROMPT = "def add(a, b):\n    return a"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("cluster")
    with running(folder, worker={"batch_invariant": True}) as cluster, cluster.client() as client:
        yield client


def test_an_output_scores_as_it_was_drawn(client: Client) -> None:
    drawn = client.generate(PROMPT, max_tokens=12, temperature=0, logprobs=0, ignore_eos=True)
    tokens = list(drawn)
    prompt = client.tokenize(PROMPT).token_ids
    whole, bare = client.score(
        token_ids=[[*prompt, *(token.token_id for token in tokens)], prompt], top_logprobs=1
    )
    scored = whole.tokens[len(prompt) :]
    assert [token.logprob for token in scored] == pytest.approx(
        [token.logprob for token in tokens], abs=1e-4
    )
    assert all(token.top_logprobs[0][0] == token.token_id for token in scored), "greedy"
    assert [token.logprob for token in whole.tokens[1 : len(prompt)]] == pytest.approx(
        [token.logprob for token in bare.tokens[1:]], abs=1e-4
    )
    assert "".join(token.text for token in bare.tokens) == PROMPT


def test_choices_are_those_of_requests_of_their_own(client: Client) -> None:
    stream = client.generate(PROMPT, n=3, max_tokens=8, seed=11, logprobs=0).finish()
    again = client.generate(PROMPT, n=3, max_tokens=8, seed=11).finish()
    texts = [choice.text for choice in stream.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1
    assert client.generate(PROMPT, max_tokens=8, seed=11).finish().text == texts[0]
    best = client.generate(PROMPT, n=1, best_of=3, max_tokens=8, seed=11).finish()
    assert best.text in texts


def test_echo_and_prompt_logprobs_agree_with_scores(client: Client) -> None:
    (score,) = client.score([PROMPT])
    stream = client.generate(PROMPT, echo=True, logprobs=0, max_tokens=1).finish()
    assert stream.text.startswith(PROMPT)
    assert [token.logprob for token in stream.prompt[1:]] == pytest.approx(
        [token.logprob for token in score.tokens[1:]], abs=1e-4
    )


def test_structured_output_is_what_was_asked_for(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    stream = client.generate("answer: ", response_format=form, max_tokens=64, n=2, seed=3).finish()
    for choice in stream.choices:
        assert choice.finish_reason == "stop"
        assert 0 <= json.loads(choice.text)["n"] <= 99
    word = client.generate("x", structured_outputs={"regex": "[a-c]{3,5}"}, max_tokens=16).finish()
    assert re.fullmatch("[a-c]{3,5}", word.text)


def test_masks_and_biases_hold(client: Client) -> None:
    allowed = client.tokenize(" a b c", add_special_tokens=False).token_ids
    only = client.generate(PROMPT, max_tokens=6, allowed_token_ids=allowed, ignore_eos=True)
    assert {token.token_id for token in only} <= set(allowed)
    forced = client.generate(PROMPT, max_tokens=3, logit_bias={allowed[0]: 100}, temperature=0)
    assert {token.token_id for token in forced} == {allowed[0]}


def test_a_request_explains_itself(client: Client) -> None:
    stream = client.generate(PROMPT, max_tokens=2, explain=True, ignore_eos=True).finish()
    assert stream.explanation is not None
    assert stream.explanation.num_output_tokens == 2
    assert {stage.name for stage in stream.explanation.stages} >= {"tokenize", "decode"}


def test_a_cluster_tells_of_itself_to_who_may_know(client: Client) -> None:
    (model,) = client.models()
    assert (model.id, model.vocab_size) == ("demo", 2048)
    assert model.max_model_len is not None
