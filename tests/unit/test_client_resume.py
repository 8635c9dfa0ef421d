"""One request across gateways by value: what the next one is told, and what the caller hears."""

from __future__ import annotations

import pytest

from kvbaton.backoff import backoff_s
from kvbaton.errors import (
    CancelledRequestError,
    ConnectionLostError,
    DeadlineError,
    ForbiddenError,
    InvalidRequestError,
    KvbatonError,
    OverloadedError,
    ProtocolError,
    TooLargeError,
    UnavailableError,
)
from kvbaton.protocol import (
    MAX_REQUEST_BYTES,
    Accepted,
    Done,
    Generate,
    Resume,
    Resumed,
    Timings,
    Token,
    Tokens,
    Usage,
    client_message_decoder,
)
from kvbaton.questions import Prompt, PromptToken
from kvbaton.resume import ResumableRequest
from kvbaton.sampling import SamplingParams
from kvbaton.session import Event

REQUEST = Generate(id=1, text="x", sampling=SamplingParams(max_tokens=9), deadline_ms=10_000)
ACCEPTED = Accepted(id=1, request_id="a" * 32, seed=7)
LOST = ConnectionLostError("the connection ended")
REFUSED = UnavailableError("no decode worker is alive")
FULL = OverloadedError("full")


class World:
    """A request at time 100, and what its caller hears."""

    def __init__(self, message: Generate = REQUEST) -> None:
        self.heard: list[Event] = []
        self.request = ResumableRequest(message, self.heard.append)

    def sent(self, now: float = 100.0) -> Generate:
        message = client_message_decoder().decode(self.request.encoded(now))
        assert isinstance(message, Generate)
        return message

    def take(self, *events: Event, now: float = 100.0) -> bool:
        """What it says of the last."""
        return [self.request.take(event, now) for event in events][-1]


def tokens(*indexes: int, finish_reason: str | None = None) -> Tokens:
    made = [Token(index=index, token_id=50 + index, text=str(index)) for index in indexes]
    return Tokens(id=1, tokens=made, finish_reason=finish_reason)


def done() -> Done:
    usage = Usage(num_prompt_tokens=1, num_output_tokens=3, num_cached_tokens=0)
    return Done(id=1, finish_reason="stop", usage=usage, timings=Timings())


@pytest.fixture
def world() -> World:
    return World()


def test_the_first_gateway_gets_the_request_as_it_was_made(world: World) -> None:
    sent = world.sent()
    assert (sent.text, sent.sampling, sent.deadline_ms) == ("x", REQUEST.sampling, 10_000)
    assert sent.resumable
    assert sent.resume is None


def test_the_next_gateway_is_told_seed_tokens_and_what_is_left_of_the_deadline(
    world: World,
) -> None:
    world.sent(now=100)
    assert not world.take(ACCEPTED, tokens(0, 1), tokens(2), LOST, now=103)
    sent = world.sent(now=104.5)
    assert sent.resume == Resume(request_id="a" * 32, seed=7, tokens=[50, 51, 52])
    assert sent.sampling == SamplingParams(max_tokens=9, seed=7)
    assert (sent.text, sent.deadline_ms, sent.resumable) == ("x", 5500, True)
    assert world.sent(now=1000).deadline_ms == 1  # the gateway says that it is late
    assert world.heard == [tokens(0, 1), tokens(2)]


def test_a_request_without_a_deadline_stays_without() -> None:
    world = World(Generate(id=1, text="x"))
    world.sent()
    world.take(LOST)
    assert world.sent().deadline_ms is None
    assert world.request.give_up_at(60) == 160


def test_a_request_that_was_never_accepted_begins_anew(world: World) -> None:
    world.sent()
    assert not world.take(REFUSED)
    assert world.sent().resume is None
    assert world.take(tokens(0), done())
    assert world.heard == [tokens(0), done()]


def test_the_end_is_asked_for_when_it_alone_is_missing(world: World) -> None:
    world.sent()
    world.take(ACCEPTED, tokens(0), tokens(1, finish_reason="stop"), LOST)
    assert world.sent().resume == Resume(
        request_id="a" * 32, seed=7, tokens=[50, 51], finish_reason="stop"
    )


def test_tokens_that_come_again_are_left_out(world: World) -> None:
    world.take(ACCEPTED, tokens(0, 1), LOST, tokens(0), tokens(1, 2), tokens(3))
    assert world.heard == [tokens(0, 1), tokens(2), tokens(3)]


@pytest.mark.parametrize("indexes", [(1,), (0, 2), (0, 0), (-1, 1)])
def test_tokens_that_leave_one_out_end_it(world: World, indexes: tuple[int, ...]) -> None:
    assert world.take(ACCEPTED, tokens(*indexes))
    (error,) = world.heard
    assert isinstance(error, ProtocolError)
    assert world.request.is_over
    assert world.take(tokens(0))
    assert world.heard == [error]


