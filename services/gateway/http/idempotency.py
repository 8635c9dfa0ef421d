"""Idempotency-Key: the same request with the same key gets the same answer, from any gateway.

Nothing is stored. The request's id and the seeds of its choices follow from tenant, key, model and
body, and tokens follow from prompt and seeds. See docs/decisions/idempotency.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from kvbaton.errors import InvalidRequestError

HEADER = "Idempotency-Key"
MAX_KEY_CHARS = 255


def read_key(values: Sequence[str]) -> str | None:
    """The key among a request's headers. Raises InvalidRequestError for one that is none."""
    if not values:
        return None
    if len(values) > 1:
        raise InvalidRequestError(f"{HEADER} is given {len(values)} times", field=HEADER)
    key = values[0]
    if not (1 <= len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        raise InvalidRequestError(
            f"{HEADER} has 1 to {MAX_KEY_CHARS} printable ASCII characters", field=HEADER
        )
    return key


class DerivedRng:
    """Implements common.seams.Rng for one request: ids and seeds that every gateway draws alike."""

    def __init__(self, *, tenant: str, key: str, model: str, body: bytes) -> None:
        digest = hashlib.blake2b(digest_size=32, person=b"kvbaton-idem-1")
        for part in (tenant.encode(), key.encode(), model.encode(), body):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
        self._root = digest.digest()
        self._num_drawn = 0

    def new_id(self) -> str:
        return self._draw(b"id", 16).hex()

    def new_seed(self) -> int:
        return int.from_bytes(self._draw(b"seed", 8), "big") >> 1

    def _draw(self, purpose: bytes, num_bytes: int) -> bytes:
        self._num_drawn += 1
        data = purpose + self._num_drawn.to_bytes(8, "big")
        return hashlib.blake2b(data, key=self._root, digest_size=num_bytes).digest()
