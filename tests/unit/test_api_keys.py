"""The file of API keys: how it is made, and why it is refused."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from common.config import StartError
from scripts.cluster import apikey
from services.gateway.access.api_keys import ApiKeys, Entry, load_entries

DIGEST = "0" * 64
ENTRY = f'[[key]]\nname = "a"\ntenant = "t"\nsha256 = "{DIGEST}"\n'


def file_with(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "keys.toml"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_a_key_is_printed_once_and_only_its_hash_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.toml"
    limits = ["--requests-per-minute", "60", "--tokens-per-minute", "7", "--tokens-per-day", "9"]
    assert apikey.main([str(file), "--name", "alice", "--tenant", "acme"]) == 0
    first = capsys.readouterr().out.strip()
    sharing = ["--share-cache-with", "acme", "--operator"]
    assert apikey.main([str(file), "--name", "b", "--tenant", "t", *limits, *sharing]) == 0
    second = capsys.readouterr().out.strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["keys.toml"]
    for key in (first, second):
        assert len(key) > 40
        assert key not in file.read_text()
    entries = load_entries(file)
    assert entries == [
        Entry(name="alice", tenant="acme", sha256=hashlib.sha256(first.encode()).hexdigest()),
        Entry(
            name="b",
            tenant="t",
            sha256=hashlib.sha256(second.encode()).hexdigest(),
            requests_per_minute=60,
            tokens_per_minute=7,
            tokens_per_day=9,
            share_cache_with="acme",
            operator=True,
        ),
    ]
    keys = ApiKeys(entries, 0.0)
    callers = [keys.caller(key.encode()) for key in (first, second, "other")]
    assert [caller and caller.tenant for caller in callers] == ["acme", "t", None]
    assert [caller and caller.cache_tenant for caller in callers] == ["acme", "acme", None]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name", "a", "--tenant", "t"], "key 'a' is there twice"),
        (["--name", "b/c", "--tenant", "t"], "name"),
        (["--name", "b", "--tenant", ""], "tenant"),
        (["--name", "b", "--tenant", "t", "--tokens-per-day", "0"], "tokens_per_day"),
        (["--name", "b", "--tenant", "t", "--share-cache-with", "x"], "no tenant of this file"),
    ],
)
def test_what_makes_no_key_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    file = file_with(tmp_path, ENTRY)
    assert apikey.main([str(file), *arguments]) == 1
    output = capsys.readouterr()
    assert words in output.err
    assert output.out == ""
    assert file.read_text() == ENTRY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644])
def test_a_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(StartError, match=rf"open to others \(mode {mode:03o}\): chmod 600"):
        load_entries(file_with(tmp_path, ENTRY, mode))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "key"),
        ("key = []", "1 to 1024 keys, not 0"),
        ("nonsense", "keys.toml: "),
        ("[[key]]\nname = 'a'", "tenant"),
        (ENTRY + ENTRY, "there twice"),
        (ENTRY + ENTRY.replace('"a"', '"b"'), "there twice"),
        (ENTRY + "rate = 5", "rate"),
        (ENTRY.replace(DIGEST, "x" * 64), "sha256"),
        (ENTRY + "tokens_per_minute = -1", "tokens_per_minute"),
        (ENTRY + "# " + "x" * (1 << 20), "more than 1048576 bytes"),
    ],
)
def test_a_wrong_file_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(StartError, match=words):
        load_entries(file_with(tmp_path, text))


def test_a_missing_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="make it with scripts/apikey"):
        load_entries(tmp_path / "none")
