"""What a store tells others of how it is: gateways, those who read its metrics, its supervisor."""

from __future__ import annotations

from collections.abc import Callable

from common.cluster_metrics import StoreRow, store_families
from common.messages import Members as MembersMessage
from common.messages import Message
from common.metrics import exposition, render
from services.kvstore.audit_rows import handoffs_by_state
from services.kvstore.members import Members
from services.kvstore.serving import Serving


class News:
    """Of one store.

    `serving()` is what it serves, None before the first worker has joined; `counted()` what is
    counted beside that. `send(member_id, message)` queues a message for a member.
    """

    def __init__(
        self,
        name: str,
        members: Members,
        *,
        serving: Callable[[], Serving | None],
        counted: Callable[[], dict[str, float]],
        send: Callable[[str, Message], None],
    ) -> None:
        self._name = name
        self._members = members
        self._serving = serving
        self._counted = counted
        self._send = send
        self._shown: MembersMessage | None = None  # what gateways were told last

    def tell(self) -> None:
        """Tell the gateways, if there is news."""
        news = MembersMessage(members=self._members.workers())
        if (serving := self._serving()) is not None:
            ledger = serving.ledger
            news.blocks = ledger.pool.counts()
            news.handoffs, news.counters = handoffs_by_state(ledger), self.counters()
            news.num_handoffs, news.num_waiting = len(ledger.handoffs), ledger.num_waiting
        if news == self._shown:
            return
        self._shown = news
        for gateway in self._members.gateways():
            self._send(gateway.member_id, news)

    def tell_again(self) -> None:
        """Somebody has not heard what the others have."""
        self._shown = None
        self.tell()

    def counters(self) -> dict[str, float]:
        """For /metrics of the gateways."""
        serving = self._serving()
        return {**(serving.counters() if serving is not None else {}), **self._counted()}

    def metrics(self) -> bytes:
        """For its own /metrics."""
        serving = self._serving()
        ledger = serving.ledger if serving is not None else None
        row = StoreRow(
            self._name,
            ledger.pool.counts() if ledger is not None else {},
            handoffs_by_state(ledger) if ledger is not None else {},
            self.counters(),
        )
        return exposition() + render(store_families([row]))

    def describe(self) -> str:
        """For the status that the supervisor shows."""
        text = f"serving: {len(self._members.everyone())} members"
        serving = self._serving()
        if serving is None:
            return f"{text}, no worker yet"
        pool = serving.ledger.pool
        return (
            f"{text}, {len(serving.ledger.handoffs)} handoffs, "
            f"{pool.num_available} of {pool.num_blocks} blocks free or cached"
        )
