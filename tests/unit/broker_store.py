"""A broker over a small ledger, and what it tells to whom."""

from __future__ import annotations

import itertools

from common.kv.hashing import prompt_keys
from common.messages import (
    Aborted,
    Claim,
    Commit,
    Fill,
    Granted,
    Message,
    OpenHandoff,
    Seal,
)
from services.kvstore.blocks import BlockPool
from services.kvstore.broker import Broker
from services.kvstore.ledger import Ledger

ROOT, TENANT = b"root", b"tenant"
GATEWAY, PREFILL, DECODE = "gateway", "prefill", "decode"
TOKENS = [1, 2, 3, 4, 5]


class Store:
    """A broker over eight blocks of two; `sent` is what it told to whom since last asked."""

    def __init__(self, num_blocks: int = 8, pulling: str = "") -> None:
        numbers = itertools.count(1)
        self.ledger = Ledger(BlockPool(num_blocks), 2, lambda: f"h{next(numbers)}", growth_blocks=1)
        self.roles = {GATEWAY: "gateway", PREFILL: "prefill", DECODE: "decode", "other": "gateway"}
        self.broker = Broker(self.ledger, self._send, self.roles.get, pulling.__eq__)
        self._sent: list[tuple[str, Message]] = []

    def _send(self, member: str, message: Message) -> None:
        self._sent.append((member, message))

    def sent(self) -> list[tuple[str, Message]]:
        sent, self._sent = self._sent, []
        return sent

    def gateway(self, message: Message, sender: str = GATEWAY) -> None:
        assert self.broker.from_gateway(sender, message) is None
        self.broker.admit()

    def worker(self, sender: str, message: Message) -> Message | None:
        answer = self.broker.from_worker(sender, message)
        self.broker.admit()
        return answer

    def open(self, tokens: list[int] = TOKENS, call_id: int = 7) -> None:
        self.gateway(
            OpenHandoff(
                call_id=call_id,
                request_id="request",
                prefill_id=PREFILL,
                decode_id=DECODE,
                tenant=TENANT,
                root_key=ROOT,
                keys=prompt_keys(ROOT, tokens, 2),
                num_tokens=len(tokens),
            )
        )

    def fill(self, sender: str = PREFILL) -> list[int]:
        """Open, fill and forget what was sent; returns the block table."""
        self.open()
        granted = self.worker(sender, Fill(handoff_id="h1", epoch=1))
        assert isinstance(granted, Granted)
        self.sent()
        return list(granted.blocks)

    def claim(self) -> list[int]:
        """As `fill`, then all the way to decode."""
        blocks = self.fill()
        commit = Commit(handoff_id="h1", epoch=1, first_index=0, blocks=blocks[:2])
        assert self.worker(PREFILL, commit) is None
        assert self.worker(PREFILL, Seal(handoff_id="h1", epoch=1, first_token=9)) is None
        self.worker(DECODE, Claim(handoff_id="h1", epoch=1))
        self.sent()
        return blocks


def aborted(reason: str, epoch: int = 1) -> Aborted:
    return Aborted(handoff_id="h1", epoch=epoch, reason=reason)
