"""A LedgerWorld whose messages come as a network brings them: late, again, or not at all."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from common.messages import Message
from common.net.order import Incoming, Verdict, first_number
from tests.unit.ledger_world import LedgerWorld


class Packet(NamedTuple):
    """A message on its way to the store."""

    sender: str
    number: int
    message: Message


class WireWorld(LedgerWorld):
    """Each member's messages are numbered. `fates` says of the next ones whether they come "late"
    or are "lost"; each member of which something is missing is lost, and another joins."""

    def __init__(self, num_blocks: int, members: list[str], *, growth_blocks: int = 1) -> None:
        super().__init__(num_blocks, members, growth_blocks=growth_blocks)
        self.fates: deque[str] = deque()
        self.sent: list[Packet] = []
        self.late: list[Packet] = []
        self.num_ignored = 0
        self.num_cut_off = 0
        self._incoming: dict[str, Incoming] = {}
        self._next_number: dict[str, int] = {}

    def tell(self, sender: str, message: Message) -> Message | None:
        number = self._next_number.setdefault(sender, first_number(0) + 1)  # the hello had it
        self._next_number[sender] += 1
        packet = Packet(sender, number, message)
        self.sent.append(packet)
        fate = self.fates.popleft() if self.fates else ""
        if fate == "late":
            self.late.append(packet)
        return None if fate else self.arrive(packet)

    def arrive(self, packet: Packet) -> Message | None:
        """The store takes a message if it is the next of its sender's."""
        sender, number, message = packet
        if sender not in self.alive:
            return None  # it must say hello first
        incoming = self._incoming.setdefault(sender, Incoming(first_number(0) + 1))
        verdict = incoming.take(number)
        self.num_ignored += verdict is Verdict.SEEN
        if verdict is Verdict.GAP:
            self.num_cut_off += 1
            self.alive.add(f"{sender.split('-')[0]}-again-{self.num_cut_off}")
            self.lose(sender)
        return super().tell(sender, message) if verdict is Verdict.NEXT else None

    def end(self) -> None:
        """Of whom something is missing is found out by a heartbeat."""
        self.fates.clear()
        for sender, number in self._next_number.items():
            incoming = self._incoming.get(sender)
            expected = incoming.expected if incoming else first_number(0) + 1
            if sender in self.alive and expected != number:
                self.lose(sender)
        super().end()
