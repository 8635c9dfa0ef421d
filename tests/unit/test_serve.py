"""scripts/serve, its pure parts: what is asked for, how logs and times are shown."""

import io
import json
import os
from pathlib import Path

import pytest

from common.config import settings_of
from common.worker.config import WorkerConfig
from kvbaton.protocol import Timings, Usage
from scripts.cluster import options, serve
from scripts.cluster.config_file import unknown_variables
from scripts.cluster.identity import ROOT
from scripts.cluster.options import Plan, parse_plan
from scripts.cluster.ports import ClusterError
from scripts.cluster.sample import show_hints, timeline
from scripts.cluster.terminal import LogLine, Screen
from services.gateway.config import GatewayConfig


def plan_of(*argv: str, file: dict[str, str] | None = None, **environ: str) -> Plan:
    """The plan on a machine of four cores."""
    return parse_plan(argv, environ, file or {}, num_cores=4)


def test_the_defaults_are_one_process_of_each_role() -> None:
    plan = plan_of()
    assert plan.counts == {"gateway": 1, "kvstore": 1, "prefill": 1, "decode": 1}
    assert plan.environ == {"KVBATON_LOG_LEVEL": "warning"}
    assert plan.http_url == "http://127.0.0.1:8000"
    assert plan.client_endpoint == "tcp://127.0.0.1:5555"


def test_flags_win_over_the_environment_and_that_over_the_file() -> None:
    names = ("KVBATON_MODEL", "KVBATON_ENGINE", "KVBATON_KV_BYTES")
    file = dict.fromkeys(names, "file")
    plan = plan_of("--engine", "mock", file=file, KVBATON_ENGINE="torch", KVBATON_KV_BYTES="1G")
    assert [plan.environ[name] for name in names] == ["file", "mock", "1G"]


@pytest.mark.parametrize("name", ["quantization", "kv_cache_dtype", "engine", "mode"])
def test_a_flag_takes_what_the_services_take(name: str) -> None:
    cls = GatewayConfig if name == "mode" else WorkerConfig
    choices = settings_of(cls)[name].field.metadata["choices"]
    flag = "--" + name.replace("_", "-")
    for choice in choices:
        assert plan_of(flag, choice).environ[f"KVBATON_{name.upper()}"] == choice
    for action in options._parser()._actions:
        if flag in action.option_strings:
            assert tuple(action.choices or ()) == choices


def test_flags_become_settings_of_the_services() -> None:
    plan = plan_of(
        *("--model", "../m", "--kvstore", "2", "--threads", "3", "--http-port", "8001"),
        *("--kv-bytes", "1G", "--batch-invariant", "--verbose"),
        *("--quantization", "int8", "--kv-cache-dtype", "int8"),
    )
    assert plan.environ == {
        "KVBATON_MODEL": str(Path("../m").resolve()),
        "KVBATON_KVSTORES": "2",
        "KVBATON_THREADS": "3",
        "KVBATON_HTTP_PORT": "8001",
        "KVBATON_KV_BYTES": "1G",
        "KVBATON_BATCH_INVARIANT": "true",
        "KVBATON_QUANTIZATION": "int8",
        "KVBATON_KV_CACHE_DTYPE": "int8",
        "KVBATON_LOG_LEVEL": "info",
    }
    assert sorted(plan.ports) == [5595, 5610, 5611, 5612, 5613, 8001]


def test_a_variable_that_nothing_reads_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVBATON_KV_BYTE", "1G")
    assert serve.main(["--no-sample"]) == serve.EXIT_USAGE
    words = "there is no setting KVBATON_KV_BYTE; did you mean KVBATON_KV_BYTES?"
    assert capsys.readouterr().err == f"scripts/serve: {words}\n"


def test_variables_of_any_service_and_of_the_scripts_are_known() -> None:
    names = (ROOT / ".env.example").read_text().split("#KVBATON_")[1:]
    written = {f"KVBATON_{name.partition('=')[0]}": "" for name in names}
    assert len(written) > 10
    others = dict.fromkeys(("KVBATON_CUDA", "KVBATON_TEST_MARKER", "KVBATON_TLS_CERT", "HOME"), "")
    assert unknown_variables(written | others) == []
    assert unknown_variables({"KVBATON_ZZZ": ""}) == ["there is no setting KVBATON_ZZZ"]


@pytest.mark.parametrize(("threads", "decode"), [("1", 4), ("2", 2), ("3", 1), ("8", 1)])
def test_a_colocated_cluster_fills_the_cores_with_decode_workers(threads: str, decode: int) -> None:
    plan = plan_of("--mode", "colocated", "--threads", threads)
    assert plan.counts == {"gateway": 1, "kvstore": 1, "prefill": 0, "decode": decode}
    assert plan_of("--decode", "3", KVBATON_MODE="colocated").counts["decode"] == 3


