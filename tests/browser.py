"""Chromium, where one is installed, for tests of the page."""

from __future__ import annotations

from pathlib import Path

import pytest

_PLACES = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
CHROMIUM = next((place for place in _PLACES if Path(place).exists()), "")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
needs_chromium = pytest.mark.skipif(
    not CHROMIUM, reason=f"no browser at any of {', '.join(_PLACES)}: apt install chromium"
)
