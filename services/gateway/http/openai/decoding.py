"""JSON to typed values, each wrong value refused by the name of its field."""

from __future__ import annotations

import re
import sys
from typing import TypeVar

import msgspec

from kvbaton.errors import InvalidRequestError

MAX_STRINGS = 64 * 1024  # names included

T = TypeVar("T")

_AT = re.compile(r"(?s)(.*) - at `\$\.?(.*)`$")
_MISSING = re.compile(r"Object missing required field `(\w+)`")


def decode_body(body: bytes, kind: type[T]) -> T:
    """`decode`, once it is sure that the values cannot take much more memory than the text."""
    # Millions of tiny strings would. A quote in a string is escaped; so may a closing one seem,
    # after a backslash: then this finds half of the strings.
    num_quotes = body.count(b'"')
    if num_quotes > 2 * MAX_STRINGS and num_quotes - body.count(b'\\"') > 2 * MAX_STRINGS:
        raise InvalidRequestError(f"the body has more than {MAX_STRINGS} strings and names")
    return decode(body, kind)


def decode(body: bytes | msgspec.Raw, kind: type[T], where: str = "") -> T:
    """The typed value in a JSON text. `where` names the field that the text is the value of.

    Raises InvalidRequestError that names the field, or says why the text is no JSON.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, field = _explain(str(error), where)
        raise InvalidRequestError(message, field=field) from error
    except RecursionError as error:
        limit = sys.getrecursionlimit()  # less what is on the stack already
        raise InvalidRequestError(
            f"the body is nested too deeply, the limit is below {limit} levels"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error


def _explain(message: str, where: str) -> tuple[str, str | None]:
    """msgspec's message as ours, and the name of the field at fault."""
    found = _AT.match(message)
    if found:
        message, path = found.groups()
        where += path if not where or path.startswith("[") or not path else "." + path
    missing = _MISSING.match(message)
    if missing:
        where = f"{where}.{missing[1]}" if where else missing[1]
        return f"{where} is missing", where
    message = message[:1].lower() + message[1:]
    return f"{where or 'the body'}: {message}", where or None
