"""What the doctor has to say: one thing each, with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """`level` is ok, warning (it runs, but worse than it could) or error (it will not run).
    `remedy` says what to do; "" where all is well."""

    level: str
    subject: str
    message: str
    remedy: str = ""
