"""What a store's journal says of its arena, as bytes and back, and what follows from it. Pure.

The journal lies in shared memory beside the arena, so a store that is killed leaves all that it
wrote, in the order in which it wrote it, the last of it perhaps in part. The next store goes on
from there. It must not find a block by a name that is not what the block holds, nor give one away
that a worker of the dead store, which may not have heard of its death, still writes or reads.

For each block there is a record of what it holds, and a word, which memory takes in one piece, of
its use. Why they can be believed, wherever the store was killed:
- A block's word says that it is being written before the grant is told, until its writer has said
  that it writes no more.
- A record is written in between, when the block is final: while it is torn, the word says yet that
  the block is being written. Then it says that the block is in use.
- It says so again before those who found an unused block are told. Nobody reads unused blocks, the
  others perhaps any worker of the dead store that maps the arena.
- Those workers stand in the journal before their hello is answered, until they have stopped.
- What is damaged fits its checksum by chance only, and then counts as being written.
So final blocks are found again; what may be in use stays as it is until all who may use it have
stopped or are dead; the rest is free.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import msgspec
import xxhash

from common.kv.hashing import KEY_BYTES
from common.kv.layout import KvLayout
from common.messages import Load, Member
from kvbaton.codec import Decoder, encode
from kvbaton.errors import ProtocolError
from services.kvstore.blocks import Block, BlockName, BlockState

VERSION = 1
_MAGIC = b"kvbaton\0"
_SECRET_BYTES = 64
_MOST_NAME_CHARS = 32
_HEADER = struct.Struct(f"<8sIIQ32s{_SECRET_BYTES}s")
_RECORD = struct.Struct(f"<QBBB5x{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}s")
_CHECKSUM_BYTES = 8
_LENGTH_BYTES = 2
_CHECK_BITS = 16
_CHECK_PRIME = 65_521
_VALUE_BITS = 46

HEADER_BYTES = _CHECKSUM_BYTES + _HEADER.size
RECORD_BYTES = _CHECKSUM_BYTES + _RECORD.size
WORKER_BYTES = 512


# What becomes of a block: it may be being written, nothing is in it, it is final and may be being
# read, it is final and nobody reads it. Plain numbers, for enumerations are slow.
WRITTEN, FREE, IN_USE, UNUSED = range(4)


class Word(NamedTuple):
    """Of one block. `value`: since when it is unused, counted by uses; else its stamp, or 0."""

    use: int
    value: int


class Record(NamedTuple):
    """What a final block holds."""

    stamp: int
    name: BlockName


class Header(NamedTuple):
    """What the blocks are of: `model` is a digest of the model and its layout."""

    num_blocks: int
    model: bytes
    secret: bytes  # that block keys are made with


class Worker(msgspec.Struct):
    """A member that maps the arena, and when its process began, by the system's count."""

    member: Member
    started_at: Annotated[int, msgspec.Meta(ge=0)]


_WORKER_DECODER: Decoder[Worker] = Decoder(Worker)


class JournalError(ValueError):
    """The journal cannot be believed."""


# ---- bytes ------------------------------------------------------------------------------------


def _checksum(raw: bytes, place: int) -> bytes:
    return xxhash.xxh3_64_digest(raw, seed=place)


def model_digest(layout: KvLayout, fingerprint: str) -> bytes:
    """Equal for those whose blocks are interchangeable."""
    return hashlib.blake2b(msgspec.json.encode([layout, fingerprint]), digest_size=32).digest()


def pack_header(header: Header) -> bytes:
    """Up to 64 bytes of secret."""
    body = _HEADER.pack(
        _MAGIC, VERSION, len(header.secret), header.num_blocks, header.model, header.secret
    )
    return _checksum(body, 0) + body


def unpack_header(raw: bytes) -> Header | None:
    """None unless it is a whole one of this version."""
    body = raw[_CHECKSUM_BYTES:]
    if len(body) != _HEADER.size or raw[:_CHECKSUM_BYTES] != _checksum(body, 0):
        return None
    magic, version, num_secret, num_blocks, model, secret = _HEADER.unpack(body)
    if (magic, version) != (_MAGIC, VERSION):
        return None
    return Header(num_blocks, model, secret[:num_secret])


def pack_record(block_id: int, stamp: int, name: BlockName) -> bytes:
    """Keys of up to 32 bytes."""
    key, parent, tenant = name
    body = _RECORD.pack(stamp, len(key), len(parent), len(tenant), key, parent, tenant)
    return _checksum(body, block_id) + body


