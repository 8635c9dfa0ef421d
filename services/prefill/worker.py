"""The prefill worker: computes prompts into blocks of the KV store and draws each first token.

The life of a request here:
1. A gateway sends `prefill` with the prompt, after decode has reserved a place for it.
2. `fill` asks the store for the blocks: cached ones are final, the rest are ours to write.
3. The scheduler takes the prompt into steps, chunk by chunk; each full block is committed at once,
   so that decode can attach to it, or pull it, while the rest is computed.
4. The last chunk's logits give token 0. It goes straight to the gateway, before the handoff.
5. `seal` tells the store that we write no more; the store tells decode to claim.
An abort at any point is confirmed with `quit` once our running step has ended.
"""

from __future__ import annotations

import structlog

from common.engine.work import Sampled, Work
from common.messages import Aborted, Fill, Load, Message, Ok, Prefill, Quit, Seal, StaleError
from common.step_times import due_at
from common.worker.runtime import WorkerRuntime
from common.worker.sequence import Sequence
from common.worker.store_link import StoreLink
from kvbaton.errors import KvbatonError, OverloadedError, ProtocolError
from services.prefill.scheduler import PrefillScheduler

log = structlog.get_logger()


class PrefillRole:
    """Decisions of a prefill worker; common.worker.runtime gives it sockets and steps."""

    def __init__(self, runtime: WorkerRuntime) -> None:
        config = runtime.config
        self._runtime = runtime
        self._scheduler = PrefillScheduler(config.max_num_batched_tokens, config.max_num_seqs)
        self._sequences: dict[str, Sequence] = {}
        self._max_held = config.max_num_seqs + config.max_waiting

    def load(self) -> Load:
        fits = self._runtime.step_fits
        return Load(
            num_running=len(self._sequences),
            num_tokens_queued=sum(seq.num_uncomputed for seq in self._sequences.values()),
            queued_s=fits.queued_s(self._sequences.values()),
            tokens_per_s=self._runtime.tokens_per_s,
            prompt_steps=fits.prompts,
            pulled_bytes_per_s=self._runtime.pulled_bytes_per_s,
            pushed_bytes_per_s=self._runtime.pushed_bytes_per_s,
            is_draining=self._runtime.is_draining,
            num_steps=self._runtime.num_steps,
        )

    def sequences(self) -> list[Sequence]:
        return list(self._sequences.values())

    def hand_on(self) -> None:
        """Give up the prompts that have not begun; the others are finished here."""
        for sequence in self.sequences():
            if not sequence.num_uses and sequence.num_computed == sequence.num_found:
                self._runtime.endings.drop(sequence, "unavailable", "the worker is shutting down")

    def stop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.handoff_id]

    def on_gateway(self, peer: bytes, message: Message) -> Message | None:
        if not isinstance(message, Prefill):
            raise ProtocolError(f"a prefill worker does not take {type(message).__name__}")
        if message.handoff_id in self._sequences:
            return Ok()  # said before
        if len(self._sequences) >= self._max_held:
            raise OverloadedError(
                f"{len(self._sequences)} prompts are queued here already", retry_after_s=1
            )
        sequence = self._runtime.new_sequence(peer, message)
        self._sequences[message.handoff_id] = sequence
        self._runtime.tasks.spawn(self._start(sequence), "fill")
        return Ok()

    def on_store(self, store: StoreLink, message: Message) -> None:
        if not isinstance(message, Aborted):
            return
        sequence = self._sequences.get(message.handoff_id)
        if sequence is None:
            store.link.send(Quit(handoff_id=message.handoff_id, epoch=message.epoch))
        else:
            self._runtime.endings.abort(sequence)

    async def _start(self, sequence: Sequence) -> None:
        """Get the blocks; make the cached ones readable here."""
        step = Fill(handoff_id=sequence.handoff_id, epoch=sequence.epoch)
        if await self._runtime.take_blocks(sequence, step):
            sequence.progress.joined_at = self._runtime.seams.clock.now()
            takes_s = self._runtime.step_fits.queued_s([sequence])
            self._scheduler.add(sequence, due_at(sequence.arrived_at, takes_s))
            self._runtime.wake()

    def plan(self) -> list[tuple[Sequence, Work]]:
        return self._runtime.works(self._scheduler.plan())

    def apply(self, sequence: Sequence, sampled: Sampled | None) -> None:
        if sampled is None:
            return
        finish_reason = sequence.finish_reason(self._runtime.info)
        self._runtime.emit(sequence, sampled, finish_reason)
        self._scheduler.remove(sequence)
        log.info(
            "prompt_computed",
            **sequence.names,
            num_tokens=sequence.num_prompt_tokens,
            num_found=sequence.num_found,
        )
        seal = Seal(
            handoff_id=sequence.handoff_id,
            epoch=sequence.epoch,
            first_token=sampled.token_id,
            finished=finish_reason is not None,
        )
        if self._runtime.store_of(sequence).mover.moves and finish_reason is None:
            self._runtime.tasks.spawn(self._push_rest(sequence, seal), "push-rest")
        else:
            self._runtime.endings.end(sequence, seal)

    async def _push_rest(self, sequence: Sequence, seal: Seal) -> None:
        """Send the unfinished last block too, which changes hands as it is, then hand over."""
        runtime = self._runtime
        with runtime.endings.using(sequence):
            await runtime.publisher.settle(sequence)
            first = sequence.num_committed
            rest = sequence.pieces(first, sequence.blocks[first:], [])
            mover = runtime.store_of(sequence).mover
            try:
                await mover.push(sequence.handoff_id, sequence.epoch, rest)
            except StaleError:
                runtime.endings.abort(sequence)
            except KvbatonError as error:
                runtime.endings.drop(sequence, "unavailable", error.message)
            else:
                runtime.endings.end(sequence, seal)
