"""The keeper: runs one service, starts it again when it crashes, and ends with what started it.

`python -m scripts.cluster.keeper ROLE [flags of the service]`; scripts/keep is its short form. It
sleeps in one poll() until there is something to do, and imports little: one runs per service.
docs/decisions/keeper.md says why honcho needs it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from scripts.cluster.admin_key import ADMIN_KEY_FILE, VARIABLE, make_admin_key
from scripts.cluster.config_file import with_file
from scripts.cluster.identity import KEYS_FOLDER, KEYS_VARIABLE, identify, service_settings
from scripts.cluster.ports import ClusterError
from scripts.cluster.processes import (
    die_with_parent,
    process_info,
    readable,
    signal_descriptor,
)

# The service may drain for 3.5 s (common/service.py); honcho kills 5 s after the first has stopped.
STOP_TIMEOUT_S = 3.8
EXIT_USAGE = 2
FINAL_STATUSES = (EXIT_USAGE, os.EX_CONFIG)
CRASHED = "service_crashed"
MISCONFIGURED = "service_misconfigured"

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MEANINGS = {
    signal.SIGKILL: "by hand, or because memory ran out",
    signal.SIGSEGV: "it touched memory that is not its own",
    signal.SIGBUS: "shared memory it uses is gone or full",
    signal.SIGABRT: "it gave up",
}


class Backoff:
    """Seconds to wait before each restart: doubling, and short again after a good life."""

    def __init__(
        self, first_s: float = 0.5, longest_s: float = 10.0, good_life_s: float = 30.0
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._good_life_s = good_life_s
        self._next_s = first_s

    def after(self, lived_s: float) -> float:
        """The wait after a service that lived for `lived_s`."""
        if lived_s >= self._good_life_s:
            self._next_s = self._first_s
        delay_s = self._next_s
        self._next_s = min(2 * delay_s, self._longest_s)
        return delay_s


def describe_exit(code: int) -> str:
    """An exit code (negative: a signal, as in subprocess) in words."""
    if code >= 0:
        return f"ended with status {code}"
    signum = -code
    name = signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"
    meaning = _MEANINGS.get(signum)  # type: ignore[call-overload]
    return f"was killed by {name}" + (f" ({meaning})" if meaning else "")


class Log:
    """The keeper's own lines, in the form that common/log.py gives those of the service."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, level: str, event: str, message: str) -> None:
        if sys.stderr.isatty():
            line = f"{self._name}: {message}"
        else:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            fields = {"service": self._name, "message": message, "event": event}
            line = json.dumps(fields | {"level": level, "timestamp": now})
        print(line, file=sys.stderr, flush=True)


class Reasons:
    """Waits, and says why to stop: a signal, or the end of honcho."""

    def __init__(self, honcho: int | None) -> None:
        self._signals = signal_descriptor()
        for signum in _STOP_SIGNALS:
            signal.signal(signum, lambda *_: None)
        self._honcho = os.pidfd_open(honcho) if honcho else None

    def wait(self, child: int | None = None, timeout_s: float | None = None) -> str:
        """The reason to stop; "" when the process of the pidfd `child` ended or time is up."""
        descriptors = [self._signals, self._honcho, child]
        ready = readable([fd for fd in descriptors if fd is not None], timeout_s)
        if self._signals in ready:
            return f"got {signal.Signals(os.read(self._signals, 1)[0]).name}"
        return "honcho is gone" if self._honcho in ready else ""


