"""What a store answers to an operator: it looks at its books, asks its workers, passes words on.

The books are audit.py, the rows audit_rows.py; here are the questions under way and their time.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

import structlog

from common.log import change_log_level
from common.messages import (
    AskAudit,
    AskStatus,
    AskWhy,
    Audited,
    Holdings,
    Member,
    Message,
    Ok,
    ReportHoldings,
    SetLogLevel,
    StatusTold,
    Told,
)
from common.net.server import failed
from common.seams import Clock
from common.service import Tasks
from kvbaton.admin import MAX_ROWS, StoreAudit, StoreHistory
from kvbaton.errors import KvbatonError, OverloadedError
from services.kvstore.audit import View, check_books, compare, view_of
from services.kvstore.audit_rows import (
    standing_of_block,
    standing_of_requests,
    store_audit,
    store_history,
)
from services.kvstore.broker import Broker
from services.kvstore.members import Members
from services.kvstore.status import member_statuses, store_status
from services.kvstore.writers import Writers

log = structlog.get_logger()

ANSWER_TIMEOUT_S = 1.5
_MAX_AUDITS = 8  # at once
_MAX_NAMES = 4096  # of members, gone ones too

Question = AskAudit | AskWhy | AskStatus | Holdings | SetLogLevel


class _Question:
    """One worker, asked what it holds. `answer` becomes the discrepancies."""

    def __init__(self, member: Member, view: View) -> None:
        self.member = member
        self.view = view
        self.answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()


class Admin:
    """Answers operators. `name` is the store's; `broker()` is None before the first worker has
    joined.

    `send(member_id, message)` queues a message for a member, if it is still there.
    """

    def __init__(
        self,
        clock: Clock,
        tasks: Tasks,
        members: Members,
        writers: Writers,
        *,
        name: str,
        send: Callable[[str, Message], None],
        broker: Callable[[], Broker | None],
    ) -> None:
        self._store_name = name
        self._started_at = clock.now()
        self._clock = clock
        self._tasks = tasks
        self._members = members
        self._writers = writers
        self._send = send
        self._broker = broker
        self._names: OrderedDict[str, str] = OrderedDict()
        self._num_audits = 0  # ever: an id for each
        self._audits: dict[int, dict[str, _Question]] = {}  # under way, by member id

    def joined(self, member: Member) -> None:
        """Remember who a member is, for when it has gone."""
        self._names[member.member_id] = member.name
        if len(self._names) > _MAX_NAMES:
            self._names.popitem(last=False)

    def handle(self, sender: Member, message: Question) -> Message | None:
        """A question of a gateway, or a worker's answer. Raises KvbatonError to refuse it."""
        if isinstance(message, SetLogLevel):
            self._set_log_level(message)
            return Ok()
        if isinstance(message, AskStatus):
            return self._status()
        if isinstance(message, Holdings):
            self._on_holdings(sender, message)
            return None
        if isinstance(message, AskWhy):
            return Told(history=self._history(message))
        if len(self._audits) >= _MAX_AUDITS:
            raise OverloadedError(f"{_MAX_AUDITS} audits are under way", retry_after_s=1)
        self._num_audits += 1
        questions = self._audits[self._num_audits] = self._ask(self._num_audits)
        answer = self._audit(self._num_audits, questions, sender.member_id, message.call_id)
        self._tasks.spawn(answer, "audit")
        return None

    def _name(self, member_id: str) -> str:
        return self._names.get(member_id, member_id)

    # ---- status and log level -----------------------------------------------------------------

    def _status(self) -> StatusTold:
        broker, now = self._broker(), self._clock.now()
        ledger = None if broker is None else broker.ledger
        members = member_statuses(self._members, self._writers.all_lost(), now)
        return StatusTold(
            status=store_status(self._store_name, now - self._started_at, ledger),
            members=list(members)[:MAX_ROWS],
        )

    def _set_log_level(self, message: SetLogLevel) -> None:
        if not message.member_ids:
            change_log_level(message.level)
        for member_id in message.member_ids:
            if self._members.role_of(member_id) == "gateway":
                self._send(member_id, SetLogLevel(level=message.level))

    # ---- audit --------------------------------------------------------------------------------

    def _ask(self, audit_id: int) -> dict[str, _Question]:
        broker = self._broker()
        if broker is None:
            return {}
        questions = {}
        for member in self._members.everyone():
            if member.role != "gateway":
                view = view_of(broker.ledger, member.member_id)
                questions[member.member_id] = _Question(member, view)
                self._send(member.member_id, ReportHoldings(audit_id=audit_id))
        return questions

    def _on_holdings(self, sender: Member, message: Holdings) -> None:
        question = self._audits.get(message.audit_id, {}).get(sender.member_id)
        broker = self._broker()
        if question is None or broker is None or question.answer.done():
            return  # too late
        view = view_of(broker.ledger, sender.member_id)
        question.answer.set_result(compare(question.view, message, view))

    async def _audit(
        self, audit_id: int, questions: dict[str, _Question], gateway_id: str, call_id: int
    ) -> None:
        answer: Message
        try:
            if questions:
                answers = [question.answer for question in questions.values()]
                await asyncio.wait(answers, timeout=ANSWER_TIMEOUT_S)
            answer = Audited(call_id=call_id, audit=self._books(questions))
        except Exception:
            log.exception("audit_failed")
            answer = failed(KvbatonError("the audit failed: see the store's log"), call_id)
        finally:
            del self._audits[audit_id]
        self._send(gateway_id, answer)

    def _books(self, questions: dict[str, _Question]) -> StoreAudit:
        broker = self._broker()
        if broker is None:
            return StoreAudit()
        ledger = broker.ledger
        now = self._clock.now()
        here, lost = self._members.everyone(), self._writers.all_lost()
        known = {member.member_id for member in [*here, *lost]}
        discrepancies = check_books(ledger, known.__contains__)
        warnings = []
        answers = {}
        for member_id, question in questions.items():
            name = question.member.name
            if not question.answer.done():
                gone = "" if member_id in known else ": it has left"
                answers[member_id] = "did not answer"
                warnings.append(f"{name} did not answer{gone}; what it holds is not verified")
            else:
                differences = question.answer.result()
                answers[member_id] = "differs" if differences else "agrees"
                discrepancies += [f"{name}: {each}" for each in differences]
        ages = {each: now - at for each, at in broker.history.opened_at().items()}
        return store_audit(
            ledger,
            here,
            lost,
            answers,
            name=self._name,
            ages={each: ages[each] for each in ledger.handoffs if each in ages},
            discrepancies=discrepancies,
            warnings=warnings,
        )

    # ---- why ----------------------------------------------------------------------------------

    def _history(self, message: AskWhy) -> StoreHistory:
        broker = self._broker()
        if broker is None:
            return StoreHistory()
        ledger, history = broker.ledger, broker.history
        if message.block is not None:
            events = history.of_block(message.block)
            standing = standing_of_block(ledger, message.block, self._name)
        else:
            events = history.of_requests(message.names)
            standing = standing_of_requests(ledger, message.names)
        return store_history(
            events,
            self._clock.now(),
            standing=standing,
            num_forgotten=history.num_forgotten,
            name=self._name,
        )
