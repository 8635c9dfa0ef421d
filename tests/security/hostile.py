"""Bytes that no honest peer sends: messages that were changed, in their fields or their bytes.

Everything comes from a seed, so that an input that does harm can be had again.
"""

from __future__ import annotations

from random import Random
from typing import Any

import msgpack

from tests.security.samples import UNIONS, Fields, kinds, sample
from tests.wire.golden import CLIENT_MESSAGES, GATEWAY_MESSAGES, golden_bytes

GOLDEN = [golden_bytes(name) for name in (*CLIENT_MESSAGES, *GATEWAY_MESSAGES)]
MAX_INPUT_BYTES = 4096

_KINDS = {name: kinds(union) for name, union in UNIONS.items()}
# What msgpack reads a size from, and sizes that the message does not have.
_OPENINGS = b"\xc4\xc5\xc6\xc7\xc8\xc9\xd9\xda\xdb\xdc\xdd\xde\xdf\x8f\x9f\xbf"
_WRONG: list[Any] = [
    None,
    True,
    -1,
    2**64 - 1,
    -(2**63),
    float("nan"),
    float("inf"),
    "",
    "x" * 300,
    b"\xff\xfe",
    [],
    [[[[[]]]]],
    [None] * 40,
    {},
    {"type": "hello"},
    msgpack.ExtType(1, b"x"),
    msgpack.Timestamp(1, 2),
]


def message(rng: Random, union: str) -> Fields:
    """One of a union's messages, as the map that goes over the wire."""
    return sample(rng.choice(_KINDS[union]), rng)


def packed(fields: Fields) -> bytes:
    raw: bytes = msgpack.packb(fields)
    return raw


def hostile(rng: Random, union: str) -> bytes:
    """An input for whoever decodes this union: at times a message, mostly something near one."""
    draw = rng.random()
    if draw < 0.05:
        return rng.randbytes(rng.choice([0, 1, 2, 17, 300]))
    if draw < 0.25:
        return with_other_bytes(rng, rng.choice(GOLDEN))
    fields = message(rng, union)
    if draw < 0.35:
        return packed(fields)
    if draw < 0.7:
        return packed(with_wrong_fields(rng, fields))
    return with_other_bytes(rng, packed(fields))


def with_wrong_fields(rng: Random, fields: Fields) -> Fields:
    """The message with values of other types, fields too many, or fields too few."""
    wrong = dict(fields)
    for _ in range(rng.randrange(1, 3)):
        key = rng.choice([*wrong, "type", "id", "call_id", "number", "unknown"])
        if rng.random() < 0.2:
            wrong.pop(key, None)
        elif isinstance(inner := wrong.get(key), dict) and inner and rng.random() < 0.7:
            wrong[key] = with_wrong_fields(rng, inner)
        else:
            wrong[key] = rng.choice(_WRONG)
    return wrong


def with_other_bytes(rng: Random, raw: bytes) -> bytes:
    """The bytes with some changed, cut out, said twice, or declaring what is not there."""
    changed = bytearray(raw)
    for _ in range(rng.randrange(1, 5)):
        start = rng.randrange(len(changed) + 1)
        end = min(len(changed), start + rng.choice([1, 1, 2, 4, 16]))
        match rng.randrange(5):
            case 0:
                changed[start:end] = rng.randbytes(end - start)
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = changed[start:end] * rng.randrange(1, 9)
            case 3:
                changed[start:end] = bytes([rng.choice(_OPENINGS)]) + rng.choice(
                    [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x10\x00\x00", b"\x00"]
                )
            case _:
                changed = changed[:start]
    return bytes(changed[:MAX_INPUT_BYTES])