class Child:
    """The running service, in a process group of its own: a signal to the keeper's group must reach
    it once, from the keeper."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        keeper = os.getpid()
        # Until it is the service, the child has our handlers, and a signal would be lost on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        self._pid = os.fork()
        if self._pid == 0:
            _become(command, environ, keeper)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        self.pidfd = os.pidfd_open(self._pid)

    def reap(self) -> int:
        """Wait for its end. Returns its exit code, negative for a signal."""
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def stop(self, timeout_s: float) -> tuple[int, bool]:
        """SIGTERM, and SIGKILL after `timeout_s`. Returns the exit code, and whether it obeyed."""
        os.kill(self._pid, signal.SIGTERM)
        in_time = bool(readable([self.pidfd], timeout_s))
        if not in_time:
            os.killpg(self._pid, signal.SIGKILL)
        return self.reap(), in_time


def _become(command: Sequence[str], environ: Mapping[str, str], keeper: int) -> NoReturn:
    """In the forked child: turn into the service."""
    try:
        os.setpgid(0, 0)
        die_with_parent(signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)
        for signum in (signal.SIGPIPE, *_STOP_SIGNALS):
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execve(command[0], list(command), environ)  # noqa: S606
    except BaseException as error:
        print(f"cannot run {command[0]}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(os.EX_CONFIG)


def keep(
    command: Sequence[str],
    environ: Mapping[str, str],
    reasons: Reasons,
    log: Log,
    *,
    backoff: Backoff,
    stop_timeout_s: float = STOP_TIMEOUT_S,
) -> int:
    """Run `command`, again and again, until there is a reason to stop. Returns the exit status."""
    while True:
        started_at = time.monotonic()
        child = Child(command, environ)
        if why := reasons.wait(child.pidfd):
            return _stop(child, why, log, stop_timeout_s)
        code = child.reap()
        if code in FINAL_STATUSES:
            log("error", MISCONFIGURED, f"{describe_exit(code)}: its settings are wrong")
            return code
        delay_s = backoff.after(time.monotonic() - started_at)
        log("warning", CRASHED, f"{describe_exit(code)}; starting it again in {delay_s:g} s")
        if reasons.wait(timeout_s=delay_s):
            return 0


def _stop(child: Child, why: str, log: Log, timeout_s: float) -> int:
    code, in_time = child.stop(timeout_s)
    if not in_time:
        log("warning", "service_killed", f"{why}; not done in {timeout_s:g} s, so killed")
        return 1
    if code > 0:
        log("warning", "service_failed", f"{why}; {describe_exit(code)} while stopping")
    return 1 if code > 0 else 0  # a service that is still starting ends by the signal itself


def honcho_above(environ: Mapping[str, str]) -> int | None:
    """honcho's pid. It is our grandparent: the parent passes our output on to it, and lives on when
    honcho is killed."""
    parent = process_info(os.getppid())
    if "HONCHO_PROCESS_NAME" not in environ or parent is None:
        return None
    return parent.parent or None


def admin_key_setting(path: Path, log: Log) -> dict[str, str]:
    """The setting that gives a gateway its admin key. It serves without, if none can be made."""
    try:
        make_admin_key(path)
    except OSError as error:
        log("warning", "no_admin_key", f"no audit and no why: cannot make {path}: {error.strerror}")
        return {}
    return {VARIABLE: str(path)}


def make_missing_keys(settings: Mapping[str, str], log: Log) -> None:
    """Make the keys of this checkout's clusters, unless they are there or others are named. Without
    keys the service refuses to start."""
    if settings.get(KEYS_VARIABLE) != str(KEYS_FOLDER) or KEYS_FOLDER.exists():
        return
    from scripts.cluster.keys import make_keys  # needs what a keeper can do without

    try:
        make_keys(KEYS_FOLDER)
    except OSError as error:
        log("error", "no_keys", f"cannot make {KEYS_FOLDER}: {error.strerror}")


def main(argv: Sequence[str]) -> int:
    """Run the service named by the first argument; the others are its flags."""
    die_with_parent(signal.SIGTERM)
    try:
        identity = identify(argv[0] if argv else "", os.environ)
        known = with_file(identity.role, os.environ)
        settings = service_settings(identity, known)
    except ClusterError as error:
        Log("keeper")("error", MISCONFIGURED, str(error))
        return os.EX_CONFIG
    command = [sys.executable, "-m", f"services.{identity.role}", *argv[1:]]
    reasons = Reasons(honcho_above(os.environ))
    log = Log(identity.name)
    make_missing_keys(settings, log)
    if identity.role == "gateway" and VARIABLE not in known:
        settings |= admin_key_setting(ADMIN_KEY_FILE, log)
    return keep(command, os.environ | settings, reasons, log, backoff=Backoff())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
