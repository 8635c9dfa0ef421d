"""What every message has, and what every connection begins with."""

from __future__ import annotations

from typing import Annotated

import msgspec

from common.kv.hashing import KEY_BYTES
from common.kv.layout import KvLayout
from common.messages.counts import Total, WorkerCounts
from common.step_times import Amount, StepTimes
from kvbaton.admin import MAX_ID_CHARS
from kvbaton.errors import KvbatonError
from kvbaton.traceparent import PATTERN as TRACEPARENT

INTERNAL_VERSION = 3


class StaleError(KvbatonError):
    """The handoff is over, or has gone on to another epoch: drop the work."""

    code = "stale"
    status = 409


class CorruptError(KvbatonError):
    """Bytes of a block do not fit their digest: they are not used, and computed again."""

    code = "corrupt"
    status = 500


# What a number or an id may be is checked where bytes become messages, not by each handler.
MemberId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Stamp = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Key = Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)]
Encoding = Annotated[
    str, msgspec.Meta(pattern="^(|planes|int8)$")
]  # of block bytes; "": as they are
Traceparent = Annotated[str, msgspec.Meta(pattern=TRACEPARENT)]
RequestName = Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)]
Block = Count
TokenId = Count


class Message(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type"):
    """Base of all; unknown keys are ignored, so that a newer peer may add fields."""

    call_id: int = 0
    number: int = 0


class Load(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How busy a worker is. `num_tokens_queued`: prompt tokens accepted and not yet computed, which
    take about `queued_s`. `num_context_tokens`: positions that one token of each running sequence
    attends to. `num_decoding`: sequences that a prefill worker decodes itself, or will.
    `prompt_steps`, `token_steps`: how long steps take that compute prompts, and those that do not.
    `pulled_bytes_per_s`, `pushed_bytes_per_s`: how fast blocks come from the store and go there,
    where they must; 0 before any has.
    `is_draining`: it ends what it has, or hands it on, and takes nothing new. `num_steps`: that it
    has run; of two reports, which come by different ways, the one with fewer is the older."""

    num_running: Count = 0
    num_waiting: Count = 0
    num_decoding: Count = 0
    num_tokens_queued: Count = 0
    queued_s: Amount = 0.0
    num_context_tokens: Count = 0
    tokens_per_s: Amount = 0.0
    prompt_steps: StepTimes | None = None
    token_steps: StepTimes | None = None
    paced_token_ms: Amount = 0.0  # one more token of a prompt, in a step of decode; 0.0: not known
    pulled_bytes_per_s: Amount = 0.0
    pushed_bytes_per_s: Amount = 0.0
    is_draining: bool = False
    num_steps: Total = 0


class Member(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A process of the cluster. `member_id` is new at each start: an incarnation, not a name.
    `decodes`: a worker that can, a prefill worker too unless it is of an older version."""

    member_id: MemberId
    role: Annotated[str, msgspec.Meta(pattern="^(gateway|prefill|decode)$")]
    name: str  # decode.2, for people
    host_id: str
    pid: int
    endpoint: str = ""
    fingerprint: str = ""
    model: str = ""
    version: RequestName = ""  # of its program
    max_model_len: Count = 0
    max_num_seqs: Count = 0
    decodes: bool = False
    mover: Annotated[str, msgspec.Meta(pattern="^(auto|shm|zmq)$")] = "shm"
    layout: KvLayout | None = None
    load: Load = Load()
    counts: WorkerCounts | None = None


class Hello(Message, tag="hello"):
    """The first message of every connection."""

    internal_version: int
    member: Member


class Welcome(Message, tag="welcome"):
    """The answer to hello. `instance_id` changes when the one that answers restarts. `encodings`:
    how block bytes may come and go beside as they are, from a store's data socket. `nixl`: whether
    it takes offers of memory there."""

    instance_id: str
    heartbeat_s: float = 0.5
    arena_path: str = ""
    data_endpoint: str = ""
    cache_secret: bytes = b""
    host_id: str = ""
    num_blocks: int = 0
    encodings: list[RequestName] = []
    nixl: bool = False


class Failed(Message, tag="failed"):
    """The call was refused. `code` is one of kvbaton.errors, "stale" or "hello_required"."""

    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None


class Ok(Message, tag="ok"):
    """The call was carried out, there is nothing more to say."""


class Heartbeat(Message, tag="heartbeat"):
    """A sign of life, with a worker's load and what it has counted; answered by ok. Gateways are
    shown a worker once it is `ready`: its arena is mapped and its engine attached."""

    load: Load = Load()
    ready: bool = False
    counts: WorkerCounts | None = None


class Leave(Message, tag="leave"):
    """The sender has stopped all steps, writes no more and goes."""


class Stopped(Message, tag="stopped"):
    """The sender's earlier incarnation `member_id` has ended its last step and writes no more."""

    member_id: MemberId
