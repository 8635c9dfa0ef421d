"""A sequence on a worker: its tokens, its blocks, how far it is computed, when it stops. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from common.engine.work import ModelInfo, Work
from common.kv.hashing import block_key
from common.messages import Granted, Message
from common.worker.progress import Progress
from kvbaton.sampling import SamplingParams


class Piece(NamedTuple):
    """A block of a handoff: its place in the table, its number, what its digest is bound to, and
    whether that is the block's own key, which tells its content, and not its parent's."""

    place: int
    block: int
    key: bytes
    is_own_key: bool


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's work on one worker.

    `tokens` is the prompt and the output so far. Positions below `num_computed` have KV in
    `blocks`; blocks below `num_committed` are final, and the store has been told. It knows the keys
    of the first `num_known_keys` blocks: those of the prompt, which follow from `root_key`.
    """

    handoff_id: str
    epoch: int
    store: int
    incarnation: str  # our member id at the store when this began: what it granted is for that one
    gateway: bytes
    root_key: bytes
    tokens: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    choice: int
    arrived_at: float
    block_size: int
    first_due_at: float = 0.0  # when its prompt is to be computed; past: as soon as can be
    names: dict[str, str] = field(default_factory=dict)  # what log lines about it say
    progress: Progress = field(default_factory=Progress)  # since its gateway was last told
    first_slot: int = 0  # what to add to a block's number to find it in the engine's memory
    blocks: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # where the blocks lie
    num_computed: int = 0
    num_committed: int = 0
    num_found: int = 0  # positions that were computed when the blocks were granted
    num_known_keys: int = 0
    pulled: set[int] = field(default_factory=set)  # places in the table, pulled before it was known
    num_moved: int = 0  # blocks whose bytes came for this sequence
    num_uses: int = 0  # steps, moves and calls under way that read or write its blocks
    awaits_scores: bool = False  # of the prompt: they leave with the first token drawn here
    is_over: bool = False  # aborted or finished: nothing more is computed for it
    ending: Message | None = None  # what the store is told once nothing uses it any more
    _keys: list[bytes] = field(default_factory=list)
    _scores: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.num_known_keys = len(self.tokens) // self.block_size
        self.awaits_scores = self.sampling.prompt_logprobs is not None

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be computed before the next one can be drawn."""
        return len(self.tokens) - self.num_computed

    def granted(self, table: Granted) -> None:
        """Take over the block table the store gave."""
        self.blocks = table.blocks
        self.slots = [block + self.first_slot for block in table.blocks]
        self.num_committed = table.num_committed
        self.num_computed = min(table.num_committed * self.block_size, len(self.tokens) - 1)
        self.num_found = self.num_computed
        self.num_known_keys = table.num_keys

    def claimed(self, first_token: int) -> None:
        """Go on from a prompt that prefill computed whole, after the token it drew."""
        self.num_computed = len(self.tokens)
        self.tokens.append(first_token)
        self.awaits_scores = False

    def grow(self, block: int) -> None:
        """Take a block for the positions to come."""
        self.blocks.append(block)
        self.slots.append(block + self.first_slot)

    def lose_blocks(self) -> None:
        """All blocks are given up; what they held is computed again unless it is found."""
        self.blocks, self.slots, self.num_committed, self.num_computed = [], [], 0, 0
        self.pulled.clear()

    def work(self, num_tokens: int) -> Work:
        """The next `num_tokens` positions as the engine wants them."""
        return Work(
            tokens=self.tokens,
            num_prompt_tokens=self.num_prompt_tokens,
            start=self.num_computed,
            num_tokens=num_tokens,
            slots=self.slots,
            sampling=self.sampling,
            choice=self.choice,
            sample=self.num_computed + num_tokens == len(self.tokens),
            prompt_logprobs=self.sampling.prompt_logprobs if self.awaits_scores else None,
        )

    def computed(self, work: Work) -> None:
        """A step has computed the positions of `work`."""
        self.num_computed += work.num_tokens
        if work.scores:
            begin = len(work.scores) // work.num_scored * work.start
            # What is computed again, after a suspension, is scored again. Beyond a gap, which
            # blocks of another request would leave, nothing is kept: the gateway misses rows.
            if begin <= len(self._scores):
                self._scores[begin:] = work.scores

    def take_scores(self) -> bytes:
        """The scores of the prompt (common/scores.py); none but for the first who asks."""
        scores, self._scores = bytes(self._scores), bytearray()
        self.awaits_scores = False
        return scores

    def new_blocks(self) -> tuple[int, list[int], list[bytes]]:
        """Blocks that became full since the last call: first index, block ids, keys.

        The keys are empty for blocks whose keys the store knows; such a run ends where they end.
        """
        first = self.num_committed
        end = self.num_computed // self.block_size
        if first < self.num_known_keys:
            end = min(end, self.num_known_keys)
            keys = []
        else:
            keys = [self.key(index) for index in range(first, end)]
        self.num_committed = max(first, end)
        return first, self.blocks[first:end], keys

    def key(self, index: int) -> bytes:
        """The key of a full block."""
        while len(self._keys) <= index:
            start = len(self._keys) * self.block_size
            parent = self._keys[-1] if self._keys else self.root_key
            self._keys.append(block_key(parent, self.tokens[start : start + self.block_size]))
        return self._keys[index]

    def digest_key(self, index: int) -> bytes:
        """What the digest of a block is bound to: the key that the store knows for it, or else its
        parent's."""
        known = min(index, self.num_known_keys - 1)
        return self.key(known) if known >= 0 else self.root_key

    def piece(self, index: int, block: int, key: bytes = b"") -> Piece:
        """A block at its place as a mover wants it; `key` is given where only we know it."""
        is_known = bool(key) or index < self.num_known_keys
        # Of one that is over the blocks may be another's by now.
        return Piece(index, block, key or self.digest_key(index), is_known and not self.is_over)

    def pieces(self, first: int, blocks: list[int], keys: list[bytes]) -> list[Piece]:
        """Blocks from a place on as a mover wants them; `keys` are those that only we know."""
        named = zip(blocks, keys or [b""] * len(blocks), strict=True)
        return [self.piece(index, *each) for index, each in enumerate(named, first)]

    def finish_reason(self, info: ModelInfo) -> str | None:
        """Why the sequence ends with its last token, or None if it goes on."""
        token = self.tokens[-1]
        if token in self.sampling.stop_token_ids:
            return "stop"
        if token in info.eos_token_ids and not self.sampling.ignore_eos:
            return "stop"
        max_tokens = self.sampling.max_tokens
        if max_tokens is not None and self.num_outputs >= max_tokens:
            return "length"
        if len(self.tokens) >= info.max_model_len:
            return "length"
        return None


def plan_chunks(
    waiting: list[Sequence], budget: int, enough: float = math.inf
) -> list[tuple[Sequence, int]]:
    """Divide a step's token budget among prompts, first come first served.

    Several short prompts share a step until it has `enough` tokens: a longer one takes longer in
    proportion, and all in it wait for the last (DistServe, section 3.1). A long prompt takes what
    is left of the budget and goes on in the next step.
    """
    plan = []
    num_planned = 0
    for sequence in waiting:
        if num_planned >= min(budget, enough):
            break
        num_tokens = min(sequence.num_uncomputed, budget - num_planned)
        plan.append((sequence, num_tokens))
        num_planned += num_tokens
    return plan
