"""What an operator asks of a store, and a store of its workers."""

from __future__ import annotations

from typing import Annotated

import msgspec

from common.messages.base import (
    Block,
    Count,
    Message,
    RequestName,
)
from kvbaton.admin import StoreAudit, StoreHistory


class AskAudit(Message, tag="ask_audit"):
    """Gateway: do your books close, and do your members agree. Answered by Audited."""


class AskWhy(Message, tag="ask_why"):
    """Gateway: what do you remember of a block, or of a request or handoff. Answered by Told."""

    block: Block | None = None
    names: Annotated[list[RequestName], msgspec.Meta(max_length=4)] = []


class DropCache(Message, tag="drop_cache"):
    """Gateway: nobody shall find what is cached by now. Answered by CacheDropped."""


class HeldSequence(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A sequence as its worker holds it: `blocks[:num_committed]` are final."""

    handoff_id: str
    epoch: int
    blocks: list[Block] = []
    num_committed: Count = 0


class Holdings(Message, tag="holdings"):
    """Worker: the answer to ReportHoldings, all that it holds of this store."""

    audit_id: Count
    sequences: list[HeldSequence] = []
    spare: list[Block] = []


class ReportHoldings(Message, tag="report"):
    """To workers: say what you hold. Answered by Holdings."""

    audit_id: Count


class Audited(Message, tag="audited"):
    """The books of this store."""

    audit: StoreAudit


class Told(Message, tag="told"):
    """What this store remembers."""

    history: StoreHistory


class CacheDropped(Message, tag="cache_dropped"):
    """So many blocks cannot be found any more; who reads one goes on."""

    num_blocks: Count
