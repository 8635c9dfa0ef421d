"""The prefill worker: computes prompts into blocks of the KV store and draws each first token.

The life of a request here:
1. A gateway sends `prefill` with the prompt, after decode has reserved a place for it.
2. `fill` asks the store for the blocks: cached ones are final, the rest are ours to write.
3. The scheduler takes the prompt into steps, chunk by chunk; each full block is committed at once,
   so that decode can attach to it, or pull it, while the rest is computed.
4. The last chunk's logits give token 0. It goes straight to the gateway, before the handoff.
5. `seal` tells the store that we write no more; the store tells decode to claim.
An abort at any point is confirmed with `quit` once our running step has ended.

Where decode workers are at their limit a gateway sends `reserve` instead: what is computed stays
here, and we are its decode worker (services/decode/worker.py). Our prompts then share our steps
with its tokens, and are cut so that these come in time.
"""

from __future__ import annotations

import msgspec
import structlog

from common.engine.work import Sampled, Work
from common.messages import (
    Aborted,
    Fill,
    Load,
    Message,
    Ok,
    Prefill,
    Reserve,
    Seal,
    StaleError,
)
from common.step_times import due_at
from common.worker.runtime import WorkerRuntime
from common.worker.sequence import Sequence, plan_chunks
from common.worker.store_link import StoreLink
from kvbaton.errors import KvbatonError, OverloadedError, ProtocolError
from services.decode.worker import DecodeRole
from services.prefill.scheduler import PrefillScheduler

log = structlog.get_logger()


class PrefillRole:
    """Decisions of a prefill worker; common.worker.runtime gives it sockets and steps."""

    def __init__(self, runtime: WorkerRuntime) -> None:
        config = runtime.config
        self._runtime = runtime
        self._budget = config.max_num_batched_tokens
        self._scheduler = PrefillScheduler(config.max_num_seqs)
        self._kept = DecodeRole(runtime)  # what stays here, from its prompt on
        self._sequences: dict[str, Sequence] = {}
        self._max_held = config.max_num_seqs + config.max_waiting

    def load(self) -> Load:
        kept, prompts = self._kept.load(), self._sequences.values()
        return msgspec.structs.replace(
            kept,
            num_running=kept.num_running + len(prompts),
            num_decoding=kept.num_running + kept.num_waiting,
            num_tokens_queued=kept.num_tokens_queued + sum(seq.num_uncomputed for seq in prompts),
            queued_s=kept.queued_s + self._runtime.step_fits.queued_s(prompts),
        )

    def sequences(self) -> list[Sequence]:
        return [*self._sequences.values(), *self._kept.sequences()]

    def hand_on(self) -> None:
        """Give up the prompts that have not begun; the others are finished here. What stays here
        is handed on as by a decode worker."""
        self._kept.hand_on()
        for sequence in list(self._sequences.values()):
            if not sequence.num_uses and sequence.num_computed == sequence.num_found:
                self._runtime.endings.drop(sequence, "unavailable", "the worker is shutting down")

    def stop(self, sequence: Sequence) -> None:
        if self._hands_over(sequence):
            self._scheduler.remove(sequence)
        else:
            self._kept.stop(sequence)

    def remove(self, sequence: Sequence) -> None:
        if self._hands_over(sequence):
            del self._sequences[sequence.handoff_id]
        else:
            self._kept.remove(sequence)

    def _hands_over(self, sequence: Sequence) -> bool:
        """Whether another decodes it."""
        return self._sequences.get(sequence.handoff_id) is sequence

    def on_gateway(self, peer: bytes, message: Message) -> Message | None:
        if isinstance(message, Reserve):
            return self._kept.on_gateway(peer, message)
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
        sequence = None
        if isinstance(message, Aborted):
            sequence = self._sequences.get(message.handoff_id)
        if sequence is None:
            self._kept.on_store(store, message)
        else:
            self._runtime.endings.abort(sequence)

    async def _start(self, sequence: Sequence) -> None:
        """Get the blocks; make the cached ones readable here."""
        step = Fill(handoff_id=sequence.handoff_id, epoch=sequence.epoch)
        if await self._runtime.taking.take(sequence, step):
            sequence.progress.joined_at = self._runtime.seams.clock.now()
            self._scheduler.add(sequence, self._due_at(sequence))
            self._runtime.wake()

    def _due_at(self, sequence: Sequence) -> float:
        return due_at(sequence.arrived_at, self._runtime.step_fits.queued_s([sequence]))

    def plan(self) -> list[tuple[Sequence, Work]]:
        steps = self._kept.plan_tokens()
        kept = [(self._due_at(sequence), sequence) for sequence in self._kept.prompts()]
        prompts = self._scheduler.line(kept)
        room = min(self._kept.num_prompt_tokens(prompts), self._budget - len(steps))
        enough = self._runtime.full_step_tokens
        return steps + self._runtime.works(plan_chunks(prompts, int(max(room, 1)), enough))

    def apply(self, sequence: Sequence, sampled: Sampled | None) -> None:
        if not self._hands_over(sequence):
            self._kept.apply(sequence, sampled)
        elif sampled is not None:
            self._computed(sequence, sampled)

    def _computed(self, sequence: Sequence, sampled: Sampled) -> None:
        """The last chunk is done: tell the first token, and hand over."""
        finish_reason = sequence.finish_reason(self._runtime.info)
        self._runtime.outputs.add(sequence, sampled, finish_reason)
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
