"""How members of the explored world end sequences, what they hear, and what they begin."""

from __future__ import annotations

from tests.unit.explorer.connections import Connections
from tests.unit.explorer.values import DECODES, GATEWAY, PREFILLS, PROMPT_TOKENS, Said
from tests.unit.explorer.world import CALLS, DONE, LAST, LISTENING, OPENING, Seq


class Members(Connections):
    """A world whose members react."""

    # ---- sequences that end ----------------------------------------------------------------------

    def in_use(self, process: int, seq: Seq) -> bool:
        step = self.worker(process).step or ()
        return seq.phase in CALLS or any(handoff == seq.handoff for handoff, _ in step)

    def abort(self, process: int, seq: Seq) -> None:
        """It is over; the store is told once nothing uses its blocks."""
        if self.in_use(process, seq):
            self.replace(process, seq._replace(over=True))
        else:
            self.remove(process, seq, ("quit", seq.handoff, seq.epoch, ()))

    def remove(self, process: int, seq: Seq, ending: Said) -> None:
        worker = self.worker(process)
        seqs = tuple(each for each in worker.seqs if each.handoff != seq.handoff)
        self.workers[process] = worker._replace(seqs=seqs)
        if seq.incarnation == self.links[process].incarnation:
            if process in DECODES:
                self.add_spare(process, seq.blocks[seq.committed :])
            self.say(process, ending)

    def add_spare(self, process: int, blocks: tuple[int, ...]) -> None:
        """Blocks that are ours and unused. All go back when nothing runs."""
        worker = self.worker(process)
        worker = worker._replace(spare=worker.spare + blocks, starved=worker.starved and not blocks)
        if worker.spare and not self.plannable(process):
            self.say(process, ("give_back", 0, 0, worker.spare))
            worker = worker._replace(spare=())
        self.workers[process] = worker

    # ---- what is heard ---------------------------------------------------------------------------

    def hear(self, process: int, said: Said) -> None:
        """A process's reaction to a message of the store."""
        kind, handoff, what, blocks = said
        if kind == "welcome":
            self.welcomed(process)
        elif process == GATEWAY:
            self._gateway_hears(kind, handoff)
        elif kind == "leased":
            self._leased(process, blocks)
        elif kind != "ok":
            seq = self.find(process, handoff)
            if seq is not None:
                self._sequence_hears(process, seq, said)
            elif kind == "aborted":
                self.say(process, ("quit", handoff, what, ()))
            else:
                assert kind != "granted", "nobody holds what was granted"

    def _gateway_hears(self, kind: str, handoff: int) -> None:
        status, prefill, decode = self.requests[handoff] if kind != "ok" else (DONE, (), ())
        if kind == "opened":
            if status == OPENING and self._place(handoff, prefill, decode):
                self.requests[handoff] = (LISTENING, prefill, decode)
                return
            self.requests[handoff] = (DONE, (), ())
            self.say(GATEWAY, ("abort", handoff, 0, ()))
        elif kind == "refused":
            self.requests[handoff] = (DONE, (), ())
        elif kind == "aborted":
            self.requests[handoff] = (DONE, (), ())
            self.say(GATEWAY, ("abort", handoff, 0, ()))

    def _place(self, handoff: int, prefill: tuple[int, int], decode: tuple[int, int]) -> bool:
        """Ask decode, then prefill to work for it. They refuse if they are others now."""
        for process, incarnation in (decode, prefill):
            link = self.links[process]
            if not link.alive or link.incarnation != incarnation:
                return False
            phase = "fill" if process in PREFILLS else "reserved"
            worker = self.worker(process)
            seqs = (*worker.seqs, Seq(handoff, 1, incarnation, phase))
            self.workers[process] = worker._replace(seqs=seqs)
        self.say(prefill[0], ("fill", handoff, 1, ()))
        return True

    def _leased(self, process: int, blocks: tuple[int, ...]) -> None:
        worker = self.worker(process)
        starved = not blocks and not worker.spare
        self.workers[process] = worker._replace(asking=False, starved=starved)
        self.add_spare(process, blocks)

    def _sequence_hears(self, process: int, seq: Seq, said: Said) -> None:
        kind, handoff, what, blocks = said
        if kind == "granted":
            assert seq.phase in CALLS
            self._granted(process, seq, what, blocks)
        elif kind == "refused":
            seq = seq._replace(phase="refused")
            self.replace(process, seq)
            self.remove(process, seq, ("quit", handoff, seq.epoch, ()))
        elif kind == "aborted":
            if not seq.over:
                self.abort(process, seq)
        elif kind == "sealed" and seq.phase == "reserved":
            self.replace(process, seq._replace(phase="claim"))
            self.say(process, ("claim", handoff, seq.epoch, ()))
        elif kind == "opened":
            self.replace(process, seq._replace(phase="refill", epoch=what))
            self.say(process, ("fill", handoff, what, ()))

    def _granted(self, process: int, seq: Seq, committed: int, blocks: tuple[int, ...]) -> None:
        if process in PREFILLS:
            phase, computed = "ready", 2 * committed
        else:
            phase = "active"
            computed = PROMPT_TOKENS if seq.phase == "claim" else min(2 * committed, LAST - 1)
        seq = seq._replace(phase=phase, blocks=blocks, committed=committed, computed=computed)
        self.replace(process, seq)
        if seq.over:
            self.remove(process, seq, ("quit", seq.handoff, seq.epoch, ()))

    # ---- what they begin -------------------------------------------------------------------------

    def cancel(self, handoff: int) -> None:
        """Its client has gone."""
        kind = "abort_open" if self.requests[handoff][0] == OPENING else "abort"
        self.requests[handoff] = (DONE, (), ())
        self.say(GATEWAY, (kind, handoff, 0, ()))

    def open(self, handoff: int, prefill: int, decode: int) -> None:
        who = tuple((each, self.links[each].incarnation) for each in (prefill, decode))
        self.requests[handoff] = (OPENING, *who)
        self.say(GATEWAY, ("open", handoff, who, ()))

    def lacks_block(self, process: int) -> bool:
        """Whether a sequence of decode sits out for want of a block."""
        worker = self.worker(process)
        needy = any(self.needs_block(process, seq) for seq in self.plannable(process))
        return needy and not worker.spare and worker.step is None

    def lease(self, process: int) -> None:
        self.workers[process] = self.worker(process)._replace(asking=True)
        self.say(process, ("lease", 0, 1, ()))

    def suspend(self, process: int, seq: Seq) -> None:
        """It gives way to the others."""
        waiting = seq._replace(phase="suspend", blocks=(), committed=0, computed=0)
        self.replace(process, waiting)
        self.workers[process] = self.worker(process)._replace(starved=False)
        self.add_spare(process, seq.blocks[seq.committed :])
        self.say(process, ("suspend", seq.handoff, (seq.epoch, LAST), ()))
