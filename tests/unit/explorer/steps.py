"""Steps of workers in the explored world, and what they read and write."""

from __future__ import annotations

from collections.abc import Iterator

from tests.unit.explorer.values import CACHED, COMMITTED, PREFILLS, PROMPT_TOKENS, Said
from tests.unit.explorer.world import DONE, LAST, MESS, Seq, World, full, partial


def target_of(process: int, seq: Seq) -> int:
    """How many positions a step brings the sequence to."""
    if process in PREFILLS:
        return 2 if seq.computed < 2 else PROMPT_TOKENS
    return LAST - 1 if seq.computed == PROMPT_TOKENS and seq.epoch == 1 else LAST


class Steps(World):
    """A world whose workers compute."""

    def reads(self, seq: Seq) -> Iterator[tuple[int, int]]:
        """The blocks that a step reads, and what must be in them."""
        prompt = self.prompts[seq.handoff]
        for index in range(seq.computed // 2):
            yield seq.blocks[index], full(prompt, index)

    def void_steps(self) -> None:
        """Steps that read what is not right any more compute nothing that may count."""
        for process, worker in enumerate(self.workers):
            if worker is None or not worker.step:
                continue
            step = tuple(
                (handoff, void or not self._reads_right(process, self.seq(process, handoff)))
                for handoff, void in worker.step
            )
            if step != worker.step:
                for handoff, void in step:
                    assert not (void and self.listens(handoff)), "read after free"
                self.workers[process] = worker._replace(step=step)

    def _reads_right(self, process: int, seq: Seq) -> bool:
        for block, content in self.reads(seq):
            final = self.store.blocks[block][0] in (COMMITTED, CACHED)
            if self.contents[block] != content:
                return False
            if not final and not self.may_write(process, seq, block):
                return False
        return True

    def plannable(self, process: int) -> list[Seq]:
        """The sequences that the next step would take, if they had the blocks."""
        phase = "ready" if process in PREFILLS else "active"
        return [each for each in self.worker(process).seqs if each.phase == phase and not each.over]

    def needs_block(self, process: int, seq: Seq) -> bool:
        return len(seq.blocks) * 2 < target_of(process, seq)

    def begin_step(self, process: int) -> bool:
        """All that can take part. False if none can."""
        chosen: list[tuple[int, bool]] = []
        for each in self.plannable(process):
            seq = self._grown(process, each)
            if seq is None:
                continue
            own = seq.blocks[seq.computed // 2] if seq.computed % 2 else None
            right = self._reads_right(process, seq) and (
                own is None
                or self.contents[own] == partial(self.prompts[seq.handoff], seq.computed // 2)
            )
            assert right or not self.listens(seq.handoff), "read after free"
            chosen.append((seq.handoff, not right))
        if not chosen:
            return False
        self.workers[process] = self.worker(process)._replace(step=tuple(chosen))
        for handoff, _ in chosen:
            for _, block in self.writes(process, self.seq(process, handoff)):
                self.contents[block] = MESS
        self.void_steps()
        return True

    def _grown(self, process: int, seq: Seq) -> Seq | None:
        """With blocks for its next positions, if need be a spare one; None without."""
        if not self.needs_block(process, seq):
            return seq
        worker = self.worker(process)
        if not worker.spare:
            return None
        seq = seq._replace(blocks=(*seq.blocks, worker.spare[0]))
        self.workers[process] = worker._replace(spare=worker.spare[1:])
        self.replace(process, seq)
        return seq

    def writes(self, process: int, seq: Seq) -> list[tuple[int, int]]:
        """The places in the table that a step fills, and their blocks."""
        first, end = seq.computed // 2, -(-target_of(process, seq) // 2)
        return list(enumerate(seq.blocks[first:end], first))

    def end_step(self, process: int, *, finish: bool) -> None:
        """What was computed goes out. `finish`: these were the last tokens."""
        worker = self.worker(process)
        step = worker.step
        assert step is not None
        self.workers[process] = worker._replace(step=None)
        for handoff, void in step:
            seq = self.seq(process, handoff)
            target, prompt = target_of(process, seq), self.prompts[handoff]
            for index, block in self.writes(process, seq):
                whole = (index + 1) * 2 <= target
                right = full(prompt, index) if whole else partial(prompt, index)
                self.contents[block] = MESS if void else right
            if not seq.over:
                seq = self._publish(process, seq._replace(computed=target))
                self._apply(process, seq, finish=finish)
            else:
                self.remove(process, seq, ("quit", handoff, seq.epoch, ()))
        self.pay(process)

    def _publish(self, process: int, seq: Seq) -> Seq:
        """Blocks that have become full are final."""
        end = seq.computed // 2
        if end > seq.committed:
            what = seq.epoch, seq.committed
            self.say(process, ("commit", seq.handoff, what, seq.blocks[seq.committed : end]))
            seq = seq._replace(committed=end)
        self.replace(process, seq)
        return seq

    def _apply(self, process: int, seq: Seq, *, finish: bool) -> None:
        """A token was drawn, or not."""
        handoff = seq.handoff
        if process in PREFILLS:
            if seq.computed < PROMPT_TOKENS:
                return
            self.remove(process, seq, ("seal", handoff, (seq.epoch, finish), ()))
        elif finish or seq.computed == LAST:
            finish = True
            self.remove(process, seq, ("release", handoff, seq.epoch, ()))
        if finish and self.listens(handoff):
            self.requests[handoff] = (DONE, (), ())

    def remove(self, process: int, seq: Seq, ending: Said) -> None:
        raise NotImplementedError

    def pay(self, process: int) -> None:
        raise NotImplementedError
