"""Judges what ties a host to its cluster: keys, ports, model, stores. Pure, as checks.py."""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterator

from scripts.host.facts import Facts, StoreAnswer
from scripts.host.findings import ERROR, OK, WARNING, Finding

_COPY_MODEL = "copy the model folder from a host that serves, and use the same KVBATON_DTYPE"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def of_cluster(facts: Facts) -> Iterator[Finding]:
    """Everything of this kind."""
    for check in (_keys, _ports, _model, _stores):
        yield from check(facts)


def _keys(facts: Facts) -> Iterator[Finding]:
    for key in facts.keys:
        if key.mode is None:
            yield Finding(
                ERROR,
                "keys",
                f"{key.path}: {key.error}",
                "copy it from where scripts/keygen made the cluster's keys, or run it once there",
            )
        elif key.mode & (_OTHERS if key.is_secret else _WRITABLE):
            wanted = "600" if key.is_secret else "go-w"
            may = "read" if key.is_secret else "write"
            yield Finding(
                ERROR,
                "keys",
                f"others may {may} {key.path} (mode {key.mode:04o})",
                f"chmod {wanted} {key.path}",
            )
    if facts.keys and all(key.mode is not None for key in facts.keys):
        yield Finding(OK, "keys", f"{len(facts.keys)} files are there")


def _ports(facts: Facts) -> Iterator[Finding]:
    owners: dict[int, list[str]] = defaultdict(list)
    for bind in facts.binds:
        if bind.port:
            owners[bind.port].append(bind.owner)
        if bind.error:
            yield Finding(
                WARNING,
                "ports",
                f"port {bind.port} of {bind.address}, for {bind.owner}: {bind.error}",
                f"nothing, if {bind.owner} runs by now; else see `ss -ltnp`, or choose another",
            )
    clashes = {port: names for port, names in owners.items() if len(names) > 1}
    for port, names in clashes.items():
        yield Finding(
            ERROR,
            "ports",
            f"port {port} is to be for {' and for '.join(names)}",
            "give each a port of its own: KVBATON_BIND and KVBATON_DATA_BIND in /etc/kvbaton/*.env",
        )
    if facts.binds and not clashes:
        yield Finding(OK, "ports", f"{len(facts.binds)} ports, no two alike")


def _model(facts: Facts) -> Iterator[Finding]:
    model = facts.model
    if model is None:
        return
    if model.error:
        yield Finding(
            ERROR,
            "model",
            f"{model.folder}: {model.error}",
            "KVBATON_MODEL must name a Hugging Face folder, the same on every host",
        )
    elif model.fingerprint:
        yield Finding(OK, "model", f"{model.folder} gives tokens; it is {model.fingerprint[:12]}")
    else:
        yield Finding(OK, "model", f"{model.folder} is there; --load-model tries it")


def _stores(facts: Facts) -> Iterator[Finding]:
    own = facts.model.fingerprint if facts.model else ""
    for store in facts.stores:
        level, message, remedy = _verdict(store, own, is_local="kvstore" in facts.roles)
        asked = f"{store.endpoint}, asked with the key of {store.as_role}"
        yield Finding(level, "stores", f"{asked}: {message}", remedy)


def _verdict(store: StoreAnswer, own: str, *, is_local: bool) -> tuple[str, str, str]:
    """Level, message and remedy. `own`: fingerprint of the model here, if it was loaded."""
    if not store.is_open:
        yet = "nothing, if it is this host's and is yet to be started; else see KVBATON_STORES"
        away = "start it; check KVBATON_STORES, its KVBATON_BIND, and firewalls on the way"
        return (WARNING, store.problem, yet) if is_local else (ERROR, store.problem, away)
    if store.field == "fingerprint":
        return ERROR, store.problem, _COPY_MODEL
    if "version" in store.problem:
        remedy = "install the same release of kvbaton on all hosts: see docs/systemd.md"
        return ERROR, store.problem, remedy
    if store.problem:
        remedy = "keys of this cluster are needed: copy ROLE.key and public.json from its keygen"
        return ERROR, store.problem, remedy
    if own and store.fingerprint not in ("", own):
        message = f"it serves model {store.fingerprint[:12]}, here is {own[:12]}"
        return ERROR, message, _COPY_MODEL
    serves = f", serves model {store.fingerprint[:12]}" if store.fingerprint else ""
    return OK, f"it would take us in{serves}", ""
