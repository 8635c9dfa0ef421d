"""The admin key of a checkout: private, made once, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import StartError
from scripts.cluster.admin_key import ADMIN_KEY_FILE, admin_key_file, make_admin_key
from scripts.cluster.keeper import Log, admin_key_setting
from services.gateway.access.admin import load_admin_key


def test_a_key_is_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "admin-key"
    make_admin_key(path)
    key = load_admin_key(str(path))
    make_admin_key(path)
    assert load_admin_key(str(path)) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_keys_differ(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_admin_key(tmp_path / name)
    assert (tmp_path / "a").read_text() != (tmp_path / "b").read_text()


def test_a_gateway_serves_without_where_no_key_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines: list[tuple[str, ...]] = []

    class Lines(Log):
        def __call__(self, *line: str) -> None:
            lines.append(line)

    assert admin_key_setting(tmp_path / "file" / "admin-key", Lines("gateway.1")) == {}
    assert [line[:2] for line in lines] == [("warning", "no_admin_key")]
    path = tmp_path / "run" / "admin-key"
    assert admin_key_setting(path, Lines("gateway.1")) == {"KVBATON_ADMIN_KEY_FILE": str(path)}


def test_the_environment_names_another_key_or_none() -> None:
    assert admin_key_file({}) == ADMIN_KEY_FILE
    assert admin_key_file({"KVBATON_ADMIN_KEY_FILE": "/else/where"}) == Path("/else/where")
    assert admin_key_file({"KVBATON_ADMIN_KEY_FILE": ""}) is None


def test_a_key_that_others_can_read_or_guess_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(StartError, match=r"cannot be read .* make one with \(umask 077; head"):
        load_admin_key(str(path))
    path.write_text("a key that is long enough\n")
    path.chmod(0o640)
    with pytest.raises(StartError, match="can be read by others: chmod 600 it"):
        load_admin_key(str(path))
    path.chmod(0o600)
    assert load_admin_key(str(path)) == "a key that is long enough"
    path.write_text("short")
    with pytest.raises(StartError, match="at least 16 characters"):
        load_admin_key(str(path))
