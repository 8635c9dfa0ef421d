"""`scripts/keygen`: makes a cluster's keys, or one more client's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.net.access import PUBLIC_FILE
from kvbaton.keys import KeyFileError
from scripts.cluster.keys import add_client, make_keys
from scripts.cluster.ports import ClusterError

EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/keygen",
        description="Make the keys of a cluster: one file for each secret, readable by you alone, "
        "and public.json, which every process needs beside its own.",
        epilog="Each service reads its file and public.json from the folder given by --keys.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="must not exist yet")
    parser.add_argument("--client", metavar="NAME", help="add a client's key to the keys in DIR")
    parser.add_argument("--tenant", metavar="TENANT", default="", help="whose that client is")
    options = parser.parse_args(argv)
    try:
        if options.client is not None:
            print(add_client(options.folder, options.client, options.tenant))
            print(f"restart the gateways with the new {PUBLIC_FILE}", file=sys.stderr)
        elif options.tenant:
            raise ClusterError("--tenant goes with --client")
        elif not make_keys(options.folder):
            raise ClusterError(f"{options.folder} is there already: keys are never overwritten")
    except (ClusterError, KeyFileError, OSError) as error:
        print(f"scripts/keygen: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
