"""What the store and the gateway do to find a long prompt whose blocks are all cached."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from common.kv.hashing import prompt_keys
from common.messages import ToStore, decoder
from kvbaton.codec import encode
from scripts.benchmarks.store_handoffs import BLOCK_SIZE, ROLE_IDS, open_message
from services.kvstore.blocks import BlockName, BlockPool
from services.kvstore.handoff import OpenRequest
from services.kvstore.ledger import Ledger

_ROOT, _TENANT = b"root", b"tenant"


class CachedPrompt:
    """A prompt in a pool four times its size, with a ledger over it."""

    def __init__(self, num_tokens: int) -> None:
        rng = random.Random(1)  # noqa: S311 - a prompt
        self.tokens = [rng.randrange(100_000) for _ in range(num_tokens)]
        self.keys = prompt_keys(_ROOT, self.tokens, BLOCK_SIZE)
        self.pool = BlockPool(4 * len(self.keys))
        self.ledger = Ledger(self.pool, BLOCK_SIZE, lambda: "handoff", growth_blocks=1)
        blocks = self.pool.grant(len(self.keys), "writer")
        for block, (parent, key) in zip(blocks, pairwise([_ROOT, *self.keys]), strict=True):
            self.pool.commit(block, BlockName(key, parent, _TENANT))
        self.pool.unpin(blocks)
        self._raw = encode(open_message(self.keys, num_tokens, ROLE_IDS))
        self._decoder = decoder(ToStore)

    def parts(self) -> dict[str, Callable[[], object]]:
        """Each does its work once."""
        return {
            "lookup": partial(self.pool.lookup, self.keys),
            "admit": self._admit,
            "decode": lambda: self._decoder.decode(self._raw),
            "hash": partial(prompt_keys, _ROOT, self.tokens, BLOCK_SIZE),
        }

    def _admit(self) -> None:
        """Open a handoff, find and pin the blocks, and end it."""
        request = OpenRequest(
            request_id="request",
            gateway_id=ROLE_IDS["gateway"],
            prefill_id=ROLE_IDS["prefill"],
            decode_id=ROLE_IDS["decode"],
            tenant=_TENANT,
            root_key=_ROOT,
            keys=self.keys,
            num_tokens=len(self.tokens),
        )
        handoff = self.ledger.open(request)
        self.ledger.line_up(handoff.handoff_id)
        self.ledger.admit()
        assert handoff.num_cached == len(self.ledger.usable_keys(handoff))
        self.ledger.abort(handoff.handoff_id, is_fenced=True)
