"""What every message of the client protocol has in common."""

from __future__ import annotations

import msgspec


class WireMessage(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True, tag_field="type"):
    """A message; unknown keys are ignored, so that a newer peer may add fields."""
