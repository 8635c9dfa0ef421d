"""What the services say to each other: one closed union of tagged structs per direction.

`call_id` is not 0 where an answer is expected; the answer carries the same one. `number` counts the
messages of a connection, each way (common/net/order.py). Member and handoff ids are 32 hexadecimal
digits; a request goes by the id that its client sees; a block is named by its number in the arena.
"""

from __future__ import annotations

from typing import Any

from common.messages.audits import (
    AskAudit,
    AskWhy,
    Audited,
    CacheDropped,
    DropCache,
    HeldSequence,
    Holdings,
    ReportHoldings,
    Told,
)
from common.messages.base import (
    INTERNAL_VERSION,
    Block,
    CorruptError,
    Count,
    Failed,
    Heartbeat,
    Hello,
    Key,
    Leave,
    Load,
    Member,
    MemberId,
    Message,
    Ok,
    RequestName,
    StaleError,
    Stamp,
    Stopped,
    TokenId,
    Welcome,
)
from common.messages.counts import Distribution, WorkerCounts
from common.messages.handoffs import (
    Aborted,
    AbortHandoff,
    BlockBytes,
    Claim,
    Commit,
    Discard,
    Fill,
    Filled,
    GetBlocks,
    GiveBack,
    Granted,
    HandoffOpened,
    Lease,
    Leased,
    Members,
    OfferMemory,
    OpenHandoff,
    PutBlocks,
    Quit,
    Release,
    Seal,
    Sealed,
    Suspend,
    Yield,
)
from common.messages.operations import AskStatus, Drain, SetLogLevel, StatusTold
from common.messages.reports import MAX_CHUNKS, ChunkReport, WorkReport
from common.messages.requests import (
    Dropped,
    OutputToken,
    OutputTokens,
    Prefill,
    Reserve,
)
from kvbaton.codec import Decoder

__all__ = [
    "INTERNAL_VERSION",
    "MAX_CHUNKS",
    "AbortHandoff",
    "Aborted",
    "AskAudit",
    "AskStatus",
    "AskWhy",
    "Audited",
    "Block",
    "BlockBytes",
    "CacheDropped",
    "ChunkReport",
    "Claim",
    "Commit",
    "CorruptError",
    "Count",
    "Discard",
    "Distribution",
    "Drain",
    "DropCache",
    "Dropped",
    "Failed",
    "Fill",
    "Filled",
    "FromStore",
    "FromWorker",
    "GetBlocks",
    "GiveBack",
    "Granted",
    "HandoffOpened",
    "Heartbeat",
    "HeldSequence",
    "Hello",
    "Holdings",
    "Key",
    "Lease",
    "Leased",
    "Leave",
    "Load",
    "Member",
    "MemberId",
    "Members",
    "Message",
    "OfferMemory",
    "Ok",
    "OpenHandoff",
    "OutputToken",
    "OutputTokens",
    "Prefill",
    "PutBlocks",
    "Quit",
    "Release",
    "ReportHoldings",
    "RequestName",
    "Reserve",
    "Seal",
    "Sealed",
    "SetLogLevel",
    "StaleError",
    "Stamp",
    "StatusTold",
    "Stopped",
    "Suspend",
    "ToStore",
    "ToWorker",
    "TokenId",
    "Told",
    "Welcome",
    "WorkReport",
    "WorkerCounts",
    "Yield",
    "decoder",
]

ToStore = (
    Hello | Heartbeat | Leave | Stopped | OpenHandoff | AbortHandoff | Fill | Commit | Seal | Claim
    | Release | Suspend | Yield | Quit | Lease | GiveBack | PutBlocks | GetBlocks | Discard
    | OfferMemory | AskAudit | AskWhy | AskStatus | DropCache | Holdings | SetLogLevel
)  # fmt: skip
FromStore = (
    Welcome | Failed | Ok | HandoffOpened | Granted | Leased | BlockBytes | Filled | Sealed
    | Aborted | Members | ReportHoldings | Audited | Told | CacheDropped | StatusTold
    | SetLogLevel
)  # fmt: skip
ToWorker = Hello | Heartbeat | Reserve | Prefill | Drain | SetLogLevel
FromWorker = Welcome | Failed | Ok | OutputTokens | Dropped


def decoder(union: Any) -> Decoder[Message]:
    """A decoder for one direction's union."""
    return Decoder(union)
