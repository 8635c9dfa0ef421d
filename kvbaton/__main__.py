"""`python -m kvbaton`: what an operator asks of a running cluster, and has it do.

Exit status: 0 if all is well, 1 if the answer says that it is not (books that do not close, nothing
remembered, a member that could not be told), 2 if the question could not be asked.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence

from kvbaton.commands import books, members
from kvbaton.commands.ask import STDIN, ask
from kvbaton.commands.options import (
    CannotAskError,
    gateway_options,
    key_file,
    keys,
    operator_options,
)
from kvbaton.commands.top import top
from kvbaton.errors import ConnectionLostError, ForbiddenError, KvbatonError

EXIT_CANNOT_ASK = books.EXIT_CANNOT_ASK
EXIT_INTERRUPTED = 130
BENCH = (
    "scripts/bench CASE measures a machine, `scripts/bench --help` lists the cases (in a checkout)"
)

_Command = Callable[[argparse.Namespace], Coroutine[None, None, int]]
_COMMANDS: dict[str, _Command] = {
    "status": members.status,
    "top": top,
    "drain": members.drain,
    "log-level": members.log_level,
    "audit": books.audit,
    "why": books.why,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except KeyboardInterrupt:
        return 0 if options.command == "top" else EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # so that nobody flushes it again
        return EXIT_INTERRUPTED
    except CannotAskError as error:
        reason = str(error)
    except ForbiddenError as error:
        reason = f"{error.message} ({_at_fault(options, error)})"
    except ConnectionLostError as error:
        reason = f"{error.message}: is there a gateway? --gateway names another"
    except KvbatonError as error:
        reason = error.message
    print(f"kvbaton {options.command}: {reason}", file=sys.stderr)
    return EXIT_CANNOT_ASK


def _run(options: argparse.Namespace) -> int:
    if options.command == "bench":
        print(BENCH)
        return 0
    if options.command == "ask":
        return ask(options)
    return asyncio.run(_COMMANDS[options.command](options))


def _at_fault(options: argparse.Namespace, error: ForbiddenError) -> str:
    if error.field == "admin_key":
        return f"the key is from {key_file(options)}"
    return f"the keys are {keys(options) or 'none'}, --keys names others"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvbaton", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    operator = operator_options()

    def add(name: str, what: str, more: str = "") -> argparse.ArgumentParser:
        parents = [gateway_options() if name == "ask" else operator]
        return commands.add_parser(
            name, parents=parents, help=what, description=f"{what}. {more}", allow_abbrev=False
        )

    add("status", "who is there, and how much there is to do", "1: a KV store does not answer.")
    live = add("top", "the same, redrawn until q or Ctrl-C")
    live.add_argument(
        "--interval", metavar="S", type=_positive, default=1.0, help="(default: %(default)g)"
    )
    _add_drain(add("drain", "have a worker hand on what it has, and take nothing new"))
    _add_log_level(add("log-level", "change what a member logs, or all", "1: not all were told."))
    add(
        "audit",
        "whether the books close: every KV block has an owner who agrees",
        "Exits with 0 if the books close, 1 if not, 2 if that could not be found out.",
    )
    _add_why(
        add(
            "why",
            "what happened to a block or a request",
            "Exits with 0 if anything is remembered, 1 if not, 2 if it could not be asked.",
        )
    )
    _add_ask(add("ask", "a completion in the terminal; how fast it came is said on stderr"))
    commands.add_parser("bench", help="where the benchmarks are")
    return parser


def _add_drain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("member", metavar="MEMBER", help="name, or the id or its first 8 digits")
    parser.add_argument("--force", action="store_true", help="also the last one of its role")
    parser.add_argument(
        "--timeout", metavar="S", type=_positive, default=300.0, help="(default: %(default)g)"
    )


def _add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("member", metavar="MEMBER|all", help="name, or the id or its first digits")
    parser.add_argument("level", choices=("debug", "info", "warning", "error"))


def _add_why(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="BLOCK|REQUEST",
        help="a block such as 17, or 1:17 of KV store 1; or a request's or handoff's id",
    )
    parser.add_argument("--request", action="store_true", help="it is a request, also if a number")


def _add_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help=f"the text; {STDIN}: what stdin has")
    parser.add_argument("--chat", action="store_true", help="it is what a user says to the model")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=256)
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0)
    parser.add_argument("--seed", metavar="N", type=int)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
