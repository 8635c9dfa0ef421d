"""What is said to a store and by a store of handoffs, leases and blocks."""

from __future__ import annotations

from typing import Annotated

import msgspec

from common.messages.base import (
    Block,
    Count,
    Encoding,
    Key,
    Member,
    MemberId,
    Message,
    RequestName,
    Stamp,
    TokenId,
    Traceparent,
)

MAX_METADATA_BYTES = 64 * 1024

# ---- to the store -------------------------------------------------------------------------------


class OpenHandoff(Message, tag="open"):
    """Gateway: reserve room for a prompt and pin its cached blocks. Answered by HandoffOpened once
    there is room. `keys` are those of the prompt's full blocks, `root_key` their first parent;
    `tenant` tells whose share of the cache they count for. `after` names a handoff of this gateway
    that cannot go on, or shall not: it ends, and what is computed of it passes on to this one."""

    request_id: str
    prefill_id: MemberId
    decode_id: MemberId
    tenant: Key
    root_key: Key
    keys: list[Key]
    num_tokens: Count
    after: RequestName = ""
    traceparent: Traceparent = ""


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


class Yield(_HandoffStep, tag="yield"):
    """Decode, before it leaves: I write no more, the first `num_tokens` positions are computed.
    `blocks` follow the committed ones: the unfinished last block, if there is one. Answered by ok;
    the gateway then goes on from here with `open`."""

    num_tokens: Count
    blocks: list[Block]


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
    Answered by ok. `digests` are those of common/kv/integrity.py, of the blocks once they are
    decoded; `keys` as in `commit`; `encoding` is one of common/kv/encodings.py. With `offset` they
    lie there in the memory that the sender has offered, one after another, and no frames come."""

    first_index: Count
    blocks: list[Block]
    digests: list[Key]
    keys: list[Key] = []
    encoding: Encoding = ""
    offset: Count | None = None


class GetBlocks(_HandoffStep, tag="get"):
    """Ask for the bytes of blocks of the handoff, by their places in its table. Answered by
    BlockBytes and frames, which may have this `encoding`. With `offset` they are wanted there in
    the memory that the sender has offered, one after another."""

    indexes: list[Count]
    encoding: Encoding = ""
    offset: Count | None = None


class OfferMemory(Message, tag="offer"):
    """Worker: `num_bytes` from `address` on are open to the store, by NIXL, to who has `metadata`
    of our agent (common/net/nixl.py). Answered by ok."""

    metadata: Annotated[bytes, msgspec.Meta(max_length=MAX_METADATA_BYTES)]
    address: Stamp
    num_bytes: Count


class Discard(_HandoffStep, tag="discard"):
    """A worker got bytes that do not fit their digest: nobody else shall find these blocks."""

    indexes: list[Count]


# ---- from the store -----------------------------------------------------------------------------


class HandoffOpened(Message, tag="opened"):
    """Room is reserved. The first `num_cached_blocks` blocks are pinned and need no computing;
    `num_loaded_blocks` came from the disk for it.
    `is_whole`: all positions but the last are computed, decode can claim at once."""

    handoff_id: str
    epoch: int
    num_cached_blocks: int
    is_whole: bool = False
    num_loaded_blocks: Count = 0


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
    """The bytes asked for follow as frames, one for each block, each with its digest; or they
    were placed where they were wanted."""

    digests: list[Key]
    encoding: Encoding = ""
    is_placed: bool = False


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
