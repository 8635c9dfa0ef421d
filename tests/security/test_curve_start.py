"""What a service starts with: its keys, or on loopback nothing. What it refuses to start with."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from common.config import StartError
from common.net.access import PUBLIC_FILE, SERVICES, Access, read_public_keys
from kvbaton.keys import CLIENT, KeyFileError
from scripts.cluster import keygen
from scripts.cluster.identity import KEYS_FOLDER, identify, service_settings
from scripts.cluster.keeper import Log, make_missing_keys
from scripts.cluster.keys import make_keys
from scripts.cluster.options import parse_plan
from scripts.cluster.ports import ClusterError

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = ["tcp://127.0.0.1:5570", "tcp://127.0.0.1:*", "tcp://[::1]:1", "tcp://localhost:0"]
OUTSIDE = [
    "tcp://0.0.0.0:5570",
    "tcp://*:5570",
    "tcp://[::]:5570",
    "tcp://10.1.2.3:5570",
    "tcp://eth0:5570",
    "tcp://some.host:5570",
    "tcp://127.0.0.1;0.0.0.0:5570",
    "udp://127.0.0.1:5570",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


def access(folder: Path | str, *binds: str, insecure: bool = False, role: str = "decode") -> Access:
    return Access(role, str(folder), insecure, binds or LOOPBACK)


def test_every_secret_is_its_users_alone(folder: Path) -> None:
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    secrets = [f"{role}.key" for role in (*SERVICES, "admin", "client")]
    assert modes == {**dict.fromkeys(secrets, 0o600), PUBLIC_FILE: 0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    contents = [(folder / name).read_text() for name in secrets]
    assert not any("secret" in text for text in [(folder / PUBLIC_FILE).read_text()])
    assert len(set(contents)) == len(contents)


def test_each_role_reads_its_own_key(folder: Path) -> None:
    keys = [access(folder, role=role).load() for role in SERVICES]
    public = read_public_keys(folder)
    assert [each and each.own.public_key for each in keys] == [
        public.roles[role] for role in SERVICES
    ]


def test_keys_are_needed_on_loopback_too_and_allow_any_address(folder: Path) -> None:
    assert access(folder, *LOOPBACK, *OUTSIDE).load() is not None
    for endpoint in (*LOOPBACK, *OUTSIDE):
        with pytest.raises(StartError, match=r"there are no keys: make keys with `scripts/keygen"):
            access("", endpoint).load()


@pytest.mark.parametrize("endpoint", OUTSIDE)
def test_without_keys_nothing_outside_loopback_is_bound(folder: Path, endpoint: str) -> None:
    assert access(folder, *LOOPBACK, "ipc:///tmp/x", insecure=True).load() is None
    with pytest.raises(StartError) as caught:
        access(folder, *LOOPBACK, endpoint, insecure=True).load()
    assert str(caught.value).startswith(
        f"{endpoint} can be reached from elsewhere, where --insecure"
    )


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o666])
def test_a_loose_key_file_is_refused_with_its_name_and_mode(folder: Path, mode: int) -> None:
    (folder / "decode.key").chmod(mode)
    with pytest.raises(StartError, match=rf"decode\.key is open to others \(mode {mode:04o}\)"):
        access(folder).load()
    assert access(folder, role="prefill").load() is not None, "it is another's file"


def test_who_may_write_the_public_keys_could_let_anybody_in(folder: Path) -> None:
    (folder / PUBLIC_FILE).chmod(0o664)
    with pytest.raises(StartError, match=r"public\.json is open to others \(mode 0664\)"):
        access(folder).load()
    (folder / PUBLIC_FILE).chmod(0o644)
    folder.chmod(0o770)
    with pytest.raises(StartError, match=r"others may write to the folder \(mode 0770\)"):
        access(folder).load()
    folder.chmod(0o755)
    assert access(folder).load() is not None


def test_files_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other")
    (folder / "decode.key").write_bytes((tmp_path / "other" / "decode.key").read_bytes())
    with pytest.raises(StartError, match="do not belong together"):
        access(folder).load()
    (folder / "decode.key").unlink()
    with pytest.raises(StartError, match=r"decode\.key cannot be read: No such file"):
        access(folder).load()
    with pytest.raises(StartError, match=r"missing \(No such file or directory\): make keys with"):
        access(tmp_path / "missing").load()


def test_one_key_is_one_users(folder: Path) -> None:
    public = read_public_keys(folder)
    client = msgspec.structs.replace(public.clients[0], public_key=public.roles["gateway"])
    for wrong in (
        {"roles": public.roles, "clients": [client]},
        {"roles": {**public.roles, "admin": public.roles["gateway"]}},
        {"roles": {role: public.roles[role] for role in SERVICES}},
        {"roles": {**public.roles, "admin": "short"}},
    ):
        (folder / PUBLIC_FILE).write_bytes(msgspec.json.encode(wrong))
        with pytest.raises(KeyFileError, match="is no key file of this kind"):
            read_public_keys(folder)


@pytest.mark.parametrize(
    ("flags", "loose", "reason"),
    [
        (["--insecure", "--bind", "tcp://0.0.0.0:*"], False, "can be reached from elsewhere"),
        ([], False, "there are no keys"),
        (["--keys", "{folder}"], True, "open to others (mode 0644)"),
    ],
)
def test_a_process_says_why_it_does_not_start(
    folder: Path, flags: list[str], loose: bool, reason: str
) -> None:
    if loose:
        (folder / "kvstore.key").chmod(0o644)
    command = [sys.executable, "-m", "services.kvstore"]
    command += [flag.format(folder=folder) for flag in flags]
    environ = {name: value for name, value in os.environ.items() if "KVBATON" not in name}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == os.EX_CONFIG
    assert "cannot_start" in done.stdout + done.stderr
    assert reason in done.stdout + done.stderr


# ---- the scripts --------------------------------------------------------------------------------


def test_keygen_makes_keys_once_and_adds_clients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "a" / "keys")
    assert keygen.main([folder, "--client", "bob"]) == keygen.EXIT_FAILED
    assert keygen.main([folder]) == 0
    before = (tmp_path / "a/keys/gateway.key").read_bytes()
    assert keygen.main([folder]) == keygen.EXIT_FAILED
    assert (tmp_path / "a/keys/gateway.key").read_bytes() == before
    assert keygen.main([folder, "--client", "bob", "--tenant", "acme"]) == 0
    assert capsys.readouterr().out == f"{folder}/client-bob.key\n"
    users = list(read_public_keys(Path(folder)).users().values())
    assert [user for user in users if user.startswith(CLIENT)] == [
        "client//default",
        "client/acme/bob",
    ]
    for wrong in (["--client", "bob"], ["--client", "a/b"], ["--tenant", "acme"]):
        assert keygen.main([folder, *wrong]) == keygen.EXIT_FAILED
    assert list(read_public_keys(Path(folder)).users().values()) == users


def test_a_cluster_of_the_checkout_has_keys_unless_it_is_told_otherwise() -> None:
    def keys(**environ: str) -> str | None:
        return service_settings(identify("decode", environ), environ).get("KVBATON_KEYS")

    assert keys() == str(KEYS_FOLDER)
    assert keys(KVBATON_INSECURE="true") is None
    assert keys(KVBATON_KEYS="/else/where") is None, "the service has it from its environment"
    assert parse_plan([], {}, {}, 1).keys == KEYS_FOLDER
    assert parse_plan([], {"KVBATON_KEYS": "/else/where"}, {}, 1).keys == Path("/else/where")
    insecure = parse_plan(["--insecure"], {}, {}, 1)
    assert insecure.keys is None
    assert insecure.environ["KVBATON_INSECURE"] == "true"
    with pytest.raises(ClusterError, match="KVBATON_INSECURE must be true or false, got 'perhaps'"):
        keys(KVBATON_INSECURE="perhaps")


def test_keepers_make_the_keys_of_the_checkout_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, log = tmp_path / "run" / "keys", Log("decode.1")
    monkeypatch.setattr("scripts.cluster.keeper.KEYS_FOLDER", mine)
    make_missing_keys({}, log)
    make_missing_keys({"KVBATON_KEYS": str(tmp_path / "yours")}, log)
    assert list(tmp_path.iterdir()) == []
    make_missing_keys({"KVBATON_KEYS": str(mine)}, log)
    made = (mine / "gateway.key").read_bytes()
    make_missing_keys({"KVBATON_KEYS": str(mine)}, log)
    assert (mine / "gateway.key").read_bytes() == made
