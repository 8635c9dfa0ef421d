"""Messages of every kind, right in shape, with values drawn by chance."""

from __future__ import annotations

import string
from collections.abc import Sequence
from random import Random
from typing import Any

from msgspec import inspect

from common.messages import FromStore, FromWorker, ToStore, ToWorker
from kvbaton.operations import LOG_LEVEL_PATTERN
from kvbaton.protocol import ClientMessage, GatewayMessage
from kvbaton.traceparent import PATTERN as TRACEPARENT

# What each decoder of the project takes.
UNIONS: dict[str, Any] = {
    "client": ClientMessage,
    "gateway": GatewayMessage,
    "to_store": ToStore,
    "from_store": FromStore,
    "to_worker": ToWorker,
    "from_worker": FromWorker,
}

_PATTERNS = {
    "^([0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?$": ["", f"00-{'a' * 32}-{'b' * 16}-01"],
    "^[0-9a-f]{32}$": ["0" * 32, "e" * 32, "0123456789abcdef0123456789abcdef"],
    "^(gateway|prefill|decode)$": ["gateway", "prefill", "decode"],
    "^(auto|shm|zmq)$": ["auto", "shm", "zmq"],
    "^(|planes|int8)$": ["", "planes", "int8"],
    LOG_LEVEL_PATTERN: ["debug", "info", "warning", "error"],
    "^(bfloat16|float16|float32|uint8|int8)$": ["bfloat16", "float16", "float32", "uint8", "int8"],
    TRACEPARENT: ["", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
}
_INTEGERS = [0, 1, 2, 3, 16, 127, 128, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1, -1, -(2**63)]
_FLOATS = [0.0, 0.5, 1.0, -1.0, 1e308, 5e-324, float("inf"), float("-inf"), float("nan")]
_ANYTHING = [None, True, -1, 0.5, "", "ö", b"\xff", [], [[1], {}], {"type": {"x": [None]}}]
_MAX_ITEMS = 4

Fields = dict[str, Any]


def kinds(union: Any) -> list[inspect.StructType]:
    """The messages of a union, by their types."""
    info = inspect.type_info(union)
    members: Sequence[inspect.Type] = info.types if isinstance(info, inspect.UnionType) else [info]
    return [each for each in members if isinstance(each, inspect.StructType)]


def sample(kind: inspect.StructType, rng: Random) -> Fields:
    """A message of this kind, as the map that goes over the wire."""
    fields: Fields = {} if kind.tag is None else {str(kind.tag_field): kind.tag}
    for field in kind.fields:
        if field.required or rng.random() < 0.6:
            fields[field.encode_name] = _value(field.type, rng)
    return fields


def _value(kind: inspect.Type, rng: Random) -> Any:
    match kind:
        case inspect.StructType():
            value: Any = sample(kind, rng)
        case inspect.UnionType():
            value = _value(rng.choice(kind.types), rng)
        case inspect.ListType():
            value = [_value(kind.item_type, rng) for _ in range(rng.randrange(_MAX_ITEMS))]
        case inspect.TupleType():
            value = [_value(each, rng) for each in kind.item_types]
        case inspect.DictType():
            keys = [str(_value(kind.key_type, rng)) for _ in range(rng.randrange(_MAX_ITEMS))]
            value = {key: _value(kind.value_type, rng) for key in keys}
        case inspect.AnyType():
            value = rng.choice(_ANYTHING)
        case inspect.StrType(pattern=str(pattern)):
            value = rng.choice(_PATTERNS[pattern])
        case _:
            value = _scalar(kind, rng)
    return value


def _scalar(kind: inspect.Type, rng: Random) -> Any:
    match kind:
        case inspect.NoneType():
            return None
        case inspect.StrType():
            return _text(rng)
        case inspect.BytesType():
            return rng.randbytes(rng.choice([0, 1, 16, 32]))
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.IntType(ge=low, le=high):
            return rng.choice([each for each in _INTEGERS if _is_within(each, low, high)])
    assert isinstance(kind, inspect.FloatType), f"no samples of {kind}"
    return rng.choice([each for each in _FLOATS if _is_within(each, kind.ge, kind.le)])


def _is_within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _text(rng: Random) -> str:
    return "".join(rng.choices(string.printable + "\0ö€😀\ufffe", k=rng.choice([0, 1, 3, 12])))
