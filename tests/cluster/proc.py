"""What Linux tells of a process."""

from __future__ import annotations

from pathlib import Path

_LISTEN = "0A"


def state(pid: int) -> str:
    """One letter: R, S, T (stopped), Z (dead, not yet reaped), ... as in ps."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def num_fds(pid: int) -> int:
    """Open file descriptors."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def num_threads(pid: int) -> int:
    """Threads, the main one included."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def rss_bytes(pid: int) -> int:
    """Private memory that is resident: arenas, shared by processes, are not counted."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(kilobytes) * 1024


def listening_ports(pid: int) -> set[int]:
    """TCP ports on which the process takes connections."""
    sockets = {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in sockets:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports
