"""The `traceparent` of W3C Trace Context: which trace a request belongs to, across processes."""

from __future__ import annotations

import re

PATTERN = "^([0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?$"  # "" for none
_MAX_CHARS = 512
_VERSION_0 = 55  # characters
_FORM = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def read_traceparent(given: str | None) -> str:
    """What was given, if it is valid, else "": who gets a broken one begins a new trace, as the
    standard says. A later version may have more after it, which is left off."""
    if given is None or len(given) > _MAX_CHARS:
        return ""
    found = _FORM.match(given)
    if found is None or (len(given) > _VERSION_0 and (found[1] == "00" or given[55] != "-")):
        return ""
    return found[0]


def trace_id(traceparent: str) -> str:
    """32 hexadecimal digits; "" if there is none."""
    return traceparent[3:35]
