"""kvbaton: the client of a prefill-decode disaggregated language-model server.

The clients are loaded when they are first asked for: the services use this package for its messages
alone, and their pure parts must not bring sockets with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbaton.client import AsyncClient as AsyncClient
    from kvbaton.client import AsyncGeneration as AsyncGeneration
    from kvbaton.sync_client import Client as Client
    from kvbaton.sync_client import Generation as Generation

_HOMES = {
    "AsyncClient": "kvbaton.client",
    "AsyncGeneration": "kvbaton.client",
    "Client": "kvbaton.sync_client",
    "Generation": "kvbaton.sync_client",
}
__all__ = ["AsyncClient", "AsyncGeneration", "Client", "Generation"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
