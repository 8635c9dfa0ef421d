"""The admin key of the clusters of this checkout: made when it is first needed, kept for good.

Gateways are given it unless KVBATON_ADMIN_KEY_FILE names another. In the folder of the checkout
`python -m kvbaton audit` finds it by itself.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "KVBATON_ADMIN_KEY_FILE"
ADMIN_KEY_FILE = ROOT / ".run" / "admin-key"


def admin_key_file(environ: Mapping[str, str]) -> Path | None:
    """Where the gateways of a cluster with this environment have their admin key; None if they are
    to have none. Services run in the folder of the checkout."""
    named = environ.get(VARIABLE, str(ADMIN_KEY_FILE))
    return ROOT / named if named else None


def make_admin_key(path: Path) -> None:
    """Make a key for this user alone, unless there is one. Raises OSError.

    It appears whole or not at all, also when several gateways start at once.
    """
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        with suppress(FileExistsError):
            path.hardlink_to(unfinished)
    finally:
        unfinished.unlink()
