"""Connections of the explored world: numbered messages, hellos, and who has stopped."""

from __future__ import annotations

from common.net.order import Incoming, Verdict, first_number, is_of_connection
from tests.unit.explorer.steps import Steps
from tests.unit.explorer.values import GATEWAY, Event, Said
from tests.unit.explorer.world import CALLS, DONE, LISTENING, OPENING, Link, Seq


class Connections(Steps):
    """A world whose members connect to the store."""

    def say(self, process: int, said: Said) -> None:
        link = self.links[process]
        self.up[process] += ((link.connection, link.next_up, said),)
        self.links[process] = link._replace(next_up=link.next_up + 1)

    def start_anew(self, process: int) -> None:
        """Hello again, as another member; calls in flight have failed."""
        link = self.links[process]
        self.links[process] = Link(
            incarnation=link.incarnation + 1,
            connection=link.connection + 1,
            next_up=0,
            expected=0,
            welcomed=False,
            owed=tuple(range(link.incarnation + 1)),
        )
        self.say(process, ("hello", 0, link.incarnation + 1, ()))
        if process == GATEWAY:
            for handoff, request in enumerate(self.requests):
                if request[0] == OPENING:
                    self.requests[handoff] = (DONE, (), ())
            return
        for seq in self.worker(process).seqs:
            if seq.phase in (*CALLS, "suspend"):
                self.remove(process, seq, ("quit", seq.handoff, seq.epoch, ()))
        self.workers[process] = self.worker(process)._replace(asking=False)

    def welcomed(self, process: int) -> None:
        """What we held as the former member is lost."""
        self.links[process] = self.links[process]._replace(welcomed=True)
        if process == GATEWAY:
            for handoff, request in enumerate(self.requests):
                if request[0] == LISTENING:
                    self.requests[handoff] = (DONE, (), ())
        else:
            for seq in self.worker(process).seqs:
                self.abort(process, seq)
            self.workers[process] = self.worker(process)._replace(
                spare=(), asking=False, starved=False
            )
        self.pay(process)

    def pay(self, process: int) -> None:
        """Say of former members that they have stopped, once no step runs."""
        link, worker = self.links[process], self.workers[process]
        if link.welcomed and link.owed and (worker is None or worker.step is None):
            for incarnation in link.owed:
                self.say(process, ("stopped", 0, incarnation, ()))
            self.links[process] = self.links[process]._replace(owed=())

    def receive(self, process: int) -> Said | None:
        """The store's next message to a process, if it is not ignored."""
        (connection, number, said), *rest = self.down[process]
        self.down[process] = tuple(rest)
        link = self.links[process]
        if said[0] == "hello_required":
            if _is_of(connection, number, link.connection):
                self.start_anew(process)
            return None
        verdict = _judge(link.connection, link.expected, connection, number)
        if verdict is Verdict.GAP:
            self.start_anew(process)
        if verdict is not Verdict.NEXT:
            return None
        self.links[process] = link._replace(expected=link.expected + 1)
        return said

    def arrive(self, process: int) -> Event | None:
        """A process's next message at the store: what the store has to do for it."""
        (connection, number, said), *rest = self.up[process]
        self.up[process] = tuple(rest)
        if said[0] == "hello":
            if connection <= self.hellos[process]:
                return None
            self.hellos[process] = connection
            self.conns[process] = (connection, 1, 0)
            return "join", process, said[2]
        conn = self.conns[process]
        if conn is not None:
            verdict = _judge(conn[0], conn[1], connection, number)
            if verdict is Verdict.SEEN:
                return None
            if verdict is Verdict.NEXT:
                self.conns[process] = conn = (conn[0], conn[1] + 1, conn[2])
                if said[0] == "beat":
                    self.tell(process, ("ok", 0, 0, ()), conn)
                    return None
                return "say", process, self.store.members[process], said
            self.conns[process] = None
        self.down[process] += ((connection, number, ("hello_required", 0, 0, ())),)
        member = self.store.members[process]
        return ("lose", process, member) if conn is not None else None

    def skip(self, process: int) -> list[str]:
        """Take what will be ignored out of the way, whenever it comes. Returns what it was."""
        skipped: list[str] = []
        link, conn = self.links[process], self.conns[process]
        while self.down[process]:
            connection, number, said = self.down[process][0]
            if said[0] == "hello_required":
                is_news = _is_of(connection, number, link.connection)
            else:
                verdict = _judge(link.connection, link.expected, connection, number)
                is_news = verdict is not Verdict.SEEN
            if is_news:
                break
            skipped.append(said[0])
            self.down[process] = self.down[process][1:]
        while self.up[process]:
            connection, number, said = self.up[process][0]
            if said[0] == "hello":
                is_news = connection > self.hellos[process]
            else:
                is_news = (
                    conn is None or _judge(conn[0], conn[1], connection, number) is not Verdict.SEEN
                )
            if is_news:
                break
            skipped.append(said[0])
            self.up[process] = self.up[process][1:]
        return skipped

    def abort(self, process: int, seq: Seq) -> None:
        raise NotImplementedError


def _judge(connection: int, expected: int, of_connection: int, number: int) -> Verdict:
    """What one who expects a number of a connection makes of another."""
    incoming = Incoming(first_number(connection) + expected)
    return incoming.take(first_number(of_connection) + number)


def _is_of(connection: int, number: int, other: int) -> bool:
    return is_of_connection(first_number(connection) + number, first_number(other))
