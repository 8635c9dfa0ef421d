"""The secret that block keys are made with: without it no key would match after a restart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import structlog
import xxhash

from common.seams import Files
from services.kvstore.disk.format import segment_number

log = structlog.get_logger()

_NAME = "secret"
_MOST_BYTES = 4096


async def load_or_make_secret(files: Files, folder: str, make: Callable[[], bytes]) -> bytes:
    """The folder's secret; a new one if there is none or it is damaged.

    Blocks stored under another secret cannot be found any more: they are removed. On a disk that
    fails the new secret holds until the store ends. Raises StartError if the folder cannot be had.
    """
    await files.run(partial(files.lock_folder, folder))
    path = f"{folder}/{_NAME}"
    try:
        secret = await files.run(partial(_load, files, path))
    except OSError as error:  # it may be there yet, and what was stored under it of use again
        log.warning("disk_secret_not_read", folder=folder, reason=str(error))
        return make()
    if secret is not None:
        return secret
    secret = make()
    try:
        await files.run(partial(_replace, files, folder, path, secret))
    except OSError as error:
        log.warning("disk_secret_not_saved", folder=folder, reason=str(error))
    return secret


def _load(files: Files, path: str) -> bytes | None:
    content = memoryview(bytearray(_MOST_BYTES))
    try:
        num_bytes = files.read(path, 0, [content])
    except FileNotFoundError:
        return None
    stored, _, checksum = bytes(content[:num_bytes]).partition(b" ")
    if checksum != _checksum(stored):
        return None
    return bytes.fromhex(stored.decode())


def _replace(files: Files, folder: str, path: str, secret: bytes) -> None:
    # Blocks first: a crash in between leaves no blocks that the new secret seems to belong to.
    for name in files.list_folder(folder):
        if segment_number(name) is not None:
            files.remove(f"{folder}/{name}")
    stored = secret.hex().encode()
    files.save(path, stored + b" " + _checksum(stored))


def _checksum(stored: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(stored).encode()
