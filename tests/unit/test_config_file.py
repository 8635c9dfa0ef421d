"""One file for a cluster: what each service takes of it, what it goes before, what is refused."""

from __future__ import annotations

import itertools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.config import find_settings, load_config, setting, settings_of
from common.config_file import COMMON, TABLES, TABLES_OF, ConfigFile
from common.worker.config import WorkerConfig
from scripts.cluster.config_file import check_file, with_file
from scripts.cluster.identity import identify, service_settings
from scripts.cluster.options import parse_plan
from scripts.cluster.ports import ClusterError
from services.gateway.config import GatewayConfig
from services.kvstore.config import StoreConfig

EXAMPLE = Path(__file__).parents[2] / "docs" / "kvbaton.toml"
CLASSES: dict[str, type[Any]] = {
    "gateway": GatewayConfig,
    "kvstore": StoreConfig,
    "prefill": WorkerConfig,
    "decode": WorkerConfig,
}


@dataclass(frozen=True)
class Config:
    """Settings of a test."""

    model: str = setting("demo", "a folder")
    max_num_seqs: int = setting(64, "a count", low=1)
    kv_bytes: int = setting(1024, "a size", low=1)
    lost_after_s: float = setting(8.0, "a time", low=0.1)
    prefix_cache: bool = setting(True, "a switch")
    mover: str = setting("auto", "a choice", choices="auto shm zmq")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kvbaton.toml"


def load(file: Path, text: str, *argv: str, **environ: str) -> Config:
    file.write_text(text)
    return load_config(Config, "decode", ["--config", str(file), *argv], environ)


def test_a_worker_takes_what_is_common_then_its_tables(file: Path) -> None:
    text = """
    model = "common"
    stores = "not a setting of this service"
    [worker]
    max_num_seqs = 8
    lost_after_s = 3
    [decode]
    max_num_seqs = 16
    kv_bytes = "2K"
    prefix_cache = false
    [gateway]
    max_num_seqs = "nobody here looks at it"
    """
    assert load(file, text) == Config("common", 16, 2048, 3.0, prefix_cache=False)
    assert type(load(file, text).lost_after_s) is float


def test_the_environment_goes_before_the_file_and_flags_before_it(file: Path) -> None:
    text = "[decode]\nmax_num_seqs = 1\nkv_bytes = 1\nlost_after_s = 1"
    config = load(file, text, "--max-num-seqs=3", KVBATON_MAX_NUM_SEQS="2", KVBATON_KV_BYTES="2")
    assert (config.max_num_seqs, config.kv_bytes, config.lost_after_s) == (3, 2, 1.0)


