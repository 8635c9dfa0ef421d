"""The network in memory against ZeroMQ: the same script over both transports, the same outcome.

What only time decides, such as what is lost when a connection breaks, is compared as a rule that
both keep: what comes has been sent, in that order, and nothing twice.
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.net.transport import TransportError
from kvbaton.sockets import COPY_BELOW_BYTES, HIGH_WATER_MARK
from tests.net.both_nets import FENCE, PATIENCE_S, Ends, on_both


def is_in_order(received: list[list[bytes]], sent: list[list[bytes]]) -> bool:
    """Whether what was received is what was sent, without some of it."""
    rest = iter(sent)
    return all(message in rest for message in received)


def numbered(count: int, start: int = 0) -> list[list[bytes]]:
    return [[str(number).encode()] for number in range(start, start + count)]


_NAMES = st.sampled_from(["a", "b", "c"])
_FRAMES = st.lists(
    st.binary(max_size=40) | st.sampled_from([bytes(COPY_BELOW_BYTES), b"x" * 200_000]),
    min_size=1,
    max_size=4,
).filter(lambda frames: frames[0] != FENCE)
_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("up"), _NAMES, _FRAMES),
        st.tuples(st.just("down"), _NAMES, _FRAMES),
        st.tuples(st.sampled_from(["many up", "many down"]), _NAMES, st.integers(2, 150)),
        st.tuples(st.sampled_from(["fence", "come or go", "stranger"]), _NAMES, st.none()),
    ),
    max_size=25,
)


@given(_OPERATIONS)
@settings(max_examples=40, deadline=None)
def test_whatever_is_sent_comes_alike(operations: list[tuple[str, str, Any]]) -> None:
    async def script(ends: Ends) -> Any:
        results: list[bool] = []
        former: list[bytes] = []
        here = {"a", "b", "c"}
        ends.bind()
        for name in ("a", "b", "c", "witness"):
            ends.connect(name)
            await ends.fence(name)
        for kind, name, what in operations:
            if kind == "come or go":
                await (leave(ends, name, former) if name in here else come(ends, name))
                here ^= {name}
            elif kind == "stranger":
                results += [ends.send_to(peer, [b"x"]) for peer in (b"nobody", *former)]
            elif kind.endswith("down"):
                messages = numbered(what) if kind == "many down" else [what]
                results += [ends.send_to(ends.peers[name], each) for each in messages]
            elif name in here:
                messages = numbered(what) if kind == "many up" else [what]
                results += [ends.send(name, each) for each in messages if kind != "fence"]
                if kind == "fence":
                    await ends.fence(name)
        for name in (*here, "witness"):  # who left last is read, if not before, with who is here
            await ends.fence(name)
        return results, ends.up, ends.down

    async def come(ends: Ends, name: str) -> None:
        ends.connect(name)
        await ends.fence(name)

    async def leave(ends: Ends, name: str, former: list[bytes]) -> None:
        await ends.fence(name)
        ends.send(name, [b"last words"])
        former.append(ends.peers[name])
        ends.close(name)
        await ends.refused(ends.peers[name], "witness")

    in_memory, live = on_both(script)
    assert in_memory == live


def test_a_dealer_keeps_as_much_for_a_router_that_is_not_there_yet() -> None:
    async def script(ends: Ends) -> Any:
        ends.connect("early")
        num_taken = 0
        while ends.send("early", [str(num_taken).encode()]):
            num_taken += 1
        ends.bind()
        await ends.fence("early")
        again = ends.send("early", [b"again"])
        await ends.fence("early")
        return num_taken, again, ends.up

    in_memory, live = on_both(script)
    assert in_memory == live
    assert in_memory[0] == HIGH_WATER_MARK


@pytest.mark.parametrize("direction", ["up", "down"])
def test_who_does_not_read_fills_the_pipe_and_all_that_was_taken_comes_in_order(
    direction: Literal["up", "down"],
) -> None:
    """Nobody reads while the sender does not wait. How much ZeroMQ's own buffers take differs."""

    async def script(ends: Ends) -> bool:
        ends.bind()
        ends.connect("other")
        ends.connect("slow")
        await ends.fence("other")
        await ends.fence("slow")

        def send(message: list[bytes]) -> bool:
            if direction == "up":
                return ends.send("slow", message)
            return ends.send_to(ends.peers["slow"], message)

        frame, num_taken = bytes(1024), 0
        while send([str(num_taken).encode(), frame]):
            num_taken += 1
        assert num_taken > HIGH_WATER_MARK // 2
        assert ends.send_to(ends.peers["other"], [b"still served"])
        received = (ends.up if direction == "up" else ends.down)["slow"]
        async with asyncio.timeout(PATIENCE_S):
            while len(received) < num_taken:
                await ends.fence("other")
        await ends.fence("slow")
        assert [message[0] for message in received] == [m[0] for m in numbered(num_taken)]
        return send([b"again", frame])

    assert on_both(script) == (True, True)


