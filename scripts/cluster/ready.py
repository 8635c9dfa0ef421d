"""Before the start: are the ports free. After it: does the cluster answer."""

from __future__ import annotations

import errno
import http.client
import json
import socket
import ssl
import time
from collections.abc import Mapping

from scripts.cluster.honcho import Honcho
from scripts.cluster.options import Plan
from scripts.cluster.ports import DEFAULT_HTTP_PORT, ClusterError, cluster_ports
from scripts.cluster.terminal import Screen

PROBE_INTERVAL_S = 0.2
PROBE_TIMEOUT_S = 2.0
MAX_ANSWER_BYTES = 4096


class StartError(Exception):
    """The cluster did not come up."""


def check_ports(plan: Plan) -> None:
    """Raise ClusterError, which says what to do, if a port of the cluster is taken."""
    for port, use in plan.ports.items():
        error = _bind_error(plan.host, port)
        if error is None:
            continue
        if error.errno != errno.EADDRINUSE:
            raise ClusterError(f"cannot use port {port} ({use}): {error.strerror}")
        advice = f"stop what uses it, or choose other ports with --http-port {_free_port(plan)}"
        raise ClusterError(f"port {port} ({use}) is taken: {advice}")


def _free_port(plan: Plan) -> int:
    """An HTTP port whose cluster would have all its ports free."""
    candidates = range(DEFAULT_HTTP_PORT, DEFAULT_HTTP_PORT + 60)
    gateways, stores = plan.counts["gateway"], plan.counts["kvstore"]
    for candidate in candidates:
        ports: Mapping[int, str] = cluster_ports(candidate, gateways, stores)
        if all(_bind_error(plan.host, port) is None for port in ports):
            return candidate
    return candidates.stop


def _bind_error(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def wait_until_ready(plan: Plan, honcho: Honcho, screen: Screen) -> float:
    """Returns the seconds it took. Raises StartError if a service crashes or time runs out."""
    started_at = time.monotonic()
    while True:
        waiting_for = probe(plan)
        elapsed_s = time.monotonic() - started_at
        if not waiting_for:
            screen.end_progress()
            return elapsed_s
        screen.progress(f"waiting: {waiting_for}", f"({elapsed_s:.0f} s)")
        if elapsed_s > plan.start_timeout_s:
            raise StartError(f"not ready after {plan.start_timeout_s:g} s: {waiting_for}")
        if crash := honcho.crash(PROBE_INTERVAL_S):
            raise StartError(crash)


def probe(plan: Plan) -> str:
    """What the gateway still waits for; "" when the cluster answers requests, or when it tells that
    only to who has an API key."""
    connection = _connection(plan)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        body = response.read(MAX_ANSWER_BYTES)
    except ConnectionRefusedError:
        return "the gateway starts"
    except (OSError, http.client.HTTPException) as error:
        return f"the gateway does not answer ({error})"
    finally:
        connection.close()
    is_up = response.status in (http.client.OK, http.client.UNAUTHORIZED)
    return "" if is_up else _reason(body)


def _connection(plan: Plan) -> http.client.HTTPConnection:
    if not plan.has_tls:
        return http.client.HTTPConnection(plan.host, plan.http_port, timeout=PROBE_TIMEOUT_S)
    context = ssl.create_default_context()
    context.check_hostname = False  # the certificate is for the name that clients use
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(
        plan.host, plan.http_port, timeout=PROBE_TIMEOUT_S, context=context
    )


def _reason(body: bytes) -> str:
    """The message of an error of the OpenAI form, or the text itself."""
    text = body.decode(errors="replace").strip()
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text or "the gateway is not ready"
