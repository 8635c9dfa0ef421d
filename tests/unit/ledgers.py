"""Small ledgers, and handoffs brought as far as a test wants them."""

from __future__ import annotations

import itertools

from common.kv.hashing import prompt_keys
from services.kvstore.blocks import BlockPool
from services.kvstore.handoff import Handoff, OpenRequest
from services.kvstore.ledger import Ledger

ROOT, TENANT = b"root", b"tenant"
GATEWAY, PREFILL, DECODE = "gateway", "prefill", "decode"


def ledger_of(
    num_blocks: int = 8,
    *,
    growth_blocks: int = 1,
    prefix_cache: bool = True,
    max_waiting: int = 100,
) -> Ledger:
    numbers = itertools.count(1)
    return Ledger(
        BlockPool(num_blocks),
        2,
        lambda: f"h{next(numbers)}",
        growth_blocks=growth_blocks,
        prefix_cache=prefix_cache,
        max_waiting=max_waiting,
    )


def request_of(tokens: list[int], decode_id: str = DECODE) -> OpenRequest:
    return OpenRequest(
        request_id="request",
        gateway_id=GATEWAY,
        prefill_id=PREFILL,
        decode_id=decode_id,
        tenant=TENANT,
        root_key=ROOT,
        keys=prompt_keys(ROOT, tokens, 2),
        num_tokens=len(tokens),
    )


def waiting(ledger: Ledger, tokens: list[int]) -> Handoff:
    handoff = ledger.open(request_of(tokens))
    ledger.line_up(handoff.handoff_id)
    return handoff


def opened(ledger: Ledger, tokens: list[int]) -> Handoff:
    handoff = waiting(ledger, tokens)
    ledger.admit()
    return handoff


def filling(ledger: Ledger, tokens: list[int]) -> Handoff:
    return ledger.fill(opened(ledger, tokens).handoff_id, 1, PREFILL)


def commit(ledger: Ledger, handoff: Handoff, member: str = PREFILL, num_blocks: int = 1) -> None:
    first = handoff.num_committed
    blocks = handoff.blocks[first : first + num_blocks]
    ledger.commit(
        handoff.handoff_id, handoff.epoch, member, first_index=first, blocks=blocks, keys=[]
    )


def filling_with_one_committed(ledger: Ledger, tokens: list[int]) -> Handoff:
    handoff = filling(ledger, tokens)
    commit(ledger, handoff)
    return handoff


def sealed(ledger: Ledger, tokens: list[int]) -> Handoff:
    handoff = filling(ledger, tokens)
    while handoff.num_committed < len(tokens) // 2:
        commit(ledger, handoff)
    return ledger.seal(handoff.handoff_id, 1, PREFILL, finished=False)


def claimed(ledger: Ledger, tokens: list[int]) -> Handoff:
    return ledger.claim(sealed(ledger, tokens).handoff_id, 1, DECODE)


def counts(ledger: Ledger) -> dict[str, int]:
    """The states that hold any block."""
    ledger.check()
    return {state: count for state, count in ledger.pool.counts().items() if count}


def cached(ledger: Ledger, tokens: list[int]) -> list[int]:
    """Leave the full blocks of a prompt as cache; returns them."""
    handoff = claimed(ledger, tokens)
    blocks, num_full = list(handoff.blocks), len(tokens) // 2
    ledger.release(handoff.handoff_id, 1, DECODE)
    ledger.give_back(DECODE, blocks[num_full:])
    return blocks[:num_full]
