"""What an operator has a gateway ask of others, or tell them to do."""

from __future__ import annotations

from common.messages.base import MemberId, Message
from kvbaton.operations import LogLevel, MemberStatus, StoreStatus


class AskStatus(Message, tag="ask_status"):
    """Gateway to store: how are you, and who is with you. Answered by StatusTold."""


class StatusTold(Message, tag="status_told"):
    """The store, and its members."""

    status: StoreStatus
    members: list[MemberStatus]


class SetLogLevel(Message, tag="log_level"):
    """Gateway to store or worker: log at this level from now on. Answered by ok. A store that is
    given `member_ids` changes nothing itself: it passes the word on to those, who are gateways."""

    level: LogLevel
    member_ids: list[MemberId] = []


class Drain(Message, tag="drain"):
    """Gateway to worker: take nothing new, hand on what you have. Answered by ok when you hold
    nothing. `worker_id` is what some store calls the worker: a later incarnation refuses."""

    worker_id: MemberId
