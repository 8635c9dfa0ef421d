"""Digests of KV blocks: what was moved or read is what was written, or it is not used."""

from __future__ import annotations

import xxhash

DIGEST_BYTES = 16


def block_digest(key: bytes, stamp: int, data: bytes | bytearray | memoryview) -> bytes:
    """xxh3_128 over key, stamp (64 bits, little endian) and bytes.

    The key stands for layout, tenant and tokens, the stamp for one filling of one place. Finds
    accidents; whoever may write the bytes may also write the digest.
    """
    digest = xxhash.xxh3_128(key + stamp.to_bytes(8, "little"))
    digest.update(data)
    return digest.digest()