@pytest.mark.parametrize("error", [InvalidRequestError("no"), ForbiddenError("no"), FULL])
def test_what_a_retry_cannot_help_or_was_never_admitted_ends_it(
    world: World, error: KvbatonError
) -> None:
    assert world.take(error)
    assert world.heard == [error]


def test_what_was_accepted_is_not_given_up_for_load_elsewhere(world: World) -> None:
    assert not world.take(ACCEPTED, FULL)
    assert world.heard == []


def test_tokens_of_a_gateway_that_accepts_nothing_are_lost_with_it(world: World) -> None:
    assert world.take(tokens(0), LOST)
    assert world.heard == [tokens(0), LOST]


def test_a_cancelled_request_goes_on_nowhere(world: World) -> None:
    world.take(ACCEPTED, tokens(0))
    world.request.cancel()
    assert world.take(tokens(1), LOST)
    assert isinstance(world.heard[-1], CancelledRequestError)


def test_patience_begins_with_the_first_loss_since_the_last_token(world: World) -> None:
    world.sent(now=100)
    world.take(ACCEPTED, LOST, now=102)
    world.take(ACCEPTED, REFUSED, now=103)
    assert world.request.num_failures == 2
    assert world.request.give_up_at(5) == 107
    assert world.request.give_up_at(60) == 110  # the deadline
    world.take(tokens(0), LOST, now=104)
    assert world.request.num_failures == 1
    assert world.request.give_up_at(5) == 109


def test_who_gives_up_hears_the_last_reason(world: World) -> None:
    world.sent()
    world.take(LOST, REFUSED)
    world.request.give_up(105, "no welcome")
    assert world.heard == [REFUSED]


def test_who_never_had_a_gateway_hears_so(world: World) -> None:
    world.request.lost(100)
    world.request.give_up(105, "no welcome from tcp://gateway")
    (error,) = world.heard
    assert isinstance(error, ConnectionLostError)
    assert str(error) == "no welcome from tcp://gateway"


def test_the_deadline_passes_without_a_gateway_too(world: World) -> None:
    world.sent(now=100)
    world.take(LOST)
    world.request.give_up(110, "no welcome")
    assert isinstance(world.heard[0], DeadlineError)


def test_a_request_that_grew_too_large_cannot_go_on() -> None:
    world = World(Generate(id=1, text="x" * (MAX_REQUEST_BYTES - 100)))
    world.sent()
    world.take(ACCEPTED, tokens(*range(50)), LOST)
    with pytest.raises(TooLargeError, match=f"the limit is {MAX_REQUEST_BYTES}"):
        world.request.encoded(100)


def test_pauses_grow_up_to_a_second_and_differ() -> None:
    for num_failures, most in ((0, 0.05), (1, 0.1), (4, 0.8), (5, 1.0), (500, 1.0)):
        pauses = {backoff_s(num_failures) for _ in range(50)}
        assert all(most / 2 <= pause <= most for pause in pauses)
        assert len(pauses) > 10


# ---- several choices, and prompts ----------------------------------------------------------------


def of_choice(choice: int, *indexes: int, finish_reason: str | None = None) -> Tokens:
    made = [Token(index=index, token_id=50 + index, choice=choice) for index in indexes]
    return Tokens(id=1, tokens=made, finish_reason=finish_reason)


def prompt(*indexes: int) -> Prompt:
    return Prompt(id=1, tokens=[PromptToken(index=index, token_id=index) for index in indexes])


def test_each_choice_goes_on_from_its_own_tokens() -> None:
    world = World(Generate(id=1, text="x", n=3))
    world.sent()
    world.take(ACCEPTED, of_choice(2, 0, 1), of_choice(0, 0, finish_reason="stop"), LOST)
    assert world.sent().resume == Resume(
        request_id="a" * 32,
        seed=7,
        choices=[
            Resumed(tokens=[50], finish_reason="stop"),
            Resumed(),
            Resumed(tokens=[50, 51]),
        ],
    )
    world.take(of_choice(2, 1, 2), of_choice(1, 0))
    assert world.heard[2:] == [of_choice(2, 2), of_choice(1, 0)]


@pytest.mark.parametrize("wrong", [of_choice(3, 0), of_choice(-1, 0), of_choice(1, 1)])
def test_tokens_of_no_choice_or_out_of_order_end_it(wrong: Tokens) -> None:
    world = World(Generate(id=1, text="x", n=3))
    assert world.take(ACCEPTED, wrong)
    assert isinstance(world.heard[0], ProtocolError)


def test_a_prompt_that_comes_again_is_left_out(world: World) -> None:
    world.take(ACCEPTED, prompt(0, 1), LOST, ACCEPTED, prompt(0), prompt(1, 2), tokens(0))
    assert world.heard == [prompt(0, 1), prompt(2), tokens(0)]
    world.take(prompt(4))
    assert isinstance(world.heard[-1], ProtocolError)
