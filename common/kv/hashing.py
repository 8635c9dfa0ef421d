"""Chained block keys: a key names a block's tokens and everything before them, within one tenant.

Two blocks have equal keys only if tenant, model fingerprint, salt and all tokens up to the block's
end are equal. The root is keyed, so keys cannot be predicted by a tenant who does not know it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 32


def root_key(secret: bytes, tenant: str, fingerprint: str, salt: str = "") -> bytes:
    """The parent of a prompt's first block key.

    `secret` is the cluster's (up to 64 bytes). Fields are length-prefixed, so that they cannot be
    shifted into one another.
    """
    digest = hashlib.blake2b(key=secret, digest_size=KEY_BYTES)
    for part in (tenant, fingerprint, salt):
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def tenant_tag(secret: bytes, tenant: str) -> bytes:
    """Names a tenant to the store, which counts its share of the cache, without telling who."""
    return hashlib.blake2b(tenant.encode(), key=secret, digest_size=16).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block with these tokens after `parent`."""
    return hashlib.blake2b(parent + array("I", tokens).tobytes(), digest_size=KEY_BYTES).digest()


def prompt_keys(root: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """The keys of every full block of `tokens`, first to last."""
    keys = []
    parent = root
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = block_key(parent, tokens[start : start + block_size])
        keys.append(parent)
    return keys
