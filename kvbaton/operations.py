"""What an operator asks of a cluster, or has it do, through a gateway: messages and answers.

docs/protocol.md is normative.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvbaton.admin import MAX_ID_CHARS
from kvbaton.wire import WireMessage

LOG_LEVEL_PATTERN = "^(debug|info|warning|error)$"
ALL = "all"  # every member

Name = Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)]
LogLevel = Annotated[str, msgspec.Meta(pattern=LOG_LEVEL_PATTERN)]


class MemberStatus(msgspec.Struct, kw_only=True, frozen=True):
    """A gateway or a worker, as a store knows it. `state`: ready, joining, draining, drained or
    lost. `age_s`: since it has joined. Members of one `host_id` can share memory."""

    member_id: str
    name: str
    role: str
    state: str
    version: str = ""
    age_s: float | None = None
    host_id: str = ""
    pid: int = 0
    endpoint: str = ""
    num_running: int = 0
    num_waiting: int = 0
    num_places: int = 0
    num_tokens_queued: int = 0
    tokens_per_s: float = 0.0


class StoreStatus(msgspec.Struct, kw_only=True, frozen=True):
    """A KV store. With a `problem` it could not be asked, and the rest is empty."""

    store: int = 0
    endpoint: str = ""
    problem: str = ""
    name: str = ""
    version: str = ""
    age_s: float = 0.0
    num_blocks: int = 0
    blocks: dict[str, int] = {}
    handoffs: dict[str, int] = {}
    num_waiting: int = 0


class Status(WireMessage, frozen=True, tag="status"):
    """An operator asks who is there and how much there is to do. Answered by `standing`."""

    id: int
    admin_key: str


class Drain(WireMessage, frozen=True, tag="drain"):
    """An operator has a worker take nothing new and hand on what it has. Answered by `drained`
    when it holds nothing any more."""

    id: int
    admin_key: str
    member: Name
    force: bool = False


class SetLogLevel(WireMessage, frozen=True, tag="log_level"):
    """An operator changes what one member logs, or all. Answered by `log_level_set`."""

    id: int
    admin_key: str
    member: Name
    level: LogLevel


class Standing(WireMessage, frozen=True, tag="standing"):
    """The answer to `status`. `gateway` is who answers."""

    id: int
    gateway: str
    model: str
    version: str
    members: list[MemberStatus] = []
    stores: list[StoreStatus] = []


class Drained(WireMessage, frozen=True, tag="drained"):
    """The worker holds nothing any more. Its process goes on, idle, until it is stopped."""

    id: int
    name: str
    member_id: str


class LogLevelSet(WireMessage, frozen=True, tag="log_level_set"):
    """Who logs at the new level; `problems` are those who could not be told, by name."""

    id: int
    names: list[str] = []
    problems: dict[str, str] = {}


Operation = Status | Drain | SetLogLevel
Outcome = Standing | Drained | LogLevelSet
