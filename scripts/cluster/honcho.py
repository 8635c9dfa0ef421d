"""honcho as a child: it starts the services and passes on what they print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from scripts.cluster.identity import ROOT
from scripts.cluster.keeper import CRASHED, MISCONFIGURED
from scripts.cluster.options import Plan
from scripts.cluster.processes import (
    adopt_orphans,
    descendants,
    die_with_parent,
    kill_descendants,
    wait_for_descendants,
    wait_for_end,
)
from scripts.cluster.terminal import LogLine

STOP_TIMEOUT_S = 4.0  # a keeper kills its service after 3.8 s
KILL_TIMEOUT_S = 0.8


class Honcho:
    """The running cluster. This process becomes the parent of whatever honcho may leave behind."""

    def __init__(self, plan: Plan, on_line: Callable[[LogLine], None]) -> None:
        self._plan = plan
        self._on_line = on_line
        self._trouble = threading.Event()
        self._reasons: dict[str, str] = {}  # the last of each kind of crash
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Start honcho. If it is interrupted, `stop` ends what was started."""
        adopt_orphans()
        self._process = subprocess.Popen(
            _command(self._plan),
            cwd=ROOT,
            env=self._plan.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C is for us alone
            preexec_fn=lambda: die_with_parent(signal.SIGKILL),  # noqa: PLW1509 no thread yet
        )
        assert self._process.stdout is not None
        output = self._process.stdout
        self._reader = threading.Thread(target=self._read, args=[output], daemon=True)
        self._reader.start()

    def crash(self, timeout_s: float) -> str:
        """What crashed, as soon as something does; "" if nothing has after `timeout_s`."""
        self._trouble.wait(timeout_s)
        ended = self._process.poll() is not None
        return next(iter(self._reasons.values()), "honcho ended" if ended else "")

    def wait(self, stopped: int) -> str:
        """Wait for honcho's end, which comes when one of its processes ends; returns the reason, ""
        if the descriptor `stopped` can be read first."""
        if not wait_for_end(self._process.pid, stopped):
            return ""
        self._process.wait()
        return self._reasons.get(MISCONFIGURED, "honcho ended")

    def stop(self) -> list[int]:
        """End every process. Returns the ids of those that had to be killed.

        The leaders of honcho's sessions are told by us: honcho may be gone, and fails at a signal
        that it gets while it starts. When one of them has ended it does the same itself.
        """
        processes = descendants(os.getpid())
        leaders = [info for info in processes if info.session == info.pid]
        for info in leaders or processes:
            with suppress(ProcessLookupError):
                os.kill(info.pid, signal.SIGTERM)
        wait_for_descendants(STOP_TIMEOUT_S)
        killed = kill_descendants(KILL_TIMEOUT_S)
        if self._reader is not None:
            self._reader.join(KILL_TIMEOUT_S)
        return killed

    def _read(self, lines: IO[str]) -> None:
        with lines:
            for raw in lines:
                line = LogLine(raw.rstrip("\n"))
                try:
                    self._on_line(line)
                except OSError:  # nobody can read us any more
                    os.kill(os.getpid(), signal.SIGHUP)
                event = line.fields.get("event", "")
                if event in (CRASHED, MISCONFIGURED):
                    self._reasons[event] = f"{line.process}: {line.fields['message']}"
                    self._trouble.set()
        self._trouble.set()


def _command(plan: Plan) -> list[str]:
    """honcho's command line. Its own reading of .env would win over our flags."""
    counts = ",".join(f"{role}={count}" for role, count in plan.counts.items())
    honcho = [sys.executable, "-m", "honcho", "start", "--no-colour", "--env", os.devnull]
    return [*honcho, "--procfile", str(plan.procfile), "--concurrency", counts]
