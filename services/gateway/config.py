"""Settings of a gateway."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import INSECURE_HELP, KEYS_HELP, setting
from common.metrics_port import HOST_HELP, PORT_HELP
from common.service import DRAIN_HELP, DRAIN_TIMEOUT_S


@dataclass(frozen=True)
class GatewayConfig:
    """Settings of a gateway."""

    name: str = setting("gateway.1", "name shown to people")
    model: str = setting("models/demo", "folder of the model, for its tokenizer and chat template")
    served_model_name: str = setting("", "name clients use; the folder's own name unless given")
    tool_format: str = setting(
        "auto",
        "how the model writes tool calls; auto: as its chat template shows",
        choices="auto hermes llama3 mistral",
    )
    host: str = setting("127.0.0.1", "address of the HTTP server")
    http_port: int = setting(8000, "port of the HTTP server; 0 takes a free one", low=0)
    bind: str = setting("tcp://127.0.0.1:5555", "where msgpack clients reach the gateway")
    stores: str = setting("tcp://127.0.0.1:5570", "endpoints of the KV stores, comma-separated")
    mode: str = setting(
        "disaggregated",
        "colocated: decode workers compute prompts too",
        choices="disaggregated colocated",
    )
    api_keys: str = setting("", "TOML file with the API keys of the HTTP server; none: no keys")
    open_http: bool = setting(False, "serve HTTP without keys also where others can reach it")
    tls_cert: str = setting("", "PEM file with the HTTP server's certificate and those above it")
    tls_key: str = setting("", "private PEM file with its key")
    slow_reader_s: float = setting(
        30.0, "a client that reads nothing for so long is cut off", low=0
    )
    admin_key_file: str = setting(
        "", "private file with the key for operators' commands; none: no commands"
    )
    max_requests: int = setting(4096, "requests served at once", low=1)
    max_waiting_tokens: int = setting(
        4_000_000, "prompt tokens of requests that wait for their first token", low=1
    )
    max_wait_s: float = setting(
        30.0, "a request is refused if it would wait longer than this for its turn", low=0
    )
    ttft_target_ms: float = setting(
        0.0, "time to the first token that requests are meant to have; 0: none", low=0
    )
    tpot_target_ms: float = setting(
        0.0, "time per later token that requests are meant to have; 0: none", low=0
    )
    refuse_late: bool = setting(
        False, "refuse at once what is predicted to miss its target for the first token"
    )
    max_local_tokens: int = setting(
        64,
        "uncached tokens that a decode worker may compute itself where that is sooner; any number "
        "where targets per token pace it, or moving their KV would take longer; 0: none",
        low=0,
    )
    local_decode: bool = setting(
        True,
        "a prefill worker decodes what it has computed where no decode worker has a place or "
        "would meet the target per token",
    )
    max_outage_s: float = setting(
        60.0, "how long a request that has begun waits for workers or a store to come back", low=0
    )
    drain_s: float = setting(DRAIN_TIMEOUT_S, DRAIN_HELP, low=0)
    otlp_endpoint: str = setting("", "where spans go: a collector's OTLP address over HTTP")
    metrics_host: str = setting("127.0.0.1", HOST_HELP)
    metrics_port: int = setting(0, PORT_HELP, low=0)
    keys: str = setting("", KEYS_HELP)
    insecure: bool = setting(False, INSECURE_HELP)
    log_level: str = setting("info", "log level", choices="debug info warning error")