def unpack_record(block_id: int, raw: bytes) -> Record | None:
    """None if it is torn or damaged, or another block's."""
    body = raw[_CHECKSUM_BYTES:]
    if len(body) != _RECORD.size or raw[:_CHECKSUM_BYTES] != _checksum(body, block_id):
        return None
    stamp, num_key, num_parent, num_tenant, key, parent, tenant = _RECORD.unpack(body)
    return Record(stamp, BlockName(key[:num_key], parent[:num_parent], tenant[:num_tenant]))


def pack_word(block_id: int, use: int, value: int) -> int:
    """64 bits. One bit that is damaged is noticed."""
    said = use << _VALUE_BITS | value
    return said << _CHECK_BITS | (said + block_id) % _CHECK_PRIME


def unpack_word(block_id: int, word: int) -> Word:
    """What is damaged may be being written."""
    said = word >> _CHECK_BITS
    use, value = said >> _VALUE_BITS, said & (1 << _VALUE_BITS) - 1
    is_sound = word == pack_word(block_id, use, value)
    return Word(use, value) if is_sound else Word(WRITTEN, 0)


def pack_worker(worker: Worker) -> bytes:
    """Raises ProtocolError if the member says too much of itself."""
    member = worker.member
    slim = msgspec.structs.replace(
        member, name=member.name[:_MOST_NAME_CHARS], fingerprint="", model="", layout=None,
        load=Load(),
    )  # fmt: skip
    said = encode(Worker(slim, worker.started_at))
    most = WORKER_BYTES - _CHECKSUM_BYTES - _LENGTH_BYTES
    if len(said) > most:
        raise ProtocolError(
            f"host_id and endpoint may take about {most} bytes together, a hello takes {len(said)}"
        )
    body = (len(said).to_bytes(_LENGTH_BYTES, "little") + said).ljust(most + _LENGTH_BYTES, b"\0")
    return _checksum(body, 0) + body


def unpack_worker(raw: bytes) -> Worker | None:
    """None for a place that is not taken. Raises JournalError if it cannot be read: then nobody
    knows who may use the arena."""
    if not any(raw):
        return None
    body = raw[_CHECKSUM_BYTES:]
    if len(raw) != WORKER_BYTES or raw[:_CHECKSUM_BYTES] != _checksum(body, 0):
        raise JournalError("a worker's entry is damaged")
    size = int.from_bytes(body[:_LENGTH_BYTES], "little")
    try:
        return _WORKER_DECODER.decode(body[_LENGTH_BYTES : _LENGTH_BYTES + size])
    except ProtocolError as error:
        raise JournalError(error.message) from error


# ---- what follows -----------------------------------------------------------------------------


class Recovered(NamedTuple):
    """The blocks as the next store has them; final ones have one reader, for now.

    `unused` nobody reads, first the one that was used last. `in_use` may be read, and `in_doubt`
    be written, by whoever maps the arena of the dead store.
    """

    blocks: list[Block]
    unused: list[int]
    in_use: list[int]
    in_doubt: list[int]

    def counts(self) -> dict[str, int]:
        """For people."""
        states = Counter(block.state.value for block in self.blocks)
        return {"num_found": len(self.unused) + len(self.in_use), **{
            f"num_{state}": states[state] for state in ("quarantined", "free")
        }}  # fmt: skip


def recover(
    words: Sequence[Word], records: Sequence[Record | None], worker_ids: Sequence[str]
) -> Recovered:
    """What is left of a dead store. `worker_ids`: the members that map its arena, as far as they
    are not known to have stopped."""
    stamps = [record.stamp for record in records if record is not None]
    stamps += [word.value for word in words if word.use in (FREE, WRITTEN)]
    last_stamp = max(stamps, default=0)
    recovered = Recovered([], [], [], [])
    known: set[bytes] = set()
    for block_id, (word, record) in enumerate(zip(words, records, strict=True)):
        block = Block(stamp=last_stamp)
        recovered.blocks.append(block)
        if word.use == FREE:
            block.stamp = word.value
        elif word.use == WRITTEN or record is None or record.name.key in known:
            if worker_ids:
                block.state, block.writer = BlockState.QUARANTINED, worker_ids[0]
                recovered.in_doubt.append(block_id)
        else:
            known.add(record.name.key)
            block.state, block.num_readers = BlockState.COMMITTED, 1
            block.stamp, block.name = record
            is_read = word.use == IN_USE and worker_ids
            (recovered.in_use if is_read else recovered.unused).append(block_id)
    recovered.unused.sort(key=lambda block_id: words[block_id].value or math.inf, reverse=True)
    return recovered
