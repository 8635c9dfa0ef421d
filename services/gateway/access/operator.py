"""An operator's commands: who is there, drain a worker, change what members log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import msgspec

from common.config_file import nearest
from common.log import change_log_level
from common.messages import AskStatus, Drain, Message, SetLogLevel, StatusTold
from common.net.link import Link
from kvbaton import operations
from kvbaton.errors import (
    InvalidRequestError,
    KvbatonError,
    NotFoundError,
    UnavailableError,
)
from kvbaton.operations import ALL, MemberStatus, StoreStatus
from kvbaton.version import VERSION
from services.gateway.access.asking import ANSWER_TIMEOUT_S, ask
from services.gateway.routing.peers import Store, Worker

MIN_ID_CHARS = 8  # of a member's id, that it can be known by


class Operator:
    """Carries out commands for the gateway `name`, which serves `model`. `workers` are those that
    it knows by now."""

    def __init__(
        self,
        stores: Sequence[Store],
        workers: Mapping[str, Worker],
        *,
        name: str = "",
        model: str = "",
    ) -> None:
        self._stores = stores
        self._workers = workers
        self._name = name
        self._model = model

    async def answer(self, message: operations.Operation) -> operations.Outcome:
        """Carry it out. Raises the KvbatonError that it ends with."""
        if isinstance(message, operations.Drain):
            return await self._drain(message)
        if isinstance(message, operations.SetLogLevel):
            return await self._set_log_level(message)
        told = await self._ask_stores()
        return operations.Standing(
            id=message.id,
            gateway=self._name,
            model=self._model,
            version=VERSION,
            members=merged([each.members for each in told]),
            stores=[each.status for each in told],
        )

    async def _ask_stores(self) -> list[StatusTold]:
        return await asyncio.gather(*(_told(store) for store in self._stores))

    # ---- drain --------------------------------------------------------------------------------

    async def _drain(self, message: operations.Drain) -> operations.Drained:
        worker = self._worker(message.member)
        name, role = worker.member.name, worker.member.role
        others = [each for each in self._workers.values() if each is not worker]
        is_last = not any(_takes_work(each, role) for each in others)
        if is_last and _takes_work(worker, role) and not message.force:
            raise InvalidRequestError(
                f"no other {role} worker takes work: start one before {name} is drained, or force "
                "it",
                field="member",
            )
        if not worker.member_ids:
            raise UnavailableError(f"no KV store knows {name} just now", retry_after_s=1)
        member_id = next(iter(worker.member_ids.values()))
        await worker.link.call(Drain(worker_id=member_id), timeout_s=None)
        return operations.Drained(id=message.id, name=name, member_id=member_id)

    def _worker(self, wanted: str) -> Worker:
        workers = list(self._workers.values())
        found = [
            worker
            for worker in workers
            if is_meant(wanted, worker.member.name, worker.member_ids.values())
        ]
        if len(found) > 1:
            ids = [next(iter(each.member_ids.values()), "unknown") for each in found]
            raise InvalidRequestError(
                f"{len(found)} workers are called {wanted}: say the id, {' or '.join(ids)}",
                field="member",
            )
        if not found:
            raise _nobody("worker", wanted, [each.member.name for each in workers])
        return found[0]

    # ---- log level ----------------------------------------------------------------------------

    async def _set_log_level(self, message: operations.SetLogLevel) -> operations.LogLevelSet:
        told = await self._ask_stores()
        calls = list(chain(self._members_meant(message), self._others_meant(message, told)))
        names, problems = [], {}
        if is_meant(message.member, self._name, self._own_ids()):
            change_log_level(message.level)
            names.append(self._name)
        results = await asyncio.gather(*(_call(link, said) for _, link, said in calls))
        for (name, _, _), problem in zip(calls, results, strict=True):
            if problem:
                problems[name] = problem
            else:
                names.append(name)
        if message.member == ALL:
            problems |= {each.status.endpoint: p for each in told if (p := each.status.problem)}
        if not names and not problems:
            known = [self._name, *(each.status.name for each in told)]
            known += [each.name for store in told for each in store.members]
            raise _nobody("member", message.member, known)
        return operations.LogLevelSet(id=message.id, names=sorted(names), problems=problems)

    def _own_ids(self) -> list[str]:
        return [store.member_id for store in self._stores]

    def _members_meant(self, message: operations.SetLogLevel) -> Iterator[_Call]:
        """The workers that are meant: told by ourselves."""
        for worker in self._workers.values():
            if is_meant(message.member, worker.member.name, worker.member_ids.values()):
                yield worker.member.name, worker.link, SetLogLevel(level=message.level)

    def _others_meant(
        self, message: operations.SetLogLevel, told: Sequence[StatusTold]
    ) -> Iterator[_Call]:
        """The stores that are meant, and the other gateways, which one of their stores tells."""
        done = set()
        own_ids = self._own_ids()
        for store, each in zip(self._stores, told, strict=True):
            if each.status.name and is_meant(message.member, each.status.name, ()):
                yield each.status.name, store.link, SetLogLevel(level=message.level)
            for member in each.members:
                key = _process(member)
                if member.role != "gateway" or member.member_id in own_ids or key in done:
                    continue
                if is_meant(message.member, member.name, [member.member_id]):
                    done.add(key)
                    said = SetLogLevel(level=message.level, member_ids=[member.member_id])
                    yield member.name, store.link, said


_Call = tuple[str, Link, Message]  # who is told, by which way, and what


def is_meant(wanted: str, name: str, member_ids: Iterable[str]) -> bool:
    """Whether an operator's word for a member fits this one: its name, an id of it or how one
    begins, or all."""
    by_id = len(wanted) >= MIN_ID_CHARS and any(each.startswith(wanted) for each in member_ids)
    return wanted in (name, ALL) or by_id


def merged(members: Sequence[Sequence[MemberStatus]]) -> list[MemberStatus]:
    """Each process once, though every store lists it, and may list what it was before as lost; as
    the first store does to which it is not. By role, then decode.2 before decode.10."""
    listed = [each for of_store in reversed(members) for each in of_store]
    listed.sort(key=lambda each: each.state != "lost")
    by_process = {_process(each): each for each in listed}
    order = ("gateway", "prefill", "decode")
    return sorted(
        by_process.values(),
        key=lambda each: (order.index(each.role), len(each.name), each.name, each.member_id),
    )


def _process(member: MemberStatus) -> tuple[str, int, str]:
    return member.host_id, member.pid, member.name


def _takes_work(worker: Worker, role: str) -> bool:
    is_here = bool(worker.member_ids) and not worker.is_lost
    return worker.member.role == role and is_here and not worker.load.is_draining


def _nobody(what: str, wanted: str, names: Sequence[str]) -> NotFoundError:
    known = sorted({name for name in names if name})
    hint = nearest(wanted, known) or f"; there are {', '.join(known) or 'none'}"
    return NotFoundError(f"there is no {what} {wanted}{hint}", field="member")


async def _told(store: Store) -> StatusTold:
    try:
        told = await ask(store, AskStatus(), StatusTold)
    except KvbatonError as error:
        told = StatusTold(status=StoreStatus(problem=error.message), members=[])
    status = msgspec.structs.replace(told.status, store=store.index, endpoint=store.link.endpoint)
    return msgspec.structs.replace(told, status=status)


async def _call(link: Link, message: Message) -> str:
    """Why it could not be said; "" if it was."""
    try:
        await link.call(message, timeout_s=ANSWER_TIMEOUT_S)
    except KvbatonError as error:
        return error.message
    return ""
