"""What the services say to each other: one closed union of tagged structs per direction.

`call_id` is not 0 where an answer is expected; the answer carries the same one. `number` counts the
messages of a connection, each way (common/net/order.py). Member and handoff ids are 32 hexadecimal
digits; a request goes by the id that its client sees; a block is named by its number in the arena.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from common.kv.layout import KvLayout
from kvbaton.admin import MAX_ID_CHARS, StoreAudit, StoreHistory
from kvbaton.codec import Decoder
from kvbaton.errors import KvbatonError
from kvbaton.sampling import SamplingParams

INTERNAL_VERSION = 2


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
Key = Annotated[bytes, msgspec.Meta(max_length=64)]
RequestName = Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)]
Block = Count
TokenId = Count


class Message(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type"):
    """Base of all; unknown keys are ignored, so that a newer peer may add fields."""

    call_id: int = 0
    number: int = 0


# ---- every connection -------------------------------------------------------------------------


class Load(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How busy a worker is. `num_tokens_queued`: prompt tokens accepted and not yet computed."""

    num_running: Count = 0
    num_waiting: Count = 0
    num_tokens_queued: Count = 0
    tokens_per_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Member(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A process of the cluster. `member_id` is new at each start: an incarnation, not a name."""

    member_id: MemberId
    role: Annotated[str, msgspec.Meta(pattern="^(gateway|prefill|decode)$")]
    name: str  # decode.2, for people
    host_id: str
    pid: int
    endpoint: str = ""
    fingerprint: str = ""
    model: str = ""
    max_model_len: Count = 0
    max_num_seqs: Count = 0
    mover: Annotated[str, msgspec.Meta(pattern="^(auto|shm|zmq)$")] = "shm"
    layout: KvLayout | None = None
    load: Load = Load()


class Hello(Message, tag="hello"):
    """The first message of every connection."""

    internal_version: int
    member: Member


class Welcome(Message, tag="welcome"):
    """The answer to hello. `instance_id` changes when the one that answers restarts."""

    instance_id: str
    heartbeat_s: float = 0.5
    arena_path: str = ""
    data_endpoint: str = ""
    cache_secret: bytes = b""
    host_id: str = ""
    num_blocks: int = 0


class Failed(Message, tag="failed"):
    """The call was refused. `code` is one of kvbaton.errors, "stale" or "hello_required"."""

    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None


class Ok(Message, tag="ok"):
    """The call was carried out, there is nothing more to say."""


class Heartbeat(Message, tag="heartbeat"):
    """A sign of life, with the sender's load; answered by ok. A worker is shown to gateways once
    it is `ready`: its arena is mapped and its engine attached."""

    load: Load = Load()
    ready: bool = False


class Leave(Message, tag="leave"):
    """The sender has stopped all steps, writes no more and goes."""


class Stopped(Message, tag="stopped"):
    """The sender's earlier incarnation `member_id` has ended its last step and writes no more."""

    member_id: MemberId


# ---- to the store -------------------------------------------------------------------------------


class OpenHandoff(Message, tag="open"):
    """Gateway: reserve room for a prompt and pin its cached blocks. Answered by HandoffOpened once
    there is room. `keys` are those of the prompt's full blocks, `root_key` their first parent;
    `tenant` tells whose share of the cache they count for."""

    request_id: str
    prefill_id: MemberId
    decode_id: MemberId
    tenant: Key
    root_key: Key
    keys: list[Key]
    num_tokens: Count


class AbortHandoff(Message, tag="abort"):
    """Gateway: end the handoff wherever it stands, nothing of it counts any more: also the answer
    to `aborted`. Before its id is known it is named by the `open_call_id` of the call that opens
    it."""

    handoff_id: str = ""
    open_call_id: int = 0


class _HandoffStep(Message):
    """A worker's step on a handoff; an older epoch than the store's changes nothing."""

    handoff_id: str
    epoch: int


class Fill(_HandoffStep, tag="fill"):
    """Prefill (or decode, of its own prompt): give me the blocks. Answered by Granted."""


class Commit(_HandoffStep, tag="commit"):
    """Blocks from `first_index` on are full and final. Without `keys` the prompt's keys hold."""

    first_index: Count
    blocks: list[Block]
    keys: list[Key] = []


class Seal(_HandoffStep, tag="seal"):
    """Prefill: the prompt is computed and `first_token` drawn. `finished`: no more is to do."""

    first_token: TokenId
    finished: bool = False


class Claim(_HandoffStep, tag="claim"):
    """Decode: these blocks are mine now. Answered by Granted."""


class Release(_HandoffStep, tag="release"):
    """Decode: the request is finished, the committed blocks may be cached."""


class Suspend(_HandoffStep, tag="suspend"):
    """Decode: preempted. Drops all blocks, keeps the handoff; answered by HandoffOpened when there
    is room to go on, with what is left pinned. `num_tokens` counts prompt and output."""

    num_tokens: Count


class Quit(_HandoffStep, tag="quit"):
    """A worker gives a handoff up, or confirms that it was told of an abort: its step has ended, it
    writes no more into the handoff's blocks."""


class Lease(Message, tag="lease"):
    """Decode: give me up to this many free blocks to grow into. Answered by Leased."""

    num_blocks: Count


class GiveBack(Message, tag="give_back"):
    """Decode: these leased blocks are free again."""

    blocks: list[Block]


class PutBlocks(_HandoffStep, tag="put"):
    """Bytes of blocks from `first_index` on, one frame each, for an arena the sender cannot map.
    Answered by ok. `digests` are those of common/kv/integrity.py; `keys` as in `commit`."""

    first_index: Count
    blocks: list[Block]
    digests: list[Key]
    keys: list[Key] = []


class GetBlocks(_HandoffStep, tag="get"):
    """Ask for the bytes of blocks of the handoff, by their places in its table. Answered by
    BlockBytes and frames."""

    indexes: list[Count]


class Discard(_HandoffStep, tag="discard"):
    """A worker got bytes that do not fit their digest: nobody else shall find these blocks."""

    indexes: list[Count]


class AskAudit(Message, tag="ask_audit"):
    """Gateway: do your books close, and do your members agree. Answered by Audited."""


class AskWhy(Message, tag="ask_why"):
    """Gateway: what do you remember of a block, or of a request or handoff. Answered by Told."""

    block: Block | None = None
    names: Annotated[list[RequestName], msgspec.Meta(max_length=4)] = []


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


# ---- from the store -----------------------------------------------------------------------------


class HandoffOpened(Message, tag="opened"):
    """Room is reserved. The first `num_cached_blocks` blocks are pinned and need no computing."""

    handoff_id: str
    epoch: int
    num_cached_blocks: int


class Granted(Message, tag="granted"):
    """The handoff's block table; the first `num_committed` are final, the rest the caller's.

    The store knows the keys of the first `num_keys` blocks. `stamps` are the blocks' for who moves
    bytes, else empty.
    """

    blocks: list[int]
    num_committed: int
    num_keys: int
    stamps: list[Stamp] = []


class Leased(Message, tag="leased"):
    """Free blocks, fewer than asked for when the store has no more; `stamps` as in Granted."""

    blocks: list[int]
    stamps: list[Stamp] = []


class BlockBytes(Message, tag="bytes"):
    """The bytes asked for follow as frames, one for each block, each with its digest."""

    digests: list[Key]


class Filled(Message, tag="filled"):
    """To decode: more of the handoff's blocks, from `first_index` on, are final and may be pulled.
    A block and its stamp name one content, which need not be pulled twice."""

    handoff_id: str
    epoch: int
    first_index: Count
    blocks: list[int]
    stamps: list[Stamp]


class Sealed(Message, tag="sealed"):
    """To decode: prefill is done, claim it."""

    handoff_id: str
    epoch: int
    first_token: int


class Aborted(Message, tag="aborted"):
    """To workers and the gateway: the handoff is over. Who may be writing answers with quit."""

    handoff_id: str
    epoch: int
    reason: str


class Members(Message, tag="members"):
    """To gateways: the workers that can take work, and what the store holds."""

    members: list[Member]
    blocks: dict[str, int] = {}
    counters: dict[str, float] = {}
    handoffs: dict[str, int] = {}
    num_handoffs: int = 0
    num_waiting: int = 0


class ReportHoldings(Message, tag="report"):
    """To workers: say what you hold. Answered by Holdings."""

    audit_id: Count


class Audited(Message, tag="audited"):
    """The books of this store."""

    audit: StoreAudit


class Told(Message, tag="told"):
    """What this store remembers."""

    history: StoreHistory


# ---- between gateway and workers ----------------------------------------------------------------


class _Request(Message):
    """What both workers of a request need to know of it.

    `tokens` are the prompt and, when the request is placed again, its output so far;
    `num_prompt_tokens` tells where the output begins. `worker_id` is the member that the handoff
    was opened for: a later incarnation of it refuses. From `root_key` and the tokens follow the
    keys of the blocks, and with them what their digests must be.
    """

    handoff_id: str
    epoch: int
    worker_id: MemberId
    store: int
    root_key: Key
    tokens: Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    num_prompt_tokens: Count
    sampling: SamplingParams
    choice: Count


class Reserve(_Request, tag="reserve"):
    """Gateway to decode: keep a place for this request. Answered by ok when there is one.

    `prefill_here`: compute the prompt yourself.
    """

    prefill_here: bool = False


class Prefill(_Request, tag="prefill"):
    """Gateway to prefill: compute the prompt, draw one token. Answered by ok at once."""


class OutputToken(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One token of one request; `index` counts the request's output from 0."""

    handoff_id: str
    index: Count
    token_id: TokenId
    logprob: float = 0.0
    top_logprobs: list[tuple[int, float]] = []
    finish_reason: str | None = None
    since_joined_ms: float = 0.0  # with the first token from here: since it could be computed


class OutputTokens(Message, tag="tokens"):
    """Worker to gateway: what one step brought for its requests, and the load after it."""

    tokens: list[OutputToken]
    load: Load


class Dropped(Message, tag="dropped"):
    """Worker to gateway: the request cannot go on here. It may be placed again."""

    handoff_id: str
    code: str
    message: str


ToStore = (
    Hello | Heartbeat | Leave | Stopped | OpenHandoff | AbortHandoff | Fill | Commit | Seal | Claim
    | Release | Suspend | Quit | Lease | GiveBack | PutBlocks | GetBlocks | Discard
    | AskAudit | AskWhy | Holdings
)  # fmt: skip
FromStore = (
    Welcome | Failed | Ok | HandoffOpened | Granted | Leased | BlockBytes | Filled | Sealed
    | Aborted | Members | ReportHoldings | Audited | Told
)  # fmt: skip
ToWorker = Hello | Heartbeat | Reserve | Prefill
FromWorker = Welcome | Failed | Ok | OutputTokens | Dropped


def decoder(union: Any) -> Decoder[Message]:
    """A decoder for one direction's union."""
    return Decoder(union)
