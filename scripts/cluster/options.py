"""What `scripts/serve` is asked for, and the environment of the services that follows. Pure.

Flags win over the environment, the environment over the file .env, that over the TOML file of
--config, and all over the defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.cluster.config_file import CONFIG_VARIABLE, with_file
from scripts.cluster.identity import ROLES, ROOT, http_port_of, keys_folder, num_stores_of
from scripts.cluster.ports import ClusterError, client_port, cluster_ports

_EPILOG = """\
Every other setting of the services is a key of the file that --config names, or a variable
KVBATON_<NAME>, in the environment or in the file .env: see docs/kvbaton.toml, .env.example and
`python -m services.decode --help`.
"""


@dataclass(frozen=True)
class Plan:
    """The cluster to run. `environ` is the environment of all its processes, `known` that and the
    file's settings, by role."""

    counts: dict[str, int]  # of processes, by role
    environ: dict[str, str]
    known: dict[str, dict[str, str]]
    keys: Path | None  # their folder
    ports: dict[int, str]
    http_port: int
    procfile: Path
    start_timeout_s: float
    verbose: bool
    sample: bool

    @property
    def gateway(self) -> dict[str, str]:
        """The settings of the gateways, as variables."""
        return self.known["gateway"]

    @property
    def host(self) -> str:
        """The address at which this host reaches its own gateway."""
        host = self.gateway.get("KVBATON_HOST", "127.0.0.1")
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104

    @property
    def has_tls(self) -> bool:
        """Whether the gateways speak HTTPS."""
        return bool(self.gateway.get("KVBATON_TLS_CERT"))

    @property
    def http_url(self) -> str:
        """Where the gateways answer HTTP."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.has_tls else 'http'}://{host}:{self.http_port}"

    @property
    def client_endpoint(self) -> str:
        """Where the first gateway takes msgpack clients."""
        default = f"tcp://127.0.0.1:{client_port(self.http_port, 1)}"
        return self.gateway.get("KVBATON_BIND", default)


def parse_plan(
    argv: Sequence[str], environ: Mapping[str, str], env_file: Mapping[str, str], num_cores: int
) -> Plan:
    """Exits with usage if a flag is wrong; raises ClusterError if they do not fit together."""
    options = _parser().parse_args(argv)
    merged = {**env_file, **environ, **_settings(options)}
    if path := merged.get(CONFIG_VARIABLE):
        merged[CONFIG_VARIABLE] = str(Path(path).resolve())  # services run in the checkout's folder
    known = {role: with_file(role, merged) for role in ROLES}
    http_port = http_port_of(known["gateway"])
    counts = _counts(options, known["gateway"] | known["decode"], num_cores)
    if not any("KVBATON_LOG_LEVEL" in settings for settings in known.values()):
        merged["KVBATON_LOG_LEVEL"] = "warning"
    return Plan(
        counts=counts,
        environ=merged,
        known=known,
        keys=keys_folder(known["gateway"]),
        ports=cluster_ports(http_port, counts["gateway"], counts["kvstore"]),
        http_port=http_port,
        procfile=options.procfile,
        start_timeout_s=options.start_timeout,
        verbose=options.verbose,
        sample=not options.no_sample,
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/serve",
        description="Run a whole cluster on this host until Ctrl-C.",
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", type=Path, help="TOML file with settings of the services")
    add("--model", metavar="DIR", type=Path, help="folder of the model (default: models/demo)")
    add("--mode", choices=("disaggregated", "colocated"), help="colocated: no prefill workers")
    add("--engine", choices=("torch", "mock"), help="mock: tokens without arithmetic")
    add("--prefill", metavar="N", type=_count, help="prefill workers (default: 1)")
    add("--decode", metavar="N", type=_count, help="decode workers (default: 1; colocated: cores)")
    add("--kvstore", metavar="N", type=_count, help="KV stores (default: 1)")
    add("--gateway", metavar="N", type=_count, help="gateways (default: 1)")
    add("--threads", metavar="N", type=_count, help="compute threads of each worker (default: 1)")
    choices = ("none", "int8", "w8a8_int8")
    add("--quantization", choices=choices, help="of weights, or activations too (default: none)")
    add("--kv-cache-dtype", choices=("auto", "int8"), help="of the KV (default: auto, the model's)")
    add("--http-port", metavar="PORT", type=_count, help="HTTP port (default: 8000)")
    add("--kv-bytes", metavar="BYTES", help="KV memory of each store, such as 256M or 4G")
    add("--disk-dir", metavar="DIR", type=Path, help="keep evicted KV there (default: nowhere)")
    add("--disk-bytes", metavar="BYTES", help="most bytes there for each store (default: 4G)")
    add("--batch-invariant", action="store_true", help="same bits whatever the batch; slower")
    add("--insecure", action="store_true", help="no keys, no encryption; on loopback alone")
    add("--start-timeout", metavar="S", type=float, default=300.0, help="give up after S seconds")
    add("--no-sample", action="store_true", help="do not show a sample completion")
    add("--verbose", action="store_true", help="show every log line, not only warnings")
    add("--procfile", type=Path, default=ROOT / "Procfile", help=argparse.SUPPRESS)
    return parser


def _settings(options: argparse.Namespace) -> dict[str, str]:
    """The flags that are settings of the services, as variables."""
    values = {
        CONFIG_VARIABLE: options.config,
        "KVBATON_MODEL": options.model and str(options.model.resolve()),
        "KVBATON_MODE": options.mode,
        "KVBATON_ENGINE": options.engine,
        "KVBATON_KVSTORES": options.kvstore,
        "KVBATON_THREADS": options.threads,
        "KVBATON_QUANTIZATION": options.quantization,
        "KVBATON_KV_CACHE_DTYPE": options.kv_cache_dtype,
        "KVBATON_HTTP_PORT": options.http_port,
        "KVBATON_KV_BYTES": options.kv_bytes,
        "KVBATON_DISK_DIR": options.disk_dir and str(options.disk_dir.resolve()),
        "KVBATON_DISK_BYTES": options.disk_bytes,
        "KVBATON_BATCH_INVARIANT": "true" if options.batch_invariant else None,
        "KVBATON_INSECURE": "true" if options.insecure else None,
        "KVBATON_LOG_LEVEL": "info" if options.verbose else None,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _counts(
    options: argparse.Namespace, environ: Mapping[str, str], num_cores: int
) -> dict[str, int]:
    colocated = environ.get("KVBATON_MODE") == "colocated"
    if colocated and options.prefill:
        raise ClusterError("--prefill: in colocated mode the decode workers do the prefill")
    num_threads = environ.get("KVBATON_THREADS", "1")
    per_core = max(1, num_cores // int(num_threads)) if num_threads.isdecimal() else 1
    counts = {
        "gateway": options.gateway or 1,
        "kvstore": num_stores_of(environ),
        "prefill": 0 if colocated else options.prefill or 1,
        "decode": options.decode or (per_core if colocated else 1),
    }
    assert set(counts) == set(ROLES)
    return counts
