"""Link and Server over a network that loses, repeats, holds back and reorders what it likes."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import (
    INTERNAL_VERSION,
    Failed,
    FromStore,
    Heartbeat,
    Hello,
    Leased,
    Member,
    Message,
    Ok,
    decoder,
)
from kvbaton.codec import encode
from kvbaton.errors import ConnectionLostError
from tests.net.wires import PEER, Pair, run

Step = tuple[str, bool, int]
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "send",
                "send",
                "push",
                "push",
                "call",
                "forget",
                "first",
                "first",
                "first",
                "first",
                "any",
                "lose",
                "repeat",
            ]
        ),
        st.booleans(),
        st.integers(0, 99),
    ),
    max_size=60,
)


def take_step(pair: Pair, name: str, to_server: bool, position: int) -> None:
    num_under_way = len(pair.wires.end(to_server).under_way)
    if name == "send":
        pair.send()
    elif name == "push":
        pair.push()
    elif name == "forget":
        pair.server.forget(PEER)
    elif num_under_way:
        index = 0 if name == "first" else position % num_under_way
        {"lose": pair.wires.lose, "repeat": pair.wires.repeat}.get(name, pair.wires.deliver)(
            to_server, index
        )


@given(_STEPS)
def test_whatever_happens_each_incarnation_is_in_order_and_the_connection_recovers(
    steps: list[Step],
) -> None:
    async def scenario(pair: Pair) -> None:
        calls = []
        for name, to_server, position in steps:
            if name == "call":
                calls.append(asyncio.ensure_future(pair.link.call(Heartbeat(), timeout_s=None)))
                await asyncio.sleep(0)
            take_step(pair, name, to_server, position)
            pair.check()
        await pair.recovers()
        pair.check()
        # No call waits for ever: each was answered, or failed with its connection.
        await asyncio.sleep(0)
        assert all(call.done() for call in calls)
        await asyncio.gather(*calls, return_exceptions=True)

    run(scenario)


@pytest.mark.parametrize("to_server", [True, False])
def test_a_lost_hello_or_welcome_is_made_up_for(to_server: bool) -> None:
    async def scenario(pair: Pair) -> None:
        if not to_server:
            pair.wires.deliver(True)
        pair.wires.lose(to_server)
        pair.send()  # right behind the hello
        pair.wires.deliver_all()
        assert pair.welcomed == [2]
        assert isinstance(await pair.ask(), Ok)
        assert (pair.num_hellos, pair.handled[2]) == (2, [])

    run(scenario)


@pytest.mark.parametrize("to_server", [True, False])
def test_a_lost_last_message_shows_at_the_next_heartbeat(to_server: bool) -> None:
    async def scenario(pair: Pair) -> None:
        pair.wires.deliver_all()
        pair.send() if to_server else pair.push()
        pair.wires.lose(to_server)
        with pytest.raises(ConnectionLostError):
            await pair.ask()
        assert isinstance(await pair.ask(), Ok)
        assert pair.welcomed == [1, 2]
        assert pair.gone == ([1] if to_server else [])

    run(scenario)


def test_a_call_that_waits_fails_when_a_message_was_lost() -> None:
    async def scenario(pair: Pair) -> None:
        pair.wires.deliver_all()
        lost = asyncio.ensure_future(pair.link.call(Heartbeat(), timeout_s=None))
        await asyncio.sleep(0)
        pair.wires.deliver(True)
        pair.wires.lose(False)
        pair.push()
        pair.wires.deliver_all()
        with pytest.raises(ConnectionLostError, match="a message was lost"):
            await lost
        assert pair.received == {}

    run(scenario)


def test_a_hello_that_comes_again_resets_nothing() -> None:
    async def scenario(pair: Pair) -> None:
        hello = pair.wires.end(True).under_way[0]
        pair.wires.deliver_all()
        pair.wires.end(True).under_way.append(hello)
        pair.wires.deliver_all()
        assert (pair.num_accepted, pair.server.num_ignored) == (1, 1)
        assert isinstance(await pair.ask(), Ok)

        pair.server.forget(PEER)  # nor does it bring a forgotten incarnation back
        pair.wires.end(True).under_way.append(hello)
        pair.wires.deliver_all()
        assert pair.server.peers == {}
        await pair.recovers()
        pair.wires.end(True).under_way.append(hello)
        pair.wires.deliver_all()
        assert pair.server.peers[PEER].pid == pair.num_hellos == 2

    run(scenario)


def test_messages_in_flight_when_a_peer_is_forgotten_draw_one_hello() -> None:
    async def scenario(pair: Pair) -> None:
        pair.wires.deliver_all()
        pair.server.forget(PEER)
        for _ in range(20):
            pair.send()
        pair.wires.deliver_all()
        assert pair.welcomed == [1, 2]
        assert pair.handled == {}

    run(scenario)


def test_an_old_request_for_a_hello_resets_nothing() -> None:
    async def scenario(pair: Pair) -> None:
        pair.wires.deliver_all()
        pair.server.forget(PEER)
        pair.send()
        pair.wires.deliver(True)
        (required,) = pair.wires.end(False).under_way
        pair.wires.deliver_all()
        pair.wires.end(False).under_way.append(required)
        pair.wires.deliver_all()
        assert pair.welcomed == [1, 2]
        assert isinstance(await pair.ask(), Ok)

    run(scenario)


def test_a_message_held_back_since_the_former_connection_is_not_handled_in_this() -> None:
    async def scenario(pair: Pair) -> None:
        pair.wires.deliver_all()
        pair.push()
        pair.push()
        late = pair.wires.end(False).under_way.pop(0)
        pair.wires.deliver_all()
        assert pair.welcomed == [1, 2]
        pair.wires.end(False).under_way.append(late)
        pair.push()
        pair.wires.deliver_all()
        assert pair.received == {2: [0]}
        assert pair.link.num_ignored == 1

    run(scenario)


def test_a_refused_hello_ends_the_former_connection_and_is_told() -> None:
    async def scenario(pair: Pair) -> None:
        pair.wires.deliver_all()
        pair.refuses = True
        pair.link.reset()
        pair.wires.repeat(True)
        pair.wires.deliver_all()
        assert (pair.gone, pair.server.peers, pair.num_refused) == ([1], {}, 1)
        pair.refuses = False
        await pair.recovers()
        assert pair.welcomed == [1, 3]

    run(scenario)


def test_what_the_socket_refuses_takes_no_number() -> None:
    async def scenario(pair: Pair) -> None:
        pair.wires.deliver_all()
        pair.wires.end(True).is_full = True
        with pytest.raises(ConnectionLostError, match="takes no more messages"):
            await pair.ask()
        pair.wires.end(True).is_full = False
        assert isinstance(await pair.ask(), Ok)
        assert pair.welcomed == [1]

    run(scenario)


def test_one_message_may_be_pushed_to_many_and_stays_as_it_was() -> None:
    async def scenario(pair: Pair) -> None:
        pair.wires.deliver_all()
        push = Leased(blocks=[1, 0])
        assert pair.server.send(PEER, push)
        assert push == Leased(blocks=[1, 0])

    run(scenario)


@pytest.mark.parametrize("number", [-(2**62), -1, 0, 3, 2**63, 2**64 - 1])
def test_numbers_that_make_no_sense_are_refused_in_words(number: int) -> None:
    async def scenario(pair: Pair) -> None:
        from_server = decoder(FromStore)

        def said(message: Message) -> Message:
            message.number = number
            pair.wires.end(True).under_way.append([memoryview(encode(message))])
            pair.wires.deliver(True, -1)
            (frames,) = pair.wires.end(False).under_way
            return from_server.decode(frames[0])

        member = Member(member_id="0" * 32, role="decode", name="d", host_id="h", pid=1)
        refusal = said(Hello(internal_version=INTERNAL_VERSION, member=member))
        assert isinstance(refusal, Failed)
        assert refusal.message == f"number {number} of a hello begins no connection"
        pair.wires.deliver_all()
        refusal = said(Heartbeat(call_id=7))
        assert isinstance(refusal, Failed)
        assert refusal.code == ("protocol_error" if number < 1 else "hello_required")
        assert refusal.call_id == 7
        await pair.recovers()

    run(scenario)


@pytest.mark.parametrize("is_late", [False, True])
def test_an_answer_that_comes_as_its_call_is_cancelled_is_not_lost(is_late: bool) -> None:
    """It may have brought something that must be given back."""

    async def scenario(pair: Pair) -> None:
        pair.wires.deliver_all()
        call = asyncio.ensure_future(pair.link.call(Heartbeat()))
        await asyncio.sleep(0)
        pair.wires.lose(True)
        pair.server.send(PEER, Leased(call_id=2, blocks=[1, 0]))
        if is_late:
            call.cancel()
            await asyncio.sleep(0)
        pair.wires.deliver_all()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()
        assert pair.received[1] == [0]

    run(scenario)
