"""The gateway process: an HTTP face and a msgpack face over one dispatcher.

The life of a request is told in dispatcher.py; openai/ and clients.py turn it into tokens and its
tokens into text. A gateway keeps no state that another needs: run as many as you like.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import structlog

from common.config import StartError
from common.inherited import take_listener
from common.metrics_port import MetricsPort
from common.service import Seams, Tasks, first_of
from services.gateway.access.admin import Admin, drop_cache, load_admin_key
from services.gateway.access.operator import Operator
from services.gateway.backend import Targets
from services.gateway.clients.face import ClientFace
from services.gateway.config import GatewayConfig
from services.gateway.http.access import load_access
from services.gateway.http.face import HttpFace
from services.gateway.http.page.live import Live
from services.gateway.observe.metrics import cluster_metrics
from services.gateway.observe.tracing import OtelSpans, load_spans
from services.gateway.observe.watch import Watch
from services.gateway.routing.admission import Admission
from services.gateway.routing.chooser import Routing
from services.gateway.routing.dispatcher import Dispatcher
from services.gateway.text.model import TextModel

log = structlog.get_logger()

WORKER_ROLES = ("prefill", "decode")


class Gateway:
    """One gateway process. `failed` is set when it cannot go on."""

    def __init__(self, config: GatewayConfig, seams: Seams) -> None:
        self.config = config
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._seams = seams
        self._tasks = Tasks(self._fail)
        self._dispatcher: Dispatcher | None = None
        self._text: TextModel | None = None
        self._spans: OtelSpans | None = None
        self._http: HttpFace | None = None
        self._clients: ClientFace | None = None
        self._metrics: MetricsPort | None = None
        self._listener: socket.socket | None = None

    async def start(self) -> None:
        """Load the tokenizer, connect to the stores, serve; returns once a store has welcomed us.
        Raises StartError."""
        config, seams = self.config, self._seams
        seams.notifier.describe = self._describe
        seams.notifier.status(f"loading the tokenizer of {config.model}")
        self._listener = take_listener(os.environ, seams.pid)
        admin_key = load_admin_key(config.admin_key_file) if config.admin_key_file else ""
        access = load_access(
            host=self._listener.getsockname()[0] if self._listener else config.host,
            api_keys=config.api_keys,
            tls_cert=config.tls_cert,
            tls_key=config.tls_key,
            open_http=config.open_http,
            clock=seams.clock,
        )
        layout = None if config.tool_format == "auto" else config.tool_format
        self._text = text = TextModel(
            Path(config.model), config.served_model_name or None, tool_format=layout
        )
        self._spans = load_spans(
            config.otlp_endpoint, os.environ, service=config.name, model=text.name
        )
        watch = Watch(seams.clock, self._spans)
        self._dispatcher = Dispatcher(
            seams,
            self._tasks,
            name=config.name,
            stores=config.stores.split(","),
            routing=Routing(
                mode=config.mode,
                targets=Targets(config.ttft_target_ms, config.tpot_target_ms),
                refuses_late=config.refuse_late,
                max_local_tokens=config.max_local_tokens,
                local_decode=config.local_decode,
            ),
            admission=Admission(
                max_requests=config.max_requests,
                max_tokens=config.max_waiting_tokens,
                max_wait_s=config.max_wait_s,
            ),
            max_outage_s=config.max_outage_s,
            watch=watch,
        )
        fleet, metrics = self._dispatcher.fleet, self._dispatcher.metrics
        self._clients = ClientFace(
            seams,
            config.bind,
            self._dispatcher,
            text,
            Admin(
                admin_key,
                fleet.stores,
                seams.clock,
                Operator(fleet.stores, fleet.workers, name=config.name, model=text.name),
            ),
            tasks=self._tasks,
            instance_id=seams.rng.new_id(),
            slow_reader_s=config.slow_reader_s,
        )
        self._http = HttpFace(
            self._dispatcher,
            text,
            clock=seams.clock,
            rng=seams.rng,
            tasks=self._tasks,
            more_metrics=lambda: cluster_metrics(
                fleet, metrics, model=text.name, gateway=config.name
            ),
            recent=watch.recent,
            drop_cache=lambda: drop_cache(fleet.stores),
            live=Live(fleet, metrics, gateway=config.name, model=text.name),
            host=config.host,
            port=config.http_port,
            access=access,
            slow_reader_s=config.slow_reader_s,
            listener=self._listener,
        )
        try:
            await self._http.start()
        except OSError as error:
            raise StartError(f"cannot serve HTTP: {error}") from error
        self._metrics = MetricsPort(self._http.metrics)
        await self._metrics.open(config.metrics_host, config.metrics_port)
        if seams.notifier.beat_every_s:
            self._tasks.spawn(seams.notifier.beat_on(), "beat")
        log.info("gateway_ready", http_port=self._http.port, clients=self._clients.endpoint)
        seams.notifier.status(f"waiting for {config.stores}")
        await first_of(self._tasks.spawn(fleet.has_store.wait(), "store"), self.failed)
        if self.failed.done():
            raise self.failed.result()

    async def drain(self) -> None:
        """Refuse new requests and finish those in flight; closing cancels what takes too long.

        With an inherited socket HTTP clients are refused nothing: what is here is served, and who
        connects now is another gateway's."""
        if self._clients is not None:
            self._clients.drain()
        if self._http is not None:
            await self._http.hand_over()
        if self._dispatcher is not None:
            await self._dispatcher.drain()

    async def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._http is not None:
            await self._http.close()
        if self._clients is not None:
            self._clients.close()
        await self._tasks.close()
        if self._dispatcher is not None:
            self._dispatcher.close()
        if self._text is not None:
            self._text.close()
        if self._spans is not None:
            await self._spans.close()
        if self._listener is not None:
            self._listener.close()

    def _describe(self) -> str:
        """For the status that the supervisor shows."""
        assert self._dispatcher is not None
        stats = self._dispatcher.stats()
        workers = ", ".join(f"{stats[f'{role}_workers']:.0f} {role}" for role in WORKER_ROLES)
        return f"serving: {stats['requests_running']:.0f} requests; workers: {workers}"

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(error)
