"""Identity: what a process of the cluster is called and which settings follow from that."""

import pytest

from scripts.cluster.identity import KEYS_FOLDER, Identity, identify, service_settings
from scripts.cluster.ports import ClusterError


def settings_of(name: str, **environ: str) -> dict[str, str]:
    """The settings of a process that honcho calls `name`."""
    environ = {"HONCHO_PROCESS_NAME": name, "PORT": "5100"} | environ
    return service_settings(identify(name.partition(".")[0], environ), environ)


def test_honcho_gives_the_name_and_the_instance() -> None:
    assert identify("decode", {"HONCHO_PROCESS_NAME": "decode.12"}) == Identity(
        "decode", "decode.12", 12
    )
    assert identify("decode", {}) == Identity("decode", "decode.1", 1)
    assert identify("decode", {"HONCHO_PROCESS_NAME": "big.2"}) == Identity("decode", "big.2", 2)


@pytest.mark.parametrize("name", ["decode", "decode.0", "decode.x", "decode.-1"])
def test_a_name_without_a_number_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match=r"HONCHO_PROCESS_NAME must be like decode\.1"):
        identify("decode", {"HONCHO_PROCESS_NAME": name})


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ClusterError, match="one of gateway, kvstore, prefill, decode, got 'x'"):
        identify("x", {})


def test_every_process_finds_the_stores_at_the_ports_they_take() -> None:
    environ = {"KVBATON_KVSTORES": "2", "KVBATON_HTTP_PORT": "8001"}
    binds = [settings_of(f"kvstore.{number}", **environ)["KVBATON_BIND"] for number in (1, 2)]
    assert binds == ["tcp://127.0.0.1:5610", "tcp://127.0.0.1:5612"]
    for name in ("gateway.1", "prefill.2", "decode.3"):
        assert settings_of(name, **environ)["KVBATON_STORES"].split(",") == binds


def test_gateways_share_the_http_port_and_have_client_ports_of_their_own() -> None:
    first, second = settings_of("gateway.1"), settings_of("gateway.2")
    assert first["KVBATON_HTTP_PORT"] == second["KVBATON_HTTP_PORT"] == "8000"
    assert [first["KVBATON_BIND"], second["KVBATON_BIND"]] == [
        "tcp://127.0.0.1:5555",
        "tcp://127.0.0.1:5556",
    ]


def test_workers_compute_on_threads_that_do_not_spin() -> None:
    assert settings_of("decode.1") == {
        "KVBATON_NAME": "decode.1",
        "KVBATON_KEYS": str(KEYS_FOLDER),
        "KVBATON_STORES": "tcp://127.0.0.1:5570",
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "1",
    }
    assert settings_of("prefill.1", KVBATON_THREADS="4")["OMP_NUM_THREADS"] == "4"


def test_each_process_shows_its_metrics_at_a_port_of_its_own_where_that_is_asked_for() -> None:
    assert "KVBATON_METRICS_PORT" not in settings_of("decode.2")
    assert settings_of("decode.2", KVBATON_METRICS_BASE="9100")["KVBATON_METRICS_PORT"] == "9241"
    said = {"KVBATON_METRICS_BASE": "9100", "KVBATON_METRICS_PORT": "7"}
    assert "KVBATON_METRICS_PORT" not in settings_of("gateway.1", **said)


def test_what_the_user_sets_wins() -> None:
    said = {"KVBATON_STORES": "tcp://10.0.0.1:5570", "OMP_WAIT_POLICY": "active"}
    settings = settings_of("decode.1", **said)
    assert not settings.keys() & said.keys()
    assert "KVBATON_BIND" not in settings_of("gateway.1", KVBATON_BIND="tcp://127.0.0.1:1234")


def test_a_store_that_nobody_would_use_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"nobody would use kvstore\.2: set KVBATON_KVSTORES=2"):
        settings_of("kvstore.2")
    settings_of("kvstore.2", KVBATON_KVSTORES="2")
    settings_of("kvstore.2", KVBATON_STORES="tcp://127.0.0.1:5572")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"KVBATON_HTTP_PORT": "http"}, "KVBATON_HTTP_PORT must be a whole number, got 'http'"),
        ({"KVBATON_KVSTORES": "0"}, "KVBATON_KVSTORES must be from 1 to 12, got 0"),
        ({"KVBATON_KVSTORES": "13"}, "KVBATON_KVSTORES must be from 1 to 12, got 13"),
    ],
)
def test_a_wrong_setting_is_named(setting: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        settings_of("gateway.1", **setting)
