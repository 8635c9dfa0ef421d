"""`scripts/apikey`: makes an API key for the HTTP face of gateways."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from common.config import StartError
from services.gateway.access.api_keys import Entry, add_key

EXIT_FAILED = 1
_LIMITS = ("requests-per-minute", "tokens-per-minute", "tokens-per-day")
_TARGETS = ("ttft-target-ms", "tpot-target-ms")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/apikey",
        description="Make an API key, and add its hash to FILE, which is made if need be. The key "
        "is printed, and is nowhere else.",
        epilog="Gateways read the file when they start: --api-keys FILE.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--name", required=True, help="who has the key, for people")
    parser.add_argument("--tenant", required=True, help="tenants share nothing with each other")
    for limit in _LIMITS:
        parser.add_argument(f"--{limit}", type=int, metavar="N", help="default: no limit")
    for target in _TARGETS:
        parser.add_argument(f"--{target}", type=float, metavar="MS", help="default: the server's")
    parser.add_argument(
        "--share-cache-with", metavar="TENANT", help="share the cached prompts of another tenant"
    )
    parser.add_argument("--operator", action="store_true", help="may read /metrics")
    values = vars(parser.parse_args(argv))
    file = values.pop("file")
    try:
        entry = msgspec.convert({**values, "sha256": "0" * 64}, Entry)
        print(add_key(file, entry))
    except (StartError, OSError, msgspec.ValidationError) as error:
        print(f"scripts/apikey: {error}", file=sys.stderr)
        return EXIT_FAILED
    print("start the gateways again to let it in", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
