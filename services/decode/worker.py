"""The decode worker: goes on from prompts that prefill computed, one token of each a step.

The life of a request here:
1. A gateway sends `reserve`; the answer comes when there is a place among max_num_seqs.
2. The store tells which blocks are final (`filled`, where they must be pulled) and that prefill is
   done (`sealed`). We `claim`: the block table and the unfinished last block are ours.
3. The sequence joins the batch. Each step gives it one token, which leaves for the gateway at once;
   it grows into blocks leased in advance, and each that fills up is committed.
4. At the end `release` leaves the committed blocks behind as cache.
With `prefill_here` step 2 is replaced: the blocks are asked for with `fill`, and the prompt is
computed in chunks between the tokens of the others. When blocks run out the youngest sequence is
suspended: it gives up its blocks and its place, waits for room, then for a place, and goes on the
same way. A request that another decode worker had comes with its `first_token`: its blocks are
claimed at once. When we are to leave ourselves, we `yield` what we have.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Sequence as Many

import structlog

from common.engine.work import Sampled, Work
from common.messages import (
    Aborted,
    Claim,
    Fill,
    Filled,
    HandoffOpened,
    Load,
    Message,
    Ok,
    Quit,
    Release,
    Reserve,
    Sealed,
    StaleError,
    Suspend,
)
from common.net.server import failed
from common.worker.lease import BlockLease
from common.worker.runtime import WorkerRuntime
from common.worker.sequence import Sequence
from common.worker.store_link import StoreLink
from kvbaton.errors import KvbatonError, OverloadedError, ProtocolError
from services.decode.departure import Departure
from services.decode.pace import Paces, least_prompt_tokens
from services.decode.places import Places
from services.decode.scheduler import DecodeScheduler, Plan

log = structlog.get_logger()

_MAX_OVER = 4096  # how many early aborts are remembered


class DecodeRole:
    """Decisions of a decode worker; common.worker.runtime gives it sockets and steps."""

    def __init__(self, runtime: WorkerRuntime) -> None:
        config = runtime.config
        self._runtime = runtime
        self._scheduler = DecodeScheduler(
            config.max_num_batched_tokens, runtime.block_size, runtime.full_step_tokens
        )
        self._sequences: dict[str, Sequence] = {}
        self._prefill_here: set[str] = set()
        self._first_tokens: dict[str, int] = {}  # of those that are computed, by handoff id
        self._pulls: dict[str, list[asyncio.Task[None]]] = {}  # under way, by handoff id
        self._paces = Paces()
        self._places = Places(config.max_num_seqs)
        self._reserving: dict[str, int] = {}  # the call that a place answers, by handoff id
        self._departure = Departure(runtime, self._scheduler, self._places, self.sequences)
        self._over: OrderedDict[str, None] = OrderedDict()  # ended before they were asked for here
        self._max_held = config.max_num_seqs + config.max_waiting

    def load(self) -> Load:
        fits, prompts = self._runtime.step_fits, self._scheduler.prompts()
        # Those that the step has just finished still have their places, but not for long.
        staying = [each.handoff_id for each in self._sequences.values() if not each.is_over]
        num_running = sum(map(self._places.is_taken, staying))
        return Load(
            num_running=num_running,
            num_waiting=len(staying) - num_running,
            num_tokens_queued=sum(seq.num_uncomputed for seq in prompts),
            queued_s=fits.queued_s(prompts),
            num_context_tokens=self._scheduler.num_context_tokens(),
            tokens_per_s=self._runtime.tokens_per_s,
            prompt_steps=fits.prompts,
            token_steps=fits.tokens,
            paced_token_ms=fits.paced_token_s * 1000,
            pulled_bytes_per_s=self._runtime.pulled_bytes_per_s,
            pushed_bytes_per_s=self._runtime.pushed_bytes_per_s,
            is_draining=self._runtime.is_draining,
            num_steps=self._runtime.num_steps,
        )

    def sequences(self) -> list[Sequence]:
        return list(self._sequences.values())

    def hand_on(self) -> None:
        self._departure.hand_on()

    def stop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        handoff_id = sequence.handoff_id
        del self._sequences[handoff_id]
        self._prefill_here.discard(handoff_id)
        self._first_tokens.pop(handoff_id, None)
        self._paces.remove(handoff_id)
        self._pulls.pop(handoff_id, None)
        self._places.leave(handoff_id)
        call_id = self._reserving.pop(handoff_id, None)
        if call_id is not None:
            error = StaleError("the handoff is over")
            self._runtime.answer(sequence.gateway, failed(error, call_id))
        store = self._runtime.store_of(sequence)
        if sequence.incarnation == store.member_id:
            store.lease.add(sequence.blocks[sequence.num_committed :])
            self._return_surplus(store)
        self._fill_places()

    def _return_surplus(self, store: StoreLink) -> None:
        store.give_back(store.lease.surplus(self._scheduler.num_active(store.index)))

    # ---- places -------------------------------------------------------------------------------

    def on_gateway(self, peer: bytes, message: Message) -> Message | None:
        if not isinstance(message, Reserve):
            raise ProtocolError(f"a decode worker does not take {type(message).__name__}")
        if message.handoff_id in self._over:
            raise StaleError("the handoff is over")
        if message.handoff_id in self._sequences:
            return Ok()  # said before
        if len(self._sequences) >= self._max_held:
            raise OverloadedError(
                f"{len(self._sequences)} requests are held here already", retry_after_s=1
            )
        self._sequences[message.handoff_id] = self._runtime.new_sequence(peer, message)
        if message.prefill_here:
            self._prefill_here.add(message.handoff_id)
        if message.first_token is not None:
            self._first_tokens[message.handoff_id] = message.first_token
        self._paces.add(message.handoff_id, message.tpot_target_ms / 1000)
        self._reserving[message.handoff_id] = message.call_id
        self._places.ask(message.handoff_id)
        self._fill_places()
        return None

    def _fill_places(self) -> None:
        """Give free places to those who wait: to start, or to go on after they were suspended."""
        for handoff_id in self._places.give():
            sequence = self._sequences[handoff_id]
            call_id = self._reserving.pop(handoff_id, None)
            if call_id is not None:
                self._runtime.answer(sequence.gateway, Ok(call_id=call_id))
            first_token = self._first_tokens.pop(handoff_id, None)
            if first_token is not None:
                self._runtime.tasks.spawn(self._claim(sequence, first_token), "claim")
            elif call_id is None or handoff_id in self._prefill_here:
                self._runtime.tasks.spawn(self._fill(sequence), "fill")

    # ---- what the store tells -------------------------------------------------------------------

    def on_store(self, store: StoreLink, message: Message) -> None:
        if not isinstance(message, Aborted | Filled | Sealed):
            return
        sequence = self._sequences.get(message.handoff_id)
        if sequence is None:
            if isinstance(message, Aborted):
                self._refuse_later(message.handoff_id)
                store.link.send(Quit(handoff_id=message.handoff_id, epoch=message.epoch))
        elif isinstance(message, Aborted):
            self._runtime.endings.abort(sequence)
        elif isinstance(message, Filled):
            store.mover.learn(message.blocks, message.stamps)
            blocks = list(enumerate(message.blocks, message.first_index))
            pull = self._runtime.tasks.spawn(self._pull(sequence, blocks), "pull")
            self._pulls.setdefault(sequence.handoff_id, []).append(pull)
        else:
            self._runtime.tasks.spawn(self._claim(sequence, message.first_token), "claim")

    def _refuse_later(self, handoff_id: str) -> None:
        """An abort can be faster than the reserve it ends, which then must not take a place."""
        self._over[handoff_id] = None
        if len(self._over) > _MAX_OVER:
            self._over.popitem(last=False)

    async def _pull(self, sequence: Sequence, blocks: list[tuple[int, int]]) -> None:
        """Fetch blocks while prefill computes the next ones."""
        indexes = [index for index, _ in blocks]
        sequence.pulled.update(indexes)
        with self._runtime.endings.using(sequence):
            try:
                await self._runtime.taking.pull(sequence, blocks)
            except KvbatonError as error:
                log.info("pull_failed", **sequence.names, reason=error.message)
                sequence.pulled.difference_update(indexes)  # tried again when we claim

    async def _claim(self, sequence: Sequence, first_token: int) -> None:
        self._paces.begin(sequence, sequence.num_outputs + 1, self._runtime.seams.clock.now())
        sequence.progress.num_early_blocks = num_moved = sequence.num_moved
        if pulls := self._pulls.pop(sequence.handoff_id, None):
            await asyncio.wait(pulls)
        step = Claim(handoff_id=sequence.handoff_id, epoch=sequence.epoch)
        if await self._runtime.taking.take(sequence, step):
            sequence.claimed(first_token)
            log.info(
                "handoff_claimed",
                **sequence.names,
                num_blocks=len(sequence.blocks),
                num_moved=sequence.num_moved,
                num_moved_late=sequence.num_moved - num_moved,  # after prefill was done
            )
            self._join(sequence)

    async def _fill(self, sequence: Sequence) -> None:
        step = Fill(handoff_id=sequence.handoff_id, epoch=sequence.epoch)
        if await self._runtime.taking.take(sequence, step):
            self._join(sequence)

    def _join(self, sequence: Sequence) -> None:
        sequence.progress.joined_at = self._runtime.seams.clock.now()
        self._scheduler.add(sequence)
        self._runtime.wake()

    # ---- steps ----------------------------------------------------------------------------------

    def plan(self) -> list[tuple[Sequence, Work]]:
        prompts = self._scheduler.prompts()
        room = self.num_prompt_tokens(prompts) if prompts else math.inf
        return self._begin(self._scheduler.plan(self._leases(), room))

    def plan_tokens(self) -> list[tuple[Sequence, Work]]:
        """`plan` without `prompts`: somebody else plans these."""
        return self._begin(self._scheduler.plan_tokens(self._leases()))

    def prompts(self) -> list[Sequence]:
        """Those that are to be computed here, and have their blocks."""
        return self._scheduler.prompts()

    def _leases(self) -> list[BlockLease]:
        return [store.lease for store in self._runtime.stores]

    def _begin(self, plan: Plan) -> list[tuple[Sequence, Work]]:
        """Do what a step takes beside computing it."""
        for sequence in plan.preempted:
            self._scheduler.remove(sequence)
            self._runtime.tasks.spawn(self._suspend(sequence), "suspend")
        for store in self._runtime.stores:
            num_wanted = store.lease.num_wanted(self._scheduler.num_active(store.index))
            if num_wanted:
                store.lease.asking = True
                self._runtime.tasks.spawn(self._refill(store, num_wanted), "refill")
        return self._runtime.works(plan.steps)

    def num_prompt_tokens(self, prompts: Many[Sequence]) -> float:
        """How many tokens of these, in the order of their turns, the next step may compute so that
        those that run get theirs in time, or must so that prompts are in time as well."""
        now, fits = self._runtime.seams.clock.now(), self._runtime.step_fits
        block_size = self._runtime.block_size
        awaiting = self._scheduler.prompts()
        others = [each for each in self._sequences.values() if each not in awaiting]
        room = fits.num_prompt_tokens(
            self._paces.limit_s(others, now),
            num_running=len(self._scheduler.running()),
            context=self._scheduler.num_context_tokens(),
        )
        if room >= block_size or not fits.paced_token_s:
            return max(room, block_size)
        step_s = self._paces.planned_s(others)
        return max(room, least_prompt_tokens(prompts, step_s, now, most=block_size))

    async def _refill(self, store: StoreLink, num_blocks: int) -> None:
        await store.refill(num_blocks)
        self._return_surplus(store)
        self._runtime.wake()

    async def _suspend(self, sequence: Sequence) -> None:
        """Give the blocks up, wait for room, go on from what is still cached."""
        runtime = self._runtime
        store = runtime.store_of(sequence)
        await runtime.publisher.settle(sequence)
        if sequence.is_over:
            return
        runtime.preempted()
        sequence.progress.suspended_at = runtime.seams.clock.now()
        log.info("sequence_preempted", **sequence.names, tokens=len(sequence.tokens))
        store.mover.forget(sequence.blocks)
        store.lease.add(sequence.blocks[sequence.num_committed :])
        sequence.lose_blocks()
        self._places.leave(sequence.handoff_id)
        self._fill_places()
        runtime.wake()
        self._return_surplus(store)
        suspend = Suspend(
            handoff_id=sequence.handoff_id,
            epoch=sequence.epoch,
            num_tokens=len(sequence.tokens),
        )
        try:
            opened = await store.link.call(suspend, timeout_s=None)
        except StaleError:
            runtime.endings.abort(sequence)
        except KvbatonError as error:
            runtime.endings.drop(sequence, error.code, error.message)
        else:
            assert isinstance(opened, HandoffOpened)
            sequence.epoch = opened.epoch
            if not sequence.is_over:
                self._places.ask(sequence.handoff_id, first=True)
                self._fill_places()

    def apply(self, sequence: Sequence, sampled: Sampled | None) -> None:
        if sampled is None:
            return
        finish_reason = sequence.finish_reason(self._runtime.info)
        self._runtime.outputs.add(sequence, sampled, finish_reason)
        self._paces.begin(sequence, sequence.num_outputs, self._runtime.seams.clock.now())
        if finish_reason is not None:
            release = Release(handoff_id=sequence.handoff_id, epoch=sequence.epoch)
            self._runtime.endings.end(sequence, release)
