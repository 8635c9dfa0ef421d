"""Puts the files of an installation in place, and takes them away again.

A manifest below the prefix lists what was made. Files change whole: a process that reads one finds
the old content or the new one.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.host.layout import CODE, MANIFEST, Entry

Say = Callable[[str, Path], None]


@dataclass
class Manifest:
    """What was made, as paths without the root: files with the SHA-256 of what was written, and
    folders in the order they were made."""

    files: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """None if there is no installation. Raises OSError or ValueError."""
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def write(self, path: Path) -> None:
        _write(path, json.dumps({"files": self.files, "folders": self.folders}).encode(), 0o644)


class Tree:
    """An installation with its prefix below `root`. With `dry` nothing is changed, and all is said
    as if it were: `say(what, path)`."""

    def __init__(self, root: Path, prefix: Path, say: Say, *, dry: bool) -> None:
        self._root = root
        self._prefix = prefix
        self._say = say
        self._dry = dry

    def at(self, path: Path | str) -> Path:
        """Where a path of the installation is now."""
        return self._root / Path(path).relative_to("/")

    @property
    def manifest_file(self) -> Path:
        return self.at(self._prefix / MANIFEST)

    def install(self, entries: Sequence[Entry], venv: Path | None) -> None:
        """Make what is missing or differs, and remove what an earlier installation had besides.
        `venv` is linked as the environment. Raises OSError."""
        former = Manifest.read(self.manifest_file) or Manifest()
        manifest = Manifest(folders=list(former.folders))
        for entry in entries:
            self._put(entry, former, manifest)
        if venv is not None:
            self._link(self.at(self._prefix / ".venv"), venv)
        self._remove(set(former.files) - set(manifest.files), former)
        if not self._dry:
            manifest.write(self.manifest_file)

    def _put(self, entry: Entry, former: Manifest, manifest: Manifest) -> None:
        name, target, content = str(entry.path), self.at(entry.path), entry.content()
        digest = hashlib.sha256(content).hexdigest()
        manifest.files[name] = digest
        mode = 0o755 if entry.is_executable else 0o644
        if entry.is_setting and target.exists():
            manifest.files[name] = former.files.get(name, digest)
        elif not _is_same(target, content, mode):
            self._say("write", entry.path)
            self._make_folder(target.parent, manifest)
            if not self._dry:
                _write(target, content, mode)

    def _link(self, target: Path, venv: Path) -> None:
        if target.is_symlink() and target.readlink() == venv:
            return
        self._say("link", self._prefix / ".venv")
        if not self._dry:
            if target.is_symlink():
                target.unlink()
            target.symlink_to(venv)

    def _make_folder(self, folder: Path, manifest: Manifest) -> None:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        for each in reversed(missing):
            if not self._dry:
                each.mkdir()
                each.chmod(0o755)  # whatever the umask: services read it
                manifest.folders.append(f"/{each.relative_to(self._root)}")

    # ---- away again -----------------------------------------------------------------------------

    def uninstall(self, *, purge: Iterable[Path]) -> None:
        """Remove all that was made, but settings that were changed; and what is to be purged.
        Raises OSError."""
        manifest = Manifest.read(self.manifest_file) or Manifest()
        ours = [self._prefix / name for name in (*CODE, ".venv", MANIFEST)]
        for path in (*purge, *ours):  # with what Python and pip have made there
            self._remove_tree(path)
        self._remove(manifest.files, manifest)
        for name in reversed(manifest.folders):
            folder = self.at(name)
            if not self._dry and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _remove(self, names: Iterable[str], manifest: Manifest) -> None:
        for name in sorted(names):
            target = self.at(name)
            if not target.exists():
                continue
            if _digest(target) != manifest.files[name]:
                self._say("keep, it was changed:", Path(name))
                continue
            self._say("remove", Path(name))
            if not self._dry:
                target.unlink()

    def _remove_tree(self, path: Path) -> None:
        target = self.at(path)
        if not target.exists() and not target.is_symlink():
            return
        self._say("remove", path)
        if self._dry:
            return
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_same(path: Path, content: bytes, mode: int) -> bool:
    return path.is_file() and path.stat().st_mode & 0o777 == mode and path.read_bytes() == content


def _write(path: Path, content: bytes, mode: int) -> None:
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        unfinished.write_bytes(content)
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
