"""Runs installed units without systemd: their commands, settings, credentials and sockets.

What systemd does with namespaces is not done. That no memory is writable and executable is, where
the kernel can (PR_SET_MDWE), and so is the filter of system calls, where libseccomp is.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import socket
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from scripts.host.env_files import parse_env
from tests.packaging.filters import can_filter, filter_of
from tests.supervisor import Supervisor

WATCHDOG_US = 4_000_000
_PR_SET_MDWE, _REFUSE_EXEC_GAIN = 65, 1
_LIBC = ctypes.CDLL(None)
_WITH_SOCKET = 'exec 3<&"$1"; shift; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'

Settings = dict[str, list[str]]


def read_unit(path: Path) -> Settings:
    """Every value of every key; an empty one clears those before it."""
    values: Settings = defaultdict(list)
    for line in path.read_text().splitlines():
        key, assigned, value = line.partition("=")
        if not assigned or line.startswith(("#", ";", "[")):
            continue
        assert not value.endswith("\\"), f"{path}: {line}"
        values[key] = [*values[key], value] if value else []
    return values


class Installed:
    """What was installed below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.units = root / "etc/systemd/system"

    def moved(self, text: str) -> str:
        """Absolute paths where they are now."""
        return re.sub(r"(?<![\w/.])/(?=(opt|etc|var)/)", f"{self.root}/", text)

    def unit(self, role: str) -> Settings:
        """A service's own settings, and above them those of all."""
        values = read_unit(self.units / f"kvbaton-{role}@.service")
        for part in sorted((self.units / "kvbaton-.service.d").iterdir()):
            for key, more in read_unit(part).items():
                values[key] = [*values[key], *more]
        return values

    def listener(self) -> socket.socket:
        """As the socket unit asks for it."""
        (address,) = read_unit(self.units / "kvbaton-gateway.socket")["ListenStream"]
        host, _, port = address.rpartition(":")
        return socket.create_server((host, int(port)))


class Process:
    """One instance of a service, as its unit says it is to run."""

    def __init__(
        self,
        installed: Installed,
        role: str,
        number: int,
        *,
        listener: socket.socket | None = None,
        popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
    ) -> None:
        unit = installed.unit(role)
        self.name = f"{role}-{number}"
        run = installed.root / "run" / self.name
        run.mkdir(parents=True, exist_ok=True)
        self.supervisor = Supervisor(str(run / "notify"))
        self.log = run / "log"
        environ = self._environ(installed, unit, number)
        environ["CREDENTIALS_DIRECTORY"] = str(self._credentials(installed, unit, run))
        assert unit["Type"] == ["notify"]
        assert unit["WatchdogSec"]
        environ |= {"NOTIFY_SOCKET": self.supervisor.address, "WATCHDOG_USEC": str(WATCHDOG_US)}
        (command,) = unit["ExecStart"]
        words = [self._expanded(word, environ) for word in shlex.split(installed.moved(command))]
        if listener is not None:
            assert unit["Sockets"] == ["kvbaton-gateway.socket"]
            words = ["bash", "-c", _WITH_SOCKET, "bash", str(listener.fileno()), *words]
        before = [_deny_write_execute] if unit["MemoryDenyWriteExecute"] == ["yes"] else []
        before += [filter_of(unit["SystemCallFilter"])] if can_filter() else []
        with self.log.open("ab") as log:
            self._process = popen(
                words,
                cwd=installed.moved(unit["WorkingDirectory"][-1]),
                env=environ,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[] if listener is None else [listener.fileno()],
                preexec_fn=lambda: [each() for each in before],
            )

    def _environ(self, installed: Installed, unit: Settings, number: int) -> dict[str, str]:
        environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        for line in unit["Environment"]:
            environ |= dict(word.split("=", 1) for word in shlex.split(line))
        for name in unit["EnvironmentFile"]:
            path = Path(installed.moved(name.removeprefix("-").replace("%i", str(number))))
            environ |= parse_env(path.read_text()) if path.exists() else {}
        return {
            name: installed.moved(value.replace("%i", str(number)))
            for name, value in environ.items()
        }

    def _credentials(self, installed: Installed, unit: Settings, run: Path) -> Path:
        folder = run / "credentials"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        for each in unit["LoadCredential"]:
            name, source = each.split(":")
            shutil.copyfile(installed.moved(source), folder / name)
            (folder / name).chmod(0o440)  # as systemd shows them since version 254
        return folder

    def _expanded(self, word: str, environ: dict[str, str]) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda match: environ[match[1]], word)

    def wait_for(self, line: str) -> list[str]:
        """Until the supervisor hears a line that begins so."""
        try:
            return self.supervisor.wait_for(line, 60)
        except TimeoutError:
            raise AssertionError(f"{self.name}: no {line}\n{self.log.read_text()}") from None

    def stop(self) -> int:
        """SIGTERM, and wait; the exit status."""
        self.supervisor.listen()  # or what is to come may find the queue full
        self._process.terminate()
        status = self._process.wait(20)
        self.supervisor.listen()
        self.supervisor.close()
        return status

    def kill(self) -> None:
        """Whatever it does."""
        self._process.kill()
        self._process.wait()
        self.supervisor.close()


def _deny_write_execute() -> None:
    """The kernel's own form of MemoryDenyWriteExecute=; kernels before 6.3 have none."""
    _LIBC.prctl(_PR_SET_MDWE, _REFUSE_EXEC_GAIN, 0, 0, 0)