def test_the_environment_names_the_file_and_a_flag_names_another(file: Path) -> None:
    file.write_text("[decode]\nmax_num_seqs = 5")
    named = {"KVBATON_CONFIG": str(file)}
    assert load_config(Config, "decode", [], named).max_num_seqs == 5
    other = file.with_name("other.toml")
    other.write_text("[decode]\nmax_num_seqs = 6")
    assert load_config(Config, "decode", ["--config", str(other)], named).max_num_seqs == 6
    assert load_config(Config, "decode", [], {"KVBATON_CONFIG": ""}).max_num_seqs == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[decode]\nmax_num_seq = 1", ":2: there is no setting max_num_seq in [decode]; did you "
         "mean max_num_seqs?"),
        ("[worker]\n\nmovers = 1", ":3: there is no setting movers in [worker]; did you mean "
         "mover?"),
        ("[deocde]\nx = 1", ":1: there is no table [deocde]; did you mean decode?"),
        ("log_levl = 1", ":1: there is no common setting log_levl; did you mean log_level?"),
        ("entirely_else = 1", ":1: there is no common setting entirely_else\n"),
        ("max_num_seqs = 1", ":1: max_num_seqs belongs in a table, such as [decode]"),
        ("decode = 1", ":1: decode must be a table: [decode]"),
        ("[decode]\nmax_num_seqs = 0", ":2: max_num_seqs must be at least 1, got 0"),
        ("[decode]\nmax_num_seqs = '8'", ":2: max_num_seqs must be of type int, got '8'"),
        ("[decode]\nmax_num_seqs = true", ":2: max_num_seqs must be of type int, got True"),
        ("[decode]\nmax_num_seqs = 1.0", ":2: max_num_seqs must be of type int, got 1.0"),
        ("[decode]\nkv_bytes = '1KM'", ":2: kv_bytes must be of type int, got '1KM'"),
        ("[decode]\nlost_after_s = nan", ":2: lost_after_s must be at least 0.1, got nan"),
        ("[decode]\nprefix_cache = 'true'", ":2: prefix_cache must be of type bool, got 'true'"),
        ("[decode]\nmover = 'rdma'", ":2: mover must be one of auto, shm, zmq, got 'rdma'"),
        ("decode.mover = 'rdma'", " [decode]: mover must be one of auto"),
        ("[decode", "Expected ']'"),
        ("x = 1\nx = 2", "Cannot overwrite a value"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named_with_its_line_and_what_would_be_right(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        load(file, text)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{file}" in said
    assert words in said


def test_a_file_that_is_not_there_or_no_text_is_named(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_config(Config, "decode", ["--config", str(file)], {})
    assert f"{file}: No such file or directory" in capsys.readouterr().err
    file.write_bytes(b"model = '\xff'")
    with pytest.raises(SystemExit):
        load_config(Config, "decode", ["--config", str(file)], {})
    assert f"{file}: 'utf-8' codec can't decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-num-seq", "1"], "--max-num-seq 1; did you mean --max-num-seqs?"),
        (["--kv-byte=1"], "--kv-byte=1; did you mean --kv-bytes?"),
    ],
)
def test_a_wrong_flag_is_told_the_nearest_right_one(
    file: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    with pytest.raises(SystemExit):
        load(file, "", *argv)
    assert f"unrecognized arguments: {words}" in capsys.readouterr().err


def test_a_wrong_variable_is_named_as_it_was_written(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load(file, "", KVBATON_MAX_NUM_SEQS="none")
    words = "KVBATON_MAX_NUM_SEQS: --max-num-seqs must be of type int, got 'none'"
    assert words in capsys.readouterr().err


def test_printed_settings_say_where_they_are_from_and_can_be_read_again(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'model = "a \\"b\\" ö"\n[worker]\nkv_bytes = "1K"\n'
    with pytest.raises(SystemExit) as ended:
        load(file, text, "--print-config", "--mover", "shm", KVBATON_LOST_AFTER_S="2")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    sources = dict(re.findall(r"^(\w+) = .*  # (.*)$", printed, flags=re.MULTILINE))
    assert sources == {
        "model": f"{file}:1",
        "max_num_seqs": "default",
        "kv_bytes": f"{file}:3",
        "lost_after_s": "KVBATON_LOST_AFTER_S",
        "prefix_cache": "default",
        "mover": "--mover",
    }
    assert load(file, printed) == Config('a "b" ö', lost_after_s=2.0, mover="shm")


# ---- the example --------------------------------------------------------------------------------


def uncommented() -> str:
    return re.sub(r"^#(?=\w+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("role", CLASSES)
def test_the_example_has_every_setting_with_its_default(role: str, file: Path) -> None:
    file.write_text(uncommented())
    settings = settings_of(CLASSES[role])
    found = find_settings(settings, {}, {}, ConfigFile(file).settings(role, settings))
    assert {name: each.value for name, each in found.items()} == {
        name: each.field.default for name, each in settings.items()
    }
    assert not [name for name, each in found.items() if each.source == "default"]


def test_the_example_as_it_is_changes_nothing_and_is_in_order() -> None:
    check_file(EXAMPLE)
    assert {key for key, value in tomllib.loads(EXAMPLE.read_text()).items() if value} == set()
    assert set(tomllib.loads(uncommented())) == {*COMMON, *TABLES}


def test_common_settings_are_those_of_several_services_that_do_not_differ_by_process() -> None:
    names = [set(settings_of(cls)) for cls in (GatewayConfig, StoreConfig, WorkerConfig)]
    shared = set().union(*(one & other for one, other in itertools.combinations(names, 2)))
    assert set(COMMON) == shared - {"name", "bind", "metrics_port"}
    assert set(CLASSES) == set(TABLES_OF)


# ---- whoever starts services --------------------------------------------------------------------


def test_a_starter_sees_the_file_below_the_environment(file: Path) -> None:
    file.write_text(
        'log_level = "error"\ninsecure = true\n'
        '[gateway]\nhttp_port = 8001\nbind = "tcp://[::1]:7"\n[worker]\nthreads = 2\n'
    )
    environ = {"KVBATON_CONFIG": str(file), "KVBATON_LOG_LEVEL": "debug"}
    assert with_file("decode", environ) == environ | {
        "KVBATON_INSECURE": "true",
        "KVBATON_THREADS": "2",
        "KVBATON_HTTP_PORT": "8001",
    }
    decode = service_settings(identify("decode", environ), with_file("decode", environ))
    assert decode["KVBATON_STORES"] == "tcp://127.0.0.1:5610"
    assert decode["OMP_NUM_THREADS"] == "2"
    gateway = service_settings(identify("gateway", environ), with_file("gateway", environ))
    assert "KVBATON_BIND" not in gateway
    assert "KVBATON_KEYS" not in gateway


def test_serve_hands_the_file_on_and_takes_its_own_part(file: Path) -> None:
    file.write_text('[gateway]\nhttp_port = 8001\nhost = "::1"\nmode = "colocated"\n')
    plan = parse_plan(["--config", str(file)], {}, {}, num_cores=2)
    assert plan.environ == {"KVBATON_CONFIG": str(file), "KVBATON_LOG_LEVEL": "warning"}
    assert plan.counts == {"gateway": 1, "kvstore": 1, "prefill": 0, "decode": 2}
    assert plan.http_url == "http://[::1]:8001"
    assert parse_plan(["--http-port", "8002"], plan.environ, {}, num_cores=2).http_port == 8002
    file.write_text('[decode]\nlog_level = "info"\n')
    assert "KVBATON_LOG_LEVEL" not in parse_plan(["--config", str(file)], {}, {}, 2).environ


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[decode]\nmax_num_seq = 1", "did you mean max_num_seqs"),
        ("[kvstore]\nkv_bytes = 0", "kv_bytes must be at least 1, got 0"),
        ("[gateway]\nmode = 'x'", "mode must be one of disaggregated, colocated"),
    ],
)
def test_serve_refuses_what_any_service_would_refuse(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    with pytest.raises(ClusterError, match=words):
        check_file(file)
