"""What the TOML file of a cluster says, as those see it who start its services: as variables, below
those of the environment. The services read the file themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import ENV_PREFIX, ConfigError, find_settings, settings_of
from common.config_file import ConfigFile, ConfigFileError, nearest
from scripts.cluster.ports import ClusterError

CONFIG_VARIABLE = "KVBATON_CONFIG"
# Variables, without the prefix, that are no setting of a service: read by those who set up, start
# or test them.
_OF_SCRIPTS = {
    "ADMIN_KEY_FILE", "CONFIG", "CUDA", "KVSTORES", "METRICS_BASE", "PYTHON", "TORCH_INDEX",
}  # fmt: skip
_OF_TESTS = ("TEST_", "LEAK_TEST_", "PAGE_", "GPU_CHECK_")
_HTTP_PORT = "http_port"  # of the gateways: all other ports follow from it


def with_file(role: str, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, and below it what the file that it names says to a role. Raises ClusterError."""
    path = environ.get(CONFIG_VARIABLE)
    if not path:
        return dict(environ)
    try:
        file = ConfigFile(Path(path))
        said, to_gateway = file.said(role), file.said("gateway")
    except ConfigFileError as error:
        raise ClusterError(str(error)) from error
    values = {key: given.value for key, given in said.items()}
    if _HTTP_PORT in to_gateway:
        values[_HTTP_PORT] = to_gateway[_HTTP_PORT].value
    return {f"{ENV_PREFIX}{key.upper()}": _text(value) for key, value in values.items()} | {
        **environ
    }


def check_file(path: Path) -> None:
    """Look at all that a file says, to whichever service. Raises ClusterError."""
    try:
        file = ConfigFile(path)
        for role, cls in _classes().items():
            settings = settings_of(cls)
            find_settings(settings, {}, {}, file.settings(role, settings))
    except (ConfigError, ConfigFileError) as error:
        raise ClusterError(str(error)) from error


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """What is to be said of each variable with our prefix that nothing here would read."""
    ours = sorted(name for name in environ if name.startswith(ENV_PREFIX))
    if not ours:
        return []
    settings = {field.name for cls in _classes().values() for field in dataclasses.fields(cls)}
    known = {name.upper() for name in settings} | _OF_SCRIPTS
    bare = [name.removeprefix(ENV_PREFIX) for name in ours]
    return [
        f"there is no setting {ENV_PREFIX}{name}{nearest(name, known, ENV_PREFIX)}"
        for name in bare
        if name not in known and not name.startswith(_OF_TESTS)
    ]


def _classes() -> dict[str, type[Any]]:
    """The settings of each role."""
    from common.worker.config import WorkerConfig
    from services.gateway.config import GatewayConfig
    from services.kvstore.config import StoreConfig

    return {
        "gateway": GatewayConfig,
        "kvstore": StoreConfig,
        "prefill": WorkerConfig,
        "decode": WorkerConfig,
    }


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