def test_a_router_bound_anew_knows_nobody_and_hears_of_everybody() -> None:
    async def script(ends: Ends) -> Any:
        ends.bind()
        for name in ("a", "b"):
            ends.connect(name)
            await ends.fence(name)
        former = dict(ends.peers)
        ends.unbind()
        sent = numbered(20)
        taken = [ends.send("a", message) for message in sent]
        ends.bind()
        await ends.fence("a")
        await ends.fence("b")
        known = [ends.send_to(peer, [b"x"]) for peer in former.values()]
        late = [ends.send("a", [b"late"]), ends.send_to(ends.peers["a"], [b"late"])]
        await ends.fence("a")
        assert is_in_order(ends.up["a"], [*sent, [b"late"]])
        assert ends.up["a"][-1] == [b"late"]
        return taken, known, late, ends.down, [former[name] == ends.peers[name] for name in "ab"]

    in_memory, live = on_both(script)
    assert in_memory == live
    assert in_memory[1] == [False, False]


@pytest.mark.parametrize("num_cuts", [1, 3])
def test_a_cut_connection_loses_what_is_under_way_and_comes_back_as_another(num_cuts: int) -> None:
    async def script(ends: Ends) -> Any:
        ends.bind()
        ends.connect("weak", await ends.net.weak_endpoint())
        await ends.fence("weak")
        outcome, sent_up, sent_down = [], [], []
        for number in range(num_cuts):
            former = ends.peers["weak"]
            messages = numbered(50, 100 * number)
            sent_up += messages
            sent_down += messages
            taken = [ends.send("weak", m) for m in messages]
            taken += [ends.send_to(former, m) for m in messages]
            ends.net.cut()
            await ends.fence("weak")  # over the next connection
            await ends.refused(former, "weak")
            late = [str(100 * number + 50).encode()]
            sent_up.append(late)
            sent_down.append(late)
            taken += [ends.send("weak", late), ends.send_to(ends.peers["weak"], late)]
            await ends.fence("weak")
            down = [message for message in ends.down["weak"] if message != [b"anyone?"]]
            assert is_in_order(ends.up["weak"], sent_up)
            assert is_in_order(down, sent_down)
            outcome += [taken, former == ends.peers["weak"], ends.up["weak"][-1], down[-1]]
        return outcome

    in_memory, live = on_both(script)
    assert in_memory == live


def test_an_endpoint_is_bound_once_at_a_time() -> None:
    async def script(ends: Ends) -> bool:
        ends.bind()
        with closing(ends.net.transport()) as second, pytest.raises(TransportError, match="in use"):
            second.router(ends.net.endpoint, lambda peer, frames, user: None)
        ends.unbind()
        ends.bind()
        ends.connect("a")
        await ends.fence("a")
        return ends.send("a", [b"x"])

    assert on_both(script) == (True, True)


def test_a_send_that_is_refused_does_not_make_the_router_deaf() -> None:
    """ZeroMQ takes notice of arrivals while it sends, also when it then refuses."""

    async def script(ends: Ends) -> int:
        ends.bind()
        ends.connect("a")
        await ends.fence("a")
        for _ in range(300):
            ends.send("a", [b"x"])
            assert not any(ends.send_to(b"nobody", [b"x"]) for _ in range(20))
            await ends.fence("a")
        return len(ends.up["a"])

    assert on_both(script) == (300, 300)
