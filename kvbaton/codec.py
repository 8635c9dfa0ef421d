"""One MessagePack map per message: bounded, unpacked with msgpack, checked against typed structs.

Nothing here names a class from the wire: a closed union of tagged structs is given by the caller.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgpack
import msgspec

from kvbaton.errors import ProtocolError

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_ITEMS = 4 * 1024 * 1024  # of one array; an item costs at least a byte on the wire
MAX_MAP_ITEMS = 1024

T = TypeVar("T")


def encode(message: msgspec.Struct) -> bytes:
    """The message as one MessagePack map with its tag under `type`. bytes stay bytes, and all keys
    are strings: a number as a key is written in decimal digits."""
    values = msgspec.to_builtins(message, builtin_types=(bytes,), str_keys=True)
    packed: bytes = msgpack.packb(values)
    return packed


def _refuse_extension(code: int, _data: bytes) -> Any:
    raise ProtocolError(f"extension type {code} is not part of this protocol")


class Decoder(Generic[T]):
    """Decodes bytes into one of a closed union of message structs.

    Size is checked before anything is read; msgpack refuses arrays, maps and strings that declare
    more than the message could hold, maps whose keys are not strings, and nesting beyond its fixed
    stack. Raises ProtocolError, with the reason, for anything that is not exactly such a message.
    """

    def __init__(self, union: Any, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        # msgspec keeps what it knows of a struct, but looks at a bare union anew for each message.
        self._boxed = msgspec.defstruct("Boxed", [("message", union)], array_like=True)
        self._max_bytes = max_bytes

    def decode(self, raw: bytes | memoryview) -> T:
        size = len(raw)
        if size > self._max_bytes:
            raise ProtocolError(f"message of {size} bytes exceeds the limit of {self._max_bytes}")
        try:
            value = msgpack.unpackb(
                raw,
                raw=False,
                strict_map_key=True,
                ext_hook=_refuse_extension,
                max_str_len=size,
                max_bin_len=size,
                max_array_len=min(size, MAX_ITEMS),
                max_map_len=min(size, MAX_MAP_ITEMS),
                max_ext_len=0,
            )
            boxed: Any = msgspec.convert([value], self._boxed, str_keys=True)
            message: T = boxed.message
        except ProtocolError:
            raise
        except (ValueError, TypeError, msgspec.ValidationError, RecursionError) as error:
            # msgpack's own exceptions are ValueErrors, but for a few that leak as TypeError.
            reason = str(error).replace("`$[0]", "`$")  # the box is ours, not the sender's
            raise ProtocolError(f"not a message of this protocol: {reason}") from error
        return message
