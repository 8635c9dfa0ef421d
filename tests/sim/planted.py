"""Bugs planted in the services' own code, each of which the simulation must catch.

Most are incidents of other servers (docs/planted-bugs.md names them), the rest what is easily got
wrong here. Each bug is caught by a seed of scenario.py, or by one of the scenarios of zombies.py.
Those that survival depends on are in planted_deaths.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

from common.kv import integrity
from common.messages import AbortHandoff, Message, OutputToken, Quit, Seal
from common.net.link import Link
from common.net.liveness import Liveness
from common.net.order import Incoming, Verdict
from common.worker.endings import Endings
from common.worker.mover import ZmqMover
from common.worker.sequence import Sequence
from common.worker.store_link import StoreLink
from services.decode.places import Places
from services.decode.worker import DecodeRole
from services.gateway.routing.dispatcher import Dispatcher
from services.gateway.routing.stream import RequestStream
from services.kvstore.blocks import BlockPool, BlockState
from services.kvstore.broker import Broker
from services.kvstore.handoff import Handoff, HandoffState
from services.kvstore.ledger import Ledger
from services.kvstore.members import Members
from services.kvstore.service import KvStore
from services.kvstore.staging import Staging
from services.prefill.worker import PrefillRole
from tests.sim import successors, zombies


class Live(int):
    """A seed of liveness mode."""


Catcher = int | Callable[[], None]  # a seed of safety mode, or `Live`, or a scenario

BUGS: dict[str, tuple[Catcher, Callable[[], AbstractContextManager[None]]]] = {}


def bug(catcher: Catcher) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a bug: what is decorated returns the patches that plant it."""

    def register(plant: Callable[[], Any]) -> Callable[[], Any]:
        @contextmanager
        def planted() -> Iterator[None]:
            patches = plant()
            with ExitStack() as stack:
                for patch in patches if isinstance(patches, list) else [patches]:
                    stack.enter_context(patch)
                yield

        BUGS[plant.__name__] = catcher, planted
        return plant

    return register


def replaced(owner: Any, name: str, value: Any) -> Any:
    return mock.patch.object(owner, name, value)


# ---- the store: blocks that are reused too early, or never --------------------------------------


@bug(zombies.a_prefill_worker_wakes_up_and_writes_what_it_began)
def aborted_blocks_are_free_while_their_writer_still_writes() -> Any:
    """Served from released blocks, with status 200."""

    def abort(self: Ledger, handoff_id: str, *, is_fenced: bool) -> Handoff | None:
        handoff = self.handoffs.get(handoff_id)
        if handoff is None:
            return None
        if handoff.state is HandoffState.FILLING:
            self.pool.quarantine(handoff.blocks[handoff.num_committed :])
        self._close(handoff)
        return handoff

    return replaced(Ledger, "abort", abort)


@bug(zombies.a_prefill_worker_wakes_up_and_writes_what_it_began)
def quarantine_ends_by_a_timeout() -> Any:
    """Late writes hit blocks that were given to others."""
    lose = KvStore._lose

    def lose_and_forget(self: KvStore, member_id: str, reason: str, *, stopped: bool) -> None:
        lose(self, member_id, reason, stopped=True)

    return replaced(KvStore, "_lose", lose_and_forget)


@bug(zombies.a_cancelled_prompt_is_free_within_a_second_though_decode_hears_nothing)
def an_abort_is_ignored_once_the_prompt_is_sealed() -> Any:
    """A client that disconnects between prefill and decode strands the prompt's blocks."""
    from_gateway = Broker.from_gateway

    def deaf(self: Broker, gateway_id: str, message: Message) -> Message | None:
        if isinstance(message, AbortHandoff):
            handoff = self.ledger.handoffs.get(message.handoff_id)
            if handoff is not None and handoff.state is HandoffState.SEALED:
                return None
        return from_gateway(self, gateway_id, message)

    return replaced(Broker, "from_gateway", deaf)


@bug(zombies.a_decode_worker_wakes_up_before_its_gateway_has_heard_of_its_loss)
def what_an_aborted_handoff_reads_is_reused_at_once() -> Any:
    """A reader that has not heard of the abort computes from other prompts' blocks."""
    abort = Ledger.abort

    def fenced(self: Ledger, handoff_id: str, *, is_fenced: bool) -> Handoff | None:
        return abort(self, handoff_id, is_fenced=True)

    return replaced(Ledger, "abort", fenced)


