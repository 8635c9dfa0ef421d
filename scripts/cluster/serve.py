"""`scripts/serve`: runs a whole cluster on this host, shows that it works, and ends it in order."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from honcho.environ import parse as parse_env_file

from common.kv.arena import LiveDisk
from kvbaton.errors import KvbatonError
from scripts.cluster.config_file import CONFIG_VARIABLE, check_file, unknown_variables
from scripts.cluster.honcho import Honcho
from scripts.cluster.identity import KEYS_FOLDER, ROOT
from scripts.cluster.keys import make_keys
from scripts.cluster.options import Plan, parse_plan
from scripts.cluster.ports import ClusterError
from scripts.cluster.processes import signal_descriptor
from scripts.cluster.ready import StartError, check_ports, wait_until_ready
from scripts.cluster.sample import show_hints, show_sample
from scripts.cluster.terminal import RED, LogLine, Screen

EXIT_USAGE = 2
DEFAULT_ARENA_DIR = "/dev/shm"  # noqa: S108 the kvstore's own default
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked for the end; no handler of errors in between may swallow it."""


def _stop_on_signals() -> int:
    """Raise Stopped at the first signal; from then on the end is under way.

    Returns what can be read from then on, for who waits without an end: Python sees a signal that
    comes just before a system call only after it, and drops what is raised in a finaliser.
    """

    def on_signal(_signum: int, _frame: FrameType | None) -> None:
        _ignore_signals()
        raise Stopped

    stopped = signal_descriptor()
    for signum in _STOP_SIGNALS:
        under_nohup = signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN
        if not under_nohup:
            signal.signal(signum, on_signal)
    return stopped


def _ignore_signals() -> None:
    for signum in _STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def serve(plan: Plan, screen: Screen, stopped: int) -> int:
    """Run the cluster until a signal, from when on `stopped` can be read, or a failure. Returns the
    exit status."""

    is_ending = False

    def on_line(line: LogLine) -> None:
        expected = is_ending and line.level == "warning"  # of those that see others go first
        if plan.verbose or (line.is_important and not expected):
            screen.log(line.render(screen))

    honcho = Honcho(plan, on_line)
    try:
        return _run(honcho, plan, screen, stopped)
    except Stopped:
        return 0
    finally:
        is_ending = True
        _ignore_signals()
        _end(honcho, plan, screen)


def _run(honcho: Honcho, plan: Plan, screen: Screen, stopped: int) -> int:
    try:
        counts = ", ".join(f"{count} {role}" for role, count in plan.counts.items() if count)
        screen.line(f"kvbaton: {counts}")
        honcho.start()
        elapsed_s = wait_until_ready(plan, honcho, screen)
        screen.line(f"ready after {elapsed_s:.1f} s")
        if plan.sample:
            with screen.without_logs():
                show_sample(plan, screen)
        with screen.without_logs():
            show_hints(plan, screen)
        if ended := honcho.wait(stopped):
            raise StartError(ended)
        raise Stopped
    except (StartError, KvbatonError) as error:
        screen.end_progress()
        screen.line(screen.styled(f"scripts/serve: {error}", RED))
        return 1


def _end(honcho: Honcho, plan: Plan, screen: Screen) -> None:
    with suppress(OSError):  # of a terminal that is gone
        screen.progress("stopping")
    killed = honcho.stop()
    LiveDisk().sweep_arenas(plan.known["kvstore"].get("KVBATON_ARENA_DIR", DEFAULT_ARENA_DIR))
    with suppress(OSError):
        screen.end_progress()
        screen.line("stopped" + (f"; had to kill {len(killed)} processes" if killed else ""))


def _env_file() -> dict[str, str]:
    path = ROOT / ".env"
    return dict(parse_env_file(path.read_text())) if path.exists() else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 after a stop by signal, 1 after a failure, 2 for wrong options."""
    arguments = sys.argv[1:] if argv is None else argv
    num_cores = len(os.sched_getaffinity(0))
    try:
        file = _env_file()
        plan = parse_plan(arguments, os.environ, file, num_cores)
        if wrong := unknown_variables({**file, **os.environ}):
            raise ClusterError("; ".join(wrong))
        if path := plan.environ.get(CONFIG_VARIABLE):
            check_file(Path(path))
        check_ports(plan)
        if plan.keys == KEYS_FOLDER:  # other folders are the user's
            make_keys(plan.keys)
    except ClusterError as error:
        print(f"scripts/serve: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"scripts/serve: cannot make keys: {error}", file=sys.stderr)
        return 1
    stopped = _stop_on_signals()
    return serve(plan, Screen(), stopped)


if __name__ == "__main__":
    sys.exit(main())
