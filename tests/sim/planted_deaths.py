"""Planted bugs (planted.py) of what goes on after processes die, stop or drain.

Some are seen in liveness mode alone: requests then fail with a proper error, or come too late.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from common.messages import Yield
from common.net.link import Link
from common.worker.sequence import Sequence
from services.decode.departure import Departure
from services.gateway.routing import dispatcher
from services.gateway.routing.placer import Placer
from services.gateway.routing.stream import RequestStream
from services.kvstore.blocks import Block, BlockPool
from services.kvstore.handoff import Handoff
from services.kvstore.journal_file import Journal
from tests.sim import successors
from tests.sim.planted import Live, bug, replaced
from tests.sim.test_links_broken import (
    test_blocks_that_never_come_are_soon_asked_for_again as never_come,
)
from tests.sim.test_store_restart import (
    test_what_a_worker_may_be_writing_is_nobody_elses_until_it_has_stopped as restart_while_written,
)


@bug(successors.a_successor_finds_a_damaged_block)
def a_successor_goes_on_from_a_corrupt_block() -> Any:
    """Each attempt is given the block that the last one failed over."""

    def num_same(self: Handoff, former: Handoff, _pool: BlockPool) -> int:
        final = zip(self.keys, former.keys[: former.num_committed], strict=False)
        return sum(mine == theirs for mine, theirs in final)

    return replaced(Handoff, "_num_same", num_same)


@bug(31)
def a_drained_worker_hands_on_a_block_that_has_not_arrived() -> Any:
    """Its successor goes on from the bytes that were there before."""

    async def hand_over(self: Departure, sequence: Sequence) -> None:
        runtime = self._runtime
        await runtime.publisher.settle(sequence)
        first, num_tokens = sequence.num_committed, sequence.num_computed
        end = -(-num_tokens // runtime.block_size)
        message = Yield(
            handoff_id=sequence.handoff_id,
            epoch=sequence.epoch,
            num_tokens=num_tokens,
            blocks=sequence.blocks[first:end],
        )
        await runtime.store_of(sequence).link.call(message)
        del sequence.blocks[first:end]

    return replaced(Departure, "_hand_over", hand_over)


@bug(restart_while_written)
def the_journal_says_that_granted_blocks_are_free() -> Any:
    """The next store grants them to others while they are written."""
    write = Journal.write

    def forgetful(self: Journal, block_id: int, block: Block) -> None:
        write(self, block_id, block if block.name is not None else Block(stamp=block.stamp))

    return replaced(Journal, "write", forgetful)


@bug(16)
def a_gateway_begins_anew_what_it_should_go_on_with() -> Any:
    """A resumed stream sends again what its client has."""
    init = RequestStream.__init__

    def forgetful(self: RequestStream, *arguments: Any) -> None:
        init(self, *arguments)
        self.tokens.clear()

    return replaced(RequestStream, "__init__", forgetful)


@bug(Live(0))
def who_waits_for_a_worker_is_not_told_when_one_comes() -> Any:
    """With one process of a role, its death fails all requests."""

    def on_news(self: Placer) -> None:
        self._unready_since = None if self.is_ready else self._clock.now()

    return replaced(Placer, "on_news", on_news)


@bug(partial(never_come, "lost"))
def nobody_asks_after_blocks_that_do_not_come() -> Any:
    """A lost answer on a connection without heartbeats holds its request up for a minute."""
    return replaced(Link, "num_waiting", 0)


@bug(Live(0))
def a_request_is_tried_once() -> Any:
    """Whatever ends its worker ends it, with a proper error."""
    return replaced(dispatcher, "_MAX_FRUITLESS", 1)
