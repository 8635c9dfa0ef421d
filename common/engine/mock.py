"""An engine without arithmetic: it sleeps, and its tokens tell whether it saw the right KV.

The KV of a position is a number made of its token and its place, repeated over all its bytes; the
next token is a function of a sum over all positions, each with a weight of its own, read back from
the arena. A block that is wrong, stale, missing or out of order therefore changes the output.
`mock_token` says what is right.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import numpy as np

from common.engine.work import DeviceMemory, ModelInfo, Sampled, Work
from common.kv.layout import KvLayout
from common.scores import pack_scores
from kvbaton.sampling import SamplingParams

MOCK_LAYOUT = KvLayout(num_layers=1, num_kv_heads=2, head_dim=64, block_size=16, dtype="uint8")
MOCK_VOCAB_SIZE = 2048
_FULL_SHARE = 8  # times what a step takes at least, its tokens take in a full one
_NEVER_FULL = 2**31 - 1  # tokens
_FIRST_TOKEN = 5  # below are the special tokens of the demo model's tokenizer
_WORDS = MOCK_LAYOUT.block_bytes // MOCK_LAYOUT.block_size // 8  # of 64 bits, a position

UInt64Array = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]


def _mix(values: UInt64Array) -> UInt64Array:
    """splitmix64's finaliser (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _kv(tokens: Sequence[int], start: int) -> UInt64Array:
    """The KV word of each position from `start` on."""
    positions = np.arange(start, start + len(tokens), dtype=np.uint64)
    return _mix((positions << np.uint64(32)) + np.asarray(tokens, dtype=np.uint64))


def _weighted(words: UInt64Array) -> UInt64Array:
    """The KV words of positions 0, 1, ..., each with a weight of its own."""
    return words * (_mix(np.arange(1, len(words) + 1, dtype=np.uint64)) | np.uint64(1))


def _total(words: UInt64Array) -> int:
    """One number for the KV words of positions 0, 1, ..."""
    return int(_weighted(words).sum(dtype=np.uint64))


def _token(total: int) -> int:
    mixed = int(_mix(np.array([total % 2**64], dtype=np.uint64))[0])
    return _FIRST_TOKEN + mixed % (MOCK_VOCAB_SIZE - _FIRST_TOKEN)


def mock_token(tokens: Sequence[int]) -> int:
    """The token that follows `tokens`."""
    return _token(_total(_kv(tokens, 0) * np.uint64(_WORDS)))


def mock_output(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The next `num_tokens` tokens after `prompt`."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(mock_token(tokens))
    return tokens[len(prompt) :]


def mock_scores(prompt: Sequence[int]) -> bytes:
    """Work.scores of a whole prompt, with nothing but the prompt's own tokens."""
    return _scores(prompt, _kv(prompt, 0) * np.uint64(_WORDS), 0, len(prompt) - 1)


def _scores(tokens: Sequence[int], words: UInt64Array, start: int, count: int) -> bytes:
    """Rows for the tokens after positions from `start` on: each is made of the KV before it."""
    totals = np.cumsum(_weighted(words), dtype=np.uint64)[start : start + count]
    logprobs = -(_mix(totals) / 2.0**64)
    following = tokens[start + 1 : start + count + 1]
    return b"".join(pack_scores([pair]) for pair in zip(following, logprobs, strict=True))


class MockEngine:
    """Implements work.Engine. A step takes `step_s` plus `token_s` for each token computed.

    Of the sampling parameters it follows none: it has no distribution to draw from, and no
    tokenizer that a grammar could be told in. Prompts are scored, since that depends on the KV.
    """

    device_memory: DeviceMemory | None = None

    def __init__(self, step_s: float, token_s: float, max_model_len: int = 32768) -> None:
        self.info = ModelInfo(
            fingerprint="mock",
            max_model_len=max_model_len,
            vocab_size=MOCK_VOCAB_SIZE,
            eos_token_ids=(),
            layout=MOCK_LAYOUT,
        )
        full = math.ceil(_FULL_SHARE * step_s / token_s) if token_s else _NEVER_FULL
        self.full_step_tokens = min(full, _NEVER_FULL)
        self._step_s = step_s
        self._token_s = token_s
        self.arithmetic_s = 0.0
        self._kv: UInt64Array | None = None

    def attach(self, arena: memoryview) -> None:
        words = np.frombuffer(arena, dtype=np.uint64)
        self._kv = words.reshape(-1, MOCK_LAYOUT.block_size, _WORDS)

    async def prepare(self, sampling: SamplingParams) -> None:
        pass

    async def step(self, works: Sequence[Work]) -> list[Sampled | None]:
        """Writes at the end of the step, as late as a real engine might."""
        arithmetic_s = self._step_s + self._token_s * sum(work.num_tokens for work in works)
        await asyncio.sleep(arithmetic_s)
        self.arithmetic_s += arithmetic_s
        for work in works:
            self._write(work)
            if work.prompt_logprobs is not None:
                words = self._words(work)
                work.scores = _scores(work.tokens, words, work.start, work.num_scored)
        return [Sampled(self._read(work), 0.0) if work.sample else None for work in works]

    def close(self) -> None:
        self._kv = None

    def _write(self, work: Work) -> None:
        assert self._kv is not None
        positions = np.arange(work.start, work.end)
        slots = np.asarray(work.slots)[positions // MOCK_LAYOUT.block_size]
        words = _kv(work.tokens[work.start : work.end], work.start)
        self._kv[slots, positions % MOCK_LAYOUT.block_size] = words[:, None]

    def _read(self, work: Work) -> int:
        return _token(_total(self._words(work)))

    def _words(self, work: Work) -> UInt64Array:
        """What the arena holds for each position up to the last computed."""
        assert self._kv is not None
        length = work.end
        num_blocks = -(-length // MOCK_LAYOUT.block_size)
        blocks = self._kv[work.slots[:num_blocks]].reshape(-1, _WORDS)
        words: UInt64Array = blocks[:length].sum(axis=1, dtype=np.uint64)
        return words
