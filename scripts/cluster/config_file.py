"""What the TOML file of a cluster says, as those see it who start its services: as variables, below
those of the environment. The services read the file themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.config_file import ConfigFile, ConfigFileError
from scripts.cluster.ports import ClusterError

CONFIG_VARIABLE = "KVBATON_CONFIG"
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
    return {f"KVBATON_{key.upper()}": _text(value) for key, value in values.items()} | {**environ}


def check_file(path: Path) -> None:
    """Look at all that a file says, to whichever service. Raises ClusterError."""
    from common.config import ConfigError, find_settings, settings_of
    from common.worker.config import WorkerConfig
    from services.gateway.config import GatewayConfig
    from services.kvstore.config import StoreConfig

    classes: dict[str, type] = {
        "gateway": GatewayConfig,
        "kvstore": StoreConfig,
        "prefill": WorkerConfig,
        "decode": WorkerConfig,
    }
    try:
        file = ConfigFile(path)
        for role, cls in classes.items():
            settings = settings_of(cls)
            find_settings(settings, {}, {}, file.settings(role, settings))
    except (ConfigError, ConfigFileError) as error:
        raise ClusterError(str(error)) from error


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
