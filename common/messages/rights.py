"""Who may say what: the message types that each role may send to each kind of server.

A role is that of the sender's key; in a cluster without keys it is the one that a member claims in
its hello, and clients have none. What is not listed is refused before anything is done about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from common.messages.audits import AskAudit, AskWhy, DropCache, Holdings
from common.messages.base import Heartbeat, Hello, Leave, Stopped
from common.messages.handoffs import (
    AbortHandoff,
    Claim,
    Commit,
    Discard,
    Fill,
    GetBlocks,
    GiveBack,
    Lease,
    OfferMemory,
    OpenHandoff,
    PutBlocks,
    Quit,
    Release,
    Seal,
    Suspend,
    Yield,
)
from common.messages.operations import AskStatus, Drain, SetLogLevel
from common.messages.requests import Prefill, Reserve
from kvbaton import operations, protocol, questions
from kvbaton.errors import ForbiddenError

Rights = Mapping[str, frozenset[type[Any]]]  # by role

_MEMBER = frozenset({Hello, Heartbeat, Leave, Stopped})
# Alike for both: a prefill worker decodes some of what it has computed.
_WORKER = _MEMBER | {
    Fill,
    Commit,
    Seal,
    Claim,
    Suspend,
    Yield,
    Release,
    Quit,
    Discard,
    Lease,
    GiveBack,
    Holdings,
}
_ANYBODY = frozenset({protocol.Hello, protocol.Ping, protocol.Cancel, questions.Models})
_CLIENT = _ANYBODY | {
    protocol.Generate,
    questions.Score,
    questions.Tokenize,
    questions.Detokenize,
}
_ADMIN = _ANYBODY | {
    protocol.Audit,
    protocol.Why,
    questions.Stats,
    operations.Status,
    operations.Drain,
    operations.SetLogLevel,
}
_OF_GATEWAY = frozenset({Hello, Heartbeat, Drain, SetLogLevel})  # at every worker

RIGHTS: Mapping[str, Rights] = {
    "kvstore": {
        "gateway": _MEMBER
        | {OpenHandoff, AbortHandoff, AskAudit, AskWhy, AskStatus, DropCache, SetLogLevel},
        "prefill": _WORKER,
        "decode": _WORKER,
    },
    "kvstore data": {
        role: frozenset({Hello, Heartbeat, PutBlocks, GetBlocks, OfferMemory})
        for role in ("prefill", "decode")
    },
    "prefill": {"gateway": _OF_GATEWAY | {Prefill, Reserve}},
    "decode": {"gateway": _OF_GATEWAY | {Reserve}},
    "gateway": {"client": _CLIENT, "admin": _ADMIN, "": _CLIENT | _ADMIN},
}


def violation(rights: Rights, role: str, message: msgspec.Struct) -> ForbiddenError | None:
    """Why a role must not send this message to who grants these rights; None if it may."""
    if type(message) in rights.get(role, ()):
        return None
    return ForbiddenError(f"{role} has no right to send {message.__struct_config__.tag} here")