@bug(0)
def releases_are_forgotten() -> Any:
    """Finished requests keep their blocks."""
    return replaced(Ledger, "release", lambda *_: None)


@bug(4)
def a_dead_workers_lease_is_never_free() -> Any:
    """The decode worker aborts or dies, and its blocks leak for ever."""

    def member_stopped(self: Ledger, member_id: str) -> None:
        for handoff in list(self.handoffs.values()):
            if handoff.state is HandoffState.ABORTING and handoff.writer == member_id:
                self._close(handoff)

    return replaced(Ledger, "member_stopped", member_stopped)


@bug(0)
def a_preempted_sequence_keeps_its_reservation() -> Any:
    def drop_blocks(self: Ledger, handoff: Handoff) -> None:
        handoff.drop_blocks(self.pool)

    return replaced(Ledger, "_drop_blocks", drop_blocks)


@bug(0)
def who_waits_for_room_is_never_asked_again() -> Any:
    """A pool that was full once serves nobody, and health says 200."""
    admit = Ledger.admit

    def once(self: Ledger) -> list[Handoff]:
        if self._no_room is not None and self._waiting and self._no_room[-1]:
            return []
        return admit(self)

    return replaced(Ledger, "admit", once)


@bug(0)
def granted_blocks_may_be_cached_ones_in_use() -> Any:
    """Pinning a cached block leaves it among those to evict."""

    def pin(self: BlockPool, block_ids: list[int]) -> None:
        for block_id in block_ids:
            block = self[block_id]
            if block.state is BlockState.CACHED:
                self._move(block, BlockState.COMMITTED)
            block.num_readers += 1

    return replaced(BlockPool, "pin", pin)


@bug(1)
def blocks_keep_their_stamp_when_they_are_granted_again() -> Any:
    """Silent corruption that grows with the number of requests: stale copies pass for new ones."""
    grant = BlockPool.grant

    def same_stamp(self: BlockPool, count: int, writer: str) -> list[int]:
        granted = grant(self, count, writer)
        for block_id in granted:
            self[block_id].stamp = 1
        return granted

    return replaced(BlockPool, "grant", same_stamp)


@bug(0)
def the_unfinished_block_stays_with_prefill() -> Any:
    """The last block goes with the prefill worker when it leaves after the seal."""

    def claim(self: Handoff, pool: BlockPool, member_id: str) -> None:
        self.expect(HandoffState.SEALED)
        self.state, self.writer = HandoffState.CLAIMED, member_id

    return replaced(Handoff, "claim", claim)


# ---- the store: who is alive --------------------------------------------------------------------


@bug(zombies.nobody_who_beats_is_lost)
def heartbeats_renew_nothing() -> Any:
    """Workers that beat are lost all the same, in the midst of their work."""
    heard = Members.heard

    def deaf(self: Members, *arguments: Any) -> bool:
        with mock.patch.object(Liveness, "heard"):
            return heard(self, *arguments)

    return replaced(Members, "heard", deaf)


@bug(zombies.a_prefill_worker_wakes_up_and_writes_what_it_began)
def the_reaper_stops_at_the_first_member_that_beats() -> Any:
    """A silent member behind a lively one is never lost."""

    def expire(self: Liveness[str], now: float) -> list[str]:
        first = next(iter(sorted(self._heard_at)), None)
        if first is None or now - self._heard_at[first] < self.timeout_s:
            return []
        del self._heard_at[first]
        return [first]

    return replaced(Liveness, "expire", expire)


@bug(0)
def aborted_prompts_are_not_given_up_by_a_worker_that_never_got_them() -> Any:
    """A receiver aborted before it began is never freed."""
    send = Link.send

    def mute(self: Link, message: Message, bulk: Any = ()) -> None:
        if not isinstance(message, Quit):
            send(self, message, bulk)

    return replaced(Link, "send", mute)


# ---- connections --------------------------------------------------------------------------------


@bug(36)
def repeated_messages_are_handled_twice() -> Any:
    take = Incoming.take

    def trusting(self: Incoming, number: int) -> Verdict:
        verdict = take(self, number)
        return Verdict.NEXT if verdict is Verdict.SEEN else verdict

    return replaced(Incoming, "take", trusting)


