"""Every sampling field gives the same bits wherever its tokens are drawn.

The real engine, in batch-invariant mode, on a tiny model, in the simulated cluster: the handoff
moves or shares the KV, blocks run out, workers die, another gateway goes on. tests/cluster has the
same of real processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from common.engine.runner import TorchEngine
from common.engine.work import Engine, Sampled, Work
from common.grammar import load_tokenizer
from common.worker.config import WorkerConfig
from kvbaton.errors import InvalidRequestError
from kvbaton.sampling import SamplingParams
from scripts.make_model import make_model
from scripts.model_files import EOS_ID
from services.decode.worker import DecodeRole
from services.gateway.backend import GenerationRequest, PromptToken
from tests.sim.cluster import Shape, SimCluster, simulate
from tests.sim.world import World

VOCAB = 512
NUM_TOKENS = 24
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 12}, "b": {"enum": ["x", "yes", 12]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
JSON = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
LETTERS = LLMatcher.grammar_from_regex("([a-e]{2}-){3,9}")
FEW = list(range(40, 60))
PAIRS = [[first, second] for first in FEW for second in FEW[first % 3 :: 3]]
FEATURES: dict[str, dict[str, Any]] = {
    "filters": {"top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {
        "presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.2,
    },
    "greedy": {"temperature": 0.0},
    "ends": {"min_tokens": 9, "stop_token_ids": list(range(100, 300))},
    "logit_bias": {"logit_bias": {7: 6.0, 8: 5.5, 9: -100.0, 11: 6.0}},
    "allowed_token_ids": {"allowed_token_ids": FEW},
    "bad_words": {"allowed_token_ids": FEW, "bad_words": PAIRS[:200]},
    "json": {"grammar": JSON},
    "regex": {"grammar": LETTERS, "temperature": 1.3, "min_tokens": 12},
    "regex_greedy": {"grammar": LETTERS, "temperature": 0.0, "logit_bias": {68: 4.0}},
    "beyond_the_sentence": {"grammar": LLMatcher.grammar_from_regex("no"), "ignore_eos": True},
    "prompt_logprobs": {"prompt_logprobs": 3},
    "all": {
        "prompt_logprobs": 0, "grammar": JSON, "logit_bias": {68: 3.0}, "bad_words": [[68, 68]],
        "repetition_penalty": 1.1, "top_p": 0.95,
    },
}  # fmt: skip
# Blocks of this model are four of the mock engine's.
SHAPES = {
    "colocated": Shape(num_prefill=0, num_decode=1, num_blocks=1024, mode="colocated"),
    "shm": Shape(num_prefill=2, num_decode=2, num_blocks=1024),
    "zmq": Shape(num_prefill=1, num_decode=1, num_blocks=1024, mover="zmq"),
    "short_of_blocks": Shape(num_decode=1, num_blocks=88, worker={"max_num_seqs": 16}),
    "short_colocated": Shape(num_prefill=0, num_blocks=88, mode="colocated"),
    "killed": Shape(num_prefill=1, num_decode=2, num_blocks=1024),
    "resumed": Shape(num_gateways=2, num_blocks=1024),
}

Output = tuple[list[tuple[int, float, tuple[tuple[int, float], ...]]], str, list[PromptToken]]


class SimEngine(TorchEngine):
    """Computes on the simulation's one thread, in no time but what it pretends to take."""

    async def prepare(self, sampling: SamplingParams) -> None:
        if sampling.grammar:
            await asyncio.sleep(0.02)
            self._grammars.prepare(sampling.grammar)

    async def step(self, works: Many[Work]) -> list[Sampled | None]:
        await asyncio.sleep(0.005)
        return self.step_sync(works)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return make_model(folder, family="qwen3", vocab=VOCAB, head_dim=32, seed=3)


def shape_of(name: str, model: Path) -> Shape:
    def engine(_config: WorkerConfig) -> Engine:
        return SimEngine(model, dtype="float32", batch_invariant=True)

    shape = SHAPES[name]
    shape.engine = engine
    shape.worker |= {"max_num_batched_tokens": 48}
    return shape


def request_of(feature: str, index: int, resumed: tuple[int, ...] = ()) -> GenerationRequest:
    """Prompts of different lengths that begin alike."""
    prompt = [5 + place * 7 % 400 for place in range(20 + index * 9)]
    options = {"temperature": 0.9, "seed": index, "logprobs": 2, "max_tokens": NUM_TOKENS}
    sampling = SamplingParams(**options | FEATURES[feature])
    return GenerationRequest(f"{index:032x}", prompt, sampling, index % 3, resumed=resumed)


async def ask(cluster: SimCluster, request: GenerationRequest) -> Output:
    stream = cluster.give(cluster.world.random.choice(cluster.gateways), request)
    tokens = []
    while True:
        event = await anext(stream)
        tokens.append((event.token_id, event.logprob, event.top_logprobs))
        if event.finish_reason is not None:
            return tokens, event.finish_reason, stream.prompt_logprobs