def test_a_colocated_cluster_has_no_prefill_workers() -> None:
    with pytest.raises(ClusterError, match="--prefill"):
        plan_of("--mode", "colocated", "--prefill", "1")


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_a_count_that_is_none_is_refused(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan_of("--decode", count)
    assert "--decode: " in capsys.readouterr().err


def test_more_processes_than_there_are_ports_for_are_refused() -> None:
    with pytest.raises(ClusterError, match=r"gateway\.15, got number 16"):
        plan_of("--gateway", "16")
    with pytest.raises(ClusterError, match="KVBATON_KVSTORES must be from 1 to 12, got 13"):
        plan_of("--kvstore", "13")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("10.0.0.1", "http://10.0.0.1:8000"),
    ],
)
def test_the_gateway_is_asked_where_it_listens(host: str, url: str) -> None:
    assert plan_of(KVBATON_HOST=host).http_url == url


def honcho_line(text: str, process: str = "decode.1") -> LogLine:
    return LogLine(f"14:00:00 {process:<10}| {text}")


def test_events_are_shown_in_words() -> None:
    fields = {"service": "decode.1", "num": 3, "event": "step_failed", "level": "error"}
    line = honcho_line(json.dumps(fields | {"exception": "Traceback\n  ValueError"}))
    assert line.is_important
    assert line.render(Screen(io.StringIO())) == (
        "14:00:00 decode.1   step failed num=3\nTraceback\n  ValueError"
    )


def test_only_events_below_warning_are_unimportant() -> None:
    def event(level: str) -> LogLine:
        return honcho_line(json.dumps({"event": "worker_ready", "level": level}))

    assert not event("info").is_important
    assert event("warning").is_important
    assert honcho_line("usage: python -m services.decode").is_important
    assert honcho_line('{"no": "event"}').is_important
    assert not honcho_line("decode.1 started (pid=1)", "system").is_important
    assert LogLine("Traceback of honcho itself").process == "honcho"


def test_progress_without_a_terminal_is_a_line_for_each_change() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    for text in ("one", "one", "two"):
        screen.progress(text, "(1 s)")
    screen.line("log")
    screen.end_progress()
    assert stream.getvalue() == "one\ntwo\nlog\n"


def test_logs_do_not_tear_a_text_apart() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    with screen.without_logs():
        screen.part("one ")
        screen.log("log")
        screen.part("line")
        screen.part("")
    screen.part("another")
    screen.progress("stopping")
    assert stream.getvalue() == "one line\nlog\nanother\nstopping\n"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_keeps_the_progress_below_the_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"NO_COLOR": "1", "COLUMNS": "20"})
    stream = Terminal()
    screen = Screen(stream)
    screen.progress("waiting", "(1 s)")
    screen.line("log")
    screen.progress("a text that is longer than the line")
    screen.end_progress()
    erase = "\r\x1b[K"
    assert stream.getvalue() == (
        f"waiting (1 s){erase}log\nwaiting (1 s){erase}a text that is long{erase}"
    )


USAGE = Usage(num_prompt_tokens=9, num_output_tokens=5, num_cached_tokens=0)


def test_a_timeline_tells_what_happened_in_order() -> None:
    timings = Timings(
        placed_ms=0.5,
        prefilled_ms=4.0,
        first_token_ms=4.5,
        handed_over_ms=6.0,
        finished_ms=24.5,
        prefill_worker="prefill.1",
        decode_worker="decode.2",
    )
    assert timeline(timings, USAGE) == [
        "     0.5 ms  placed on prefill.1 and decode.2",
        "     4.0 ms  9 prompt tokens prefilled",
        "     4.5 ms  first token",
        "     6.0 ms  handed over to decode.2",
        "    24.5 ms  5 tokens, 200 a second after the first",
    ]


def test_a_timeline_leaves_out_what_did_not_happen() -> None:
    timings = Timings(
        placed_ms=1,
        handed_over_ms=1,
        first_token_ms=2,
        finished_ms=2,
        prefill_worker="decode.1",
        decode_worker="decode.1",
    )
    one_token = Usage(num_prompt_tokens=9, num_output_tokens=1, num_cached_tokens=0)
    assert timeline(timings, one_token) == [
        "     1.0 ms  placed on decode.1",
        "     2.0 ms  first token",
        "     2.0 ms  1 tokens",
    ]


@pytest.mark.parametrize("api_keys", ["", "keys.toml"])
def test_the_line_to_paste_has_a_place_for_an_api_key_where_one_is_needed(api_keys: str) -> None:
    stream = io.StringIO()
    show_hints(plan_of("--insecure", KVBATON_API_KEYS=api_keys), Screen(stream))
    assert ("Authorization: Bearer" in stream.getvalue()) == bool(api_keys)