@bug(5)
def lost_messages_go_unnoticed() -> Any:
    def trusting(self: Incoming, number: int) -> Verdict:
        if number < self.expected:
            return Verdict.SEEN
        self.expected = number + 1
        return Verdict.NEXT

    return replaced(Incoming, "take", trusting)


@bug(5)
def an_answer_goes_to_whoever_waits_longest() -> Any:
    """A cancelled call's answer reaches another caller."""
    answer = Link._answer

    def mixed_up(self: Link, call_id: int, result: Any) -> None:
        answer(self, next(iter(self._calls), call_id), result)

    return replaced(Link, "_answer", mixed_up)


# ---- bytes --------------------------------------------------------------------------------------


@bug(successors.a_successor_finds_a_damaged_block)
def digests_are_not_compared() -> Any:
    """Flipped bytes are served."""
    from common.worker import mover
    from services.kvstore import data

    def constant(*_: Any) -> bytes:
        return bytes(integrity.DIGEST_BYTES)

    return [replaced(mover, "block_digest", constant), replaced(data, "block_digest", constant)]


@bug(0)
def prefill_seals_before_its_blocks_have_arrived() -> Any:
    """Decode goes on from incomplete KV."""

    async def push_rest(self: PrefillRole, sequence: Sequence, seal: Seal) -> None:
        self._runtime.endings.end(sequence, seal)

    return replaced(PrefillRole, "_push_rest", push_rest)


@bug(0)
def copies_count_as_held_before_they_have_come() -> Any:
    learn = ZmqMover.learn

    def hasty(self: ZmqMover, blocks: list[int], stamps: list[int]) -> None:
        learn(self, blocks, stamps)
        self._held.update(zip(blocks, stamps, strict=True))

    return replaced(ZmqMover, "learn", hasty)


@bug(2)
def blocks_that_were_written_to_disk_stay_pinned() -> Any:
    return replaced(Staging, "written", lambda *_: None)


# ---- workers ------------------------------------------------------------------------------------


@bug(1)
def the_store_is_told_before_the_running_step_has_ended() -> Any:
    """Blocks come back while a step still writes them."""

    def settle(self: Endings, sequence: Sequence) -> None:
        ending, sequence.ending = sequence.ending, None
        if ending is not None:
            self._role.remove(sequence)
            store = self._store_of(sequence)
            if store.member_id == sequence.incarnation:
                store.link.send(ending)

    return replaced(Endings, "_settle", settle)


@bug(0)
def a_finished_sequence_keeps_its_place() -> Any:
    return replaced(Places, "leave", lambda *_: None)


@bug(6)
def a_worker_does_not_say_that_it_has_stopped() -> Any:
    """Blocks of a former incarnation stay in quarantine."""
    return replaced(StoreLink, "stopped", lambda *_: None)


@bug(0)
def the_first_token_is_lost_at_the_handoff() -> Any:
    """Decode goes on after the prompt's last token said twice."""
    claimed = Sequence.claimed

    def claim(self: Sequence, first_token: int) -> None:
        claimed(self, self.tokens[-1])

    return replaced(Sequence, "claimed", claim)


@bug(zombies.a_cancelled_request_holds_nothing_after_a_second)
def decode_ignores_aborts() -> Any:
    """A cancelled request runs to its end, and nobody gives its blocks back."""
    from common.messages import Aborted

    on_store = DecodeRole.on_store

    def deaf(self: DecodeRole, store: StoreLink, message: Message) -> None:
        if not isinstance(message, Aborted):
            on_store(self, store, message)

    return replaced(DecodeRole, "on_store", deaf)


# ---- gateways -----------------------------------------------------------------------------------


@bug(0)
def a_refused_request_keeps_its_handoff() -> Any:
    """A rejection before admission, or a cancel, strands what was reserved."""
    return replaced(Dispatcher, "_abandon", lambda *_: None)


@bug(0)
def tokens_are_delivered_as_they_come() -> Any:
    """Tokens of two attempts mix: some come twice."""
    deliver = RequestStream.deliver

    def as_it_comes(self: RequestStream, token: OutputToken) -> bool:
        token.index = len(self.tokens)
        return deliver(self, token)

    return replaced(RequestStream, "deliver", as_it_comes)


@bug(3)
def requests_of_a_lost_worker_are_not_placed_again() -> Any:
    """Requests hang until a timeout, if there is one."""
    return replaced(Dispatcher, "_on_worker_lost", lambda *_: None)