async def ask_all(cluster: SimCluster) -> dict[str, Output]:
    outputs = await asyncio.gather(
        *(ask(cluster, request_of(feature, index)) for index, feature in enumerate(FEATURES))
    )
    return dict(zip(FEATURES, outputs, strict=True))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, Output]:
    async def main() -> dict[str, Output]:
        async with SimCluster(World(1), shape_of("colocated", model)) as cluster:
            outputs = await ask_all(cluster)
            assert outputs == await ask_all(cluster)  # what is cached changes nothing
            return outputs

    return simulate(main())


@pytest.mark.parametrize("name", ["shm", "zmq"])
def test_over_the_handoff(name: str, model: Path, expected: dict[str, Output]) -> None:
    async def main() -> None:
        async with SimCluster(World(2), shape_of(name, model)) as cluster:
            assert await ask_all(cluster) == expected
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("name", ["short_of_blocks", "short_colocated"])
def test_when_sequences_give_way(name: str, model: Path, expected: dict[str, Output]) -> None:
    async def main() -> None:
        async with SimCluster(World(3), shape_of(name, model)) as cluster:
            assert await ask_all(cluster) == expected
            decodes = cluster.of_role(DecodeRole)
            assert sum(each.counts().num_preemptions for each in decodes) > 0
            await cluster.settle()

    simulate(main())


@pytest.mark.parametrize("name", ["shm", "colocated"])
def test_a_request_that_cannot_go_on_fails_alone(
    name: str, model: Path, expected: dict[str, Output]
) -> None:
    hopeless: list[tuple[dict[str, Any], str | None, str]] = [
        ({"allowed_token_ids": [50], "bad_words": [[50]]}, None, "leave none"),
        ({"allowed_token_ids": [50, 51], "bad_words": [[50, 51], [50, 50]]}, None, "leave none"),
        ({"grammar": "start: foo"}, "grammar", "grammar: it is not valid"),
    ]

    async def fail(
        cluster: SimCluster, options: dict[str, Any], field: str | None, message: str
    ) -> None:
        sampling = SamplingParams(seed=3, logit_bias={50: 100.0}, **options)
        request = GenerationRequest("f" * 32, [9] * 70, sampling)
        with pytest.raises(InvalidRequestError, match=message) as caught:
            await ask(cluster, request)
        assert caught.value.field == field

    async def main() -> None:
        async with SimCluster(World(6), shape_of(name, model)) as cluster:
            asking = asyncio.ensure_future(ask_all(cluster))
            await asyncio.gather(*(fail(cluster, *each) for each in hopeless))
            assert await asking == expected
            await cluster.settle()

    simulate(main())


def test_when_a_worker_dies(model: Path, expected: dict[str, Output]) -> None:
    async def main() -> None:
        async with SimCluster(World(4), shape_of("killed", model)) as cluster:
            asking = asyncio.ensure_future(ask_all(cluster))
            await asyncio.sleep(0.12)
            victim = cluster.of_role(DecodeRole)[0]
            assert any(sequence.num_outputs for sequence in victim.role.sequences())
            await cluster.kill(victim)
            assert await asking == expected
            await cluster.settle()

    simulate(main())


def test_when_another_gateway_goes_on(model: Path, expected: dict[str, Output]) -> None:
    async def main() -> None:
        async with SimCluster(World(5), shape_of("resumed", model)) as cluster:
            for index, (feature, (tokens, reason, prompt)) in enumerate(expected.items()):
                cut = len(tokens) // 2
                had = tuple(token for token, _, _ in tokens[:cut])
                rest = await ask(cluster, request_of(feature, index, had))
                assert rest == (tokens[cut:], reason, prompt), feature
            await cluster.settle()

    simulate(main())


def test_what_is_expected_is_what_the_fields_mean(model: Path, expected: dict[str, Output]) -> None:
    drawn = {name: [token for token, _, _ in output[0]] for name, output in expected.items()}
    assert len({tuple(tokens) for tokens in drawn.values()}) == len(FEATURES)
    assert len(drawn["ends"]) >= 10
    assert set(drawn["allowed_token_ids"]) <= set(FEW)
    pairs = set(zip(drawn["bad_words"], drawn["bad_words"][1:], strict=False))
    assert not pairs & {(first, second) for first, second in PAIRS[:200]}
    assert pairs <= {(first, second) for first in FEW for second in FEW}
    tokenizer = load_tokenizer(model, (EOS_ID,))
    for name in ("json", "all", "regex", "regex_greedy"):
        text = [token for token in drawn[name] if token != EOS_ID]
        matcher = LLMatcher(tokenizer, FEATURES[name]["grammar"])
        assert matcher.validate_tokens(text) == len(text) > 0
        assert expected[name][1] == ("length" if text == drawn[name] else "stop")
    beyond = drawn["beyond_the_sentence"]
    assert tokenizer.decode_str(beyond).startswith("no<|eos|>")
    assert (len(beyond), expected["beyond_the_sentence"][1]) == (NUM_TOKENS, "length")


def test_prompts_are_scored_as_asked(expected: dict[str, Output]) -> None:
    """tests/cluster holds the numbers against those of transformers."""
    for index, feature in enumerate(FEATURES):
        request, scored = request_of(feature, index), expected[feature][2]
        count = request.sampling.prompt_logprobs
        assert [each.token_id for each in scored] == ([] if count is None else request.prompt[1:])
        assert {len(each.top_logprobs) for each in scored} <= {count}
