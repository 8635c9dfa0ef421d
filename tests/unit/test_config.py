"""Settings by value: where they come from, and what is said of those that cannot be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from common.config import load_config, parse_bytes, setting


@dataclass(frozen=True)
class Config:
    """Settings of a test."""

    name: str = setting("one", "a name")
    kv_bytes: int = setting(1024, "a size", low=1)
    lost_after_s: float = setting(8.0, "a time", low=0.1)
    prefix_cache: bool = setting(True, "a switch")
    mover: str = setting("auto", "a choice", choices="auto shm zmq")


def load(*argv: str, **environ: str) -> Config:
    return load_config(Config, "decode", argv, environ)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> str:
    """What is printed before the exit that a bad setting ends in."""
    with pytest.raises(SystemExit) as ended:
        load(*argv, **environ)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_defaults_hold_where_nothing_is_said() -> None:
    assert load() == Config()


def test_the_environment_goes_before_defaults_and_flags_before_it() -> None:
    environ = {"KVBATON_NAME": "environment", "KVBATON_KV_BYTES": "2048", "NAME": "not ours"}
    config = load("--name", "flag", **environ)
    assert (config.name, config.kv_bytes, config.lost_after_s) == ("flag", 2048, 8.0)


def test_a_flag_hides_what_is_wrong_in_the_environment() -> None:
    assert load("--kv-bytes=7", KVBATON_KV_BYTES="none").kv_bytes == 7


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--prefix-cache"], True),
        (["--prefix-cache=0"], False),
        (["--prefix-cache", "false"], False),
        (["--prefix-cache", "True"], True),
    ],
)
def test_a_switch_is_turned_on_alone_or_set_by_value(argv: list[str], value: bool) -> None:
    assert load(*argv, KVBATON_PREFIX_CACHE=str(int(not value))).prefix_cache is value


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--kv-bytes", "0"], "--kv-bytes must be at least 1, got 0"),
        (["--kv-bytes=-1G"], "--kv-bytes must be at least 1, got -1G"),
        (["--kv-bytes", "much"], "--kv-bytes must be of type int, got 'much'"),
        (["--kv-bytes", ""], "--kv-bytes must be of type int, got ''"),
        (["--kv-bytes", "inf"], "--kv-bytes must be of type int, got 'inf'"),
        (["--kv-bytes", "1e999G"], "--kv-bytes must be of type int, got '1e999G'"),
        (["--kv-bytes", "nan"], "--kv-bytes must be of type int, got 'nan'"),
        (["--kv-bytes", "1KM"], "--kv-bytes must be of type int, got '1KM'"),
        (["--lost-after-s", "0.05"], "--lost-after-s must be at least 0.1, got 0.05"),
        (["--lost-after-s", "nan"], "--lost-after-s must be at least 0.1, got nan"),
        (["--lost-after-s", "soon"], "--lost-after-s must be of type float, got 'soon'"),
        (["--prefix-cache", "maybe"], "--prefix-cache must be of type bool, got 'maybe'"),
        (["--mover", "rdma"], "--mover must be one of auto, shm, zmq, got 'rdma'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["--mov", "shm"], "unrecognized arguments: --mov shm"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_limit(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert words in refusal(capsys, *argv)


def test_a_bad_variable_is_refused_as_a_bad_flag(capsys: pytest.CaptureFixture[str]) -> None:
    words = refusal(capsys, KVBATON_KV_BYTES="0")
    assert "--kv-bytes must be at least 1, got 0" in words


def test_help_shows_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("--help")
    assert ended.value.code == 0
    words = capsys.readouterr().out
    assert "Settings of a test." in words
    for flag in ("--name", "--kv-bytes", "--lost-after-s", "--prefix-cache", "--mover"):
        assert flag in words
    assert "a size (default: 1024)" in words


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("268435456", 1 << 28),
        ("256M", 1 << 28),
        ("256m", 1 << 28),
        ("256MB", 1 << 28),
        ("256MiB", 1 << 28),
        (" 1.5G ", 3 << 29),
        ("2T", 2 << 40),
        ("4K", 4096),
        ("17B", 17),
    ],
)
def test_bytes_may_have_a_unit(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes
