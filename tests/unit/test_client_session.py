"""A client's session by value: hello, requests, restarts and silence, without a socket."""

from __future__ import annotations

import pytest

from kvbaton.codec import encode
from kvbaton.errors import (
    CancelledRequestError,
    ConnectionLostError,
    InvalidRequestError,
    KvbatonError,
    OverloadedError,
    ProtocolError,
)
from kvbaton.protocol import (
    HELLO_REQUIRED,
    Accepted,
    Cancel,
    ClientMessage,
    Done,
    Error,
    Generate,
    Hello,
    Ping,
    Pong,
    Timings,
    Token,
    Tokens,
    Usage,
    Welcome,
    client_message_decoder,
)
from kvbaton.questions import (
    Answer,
    Counted,
    Detokenized,
    ModelList,
    Prompt,
    PromptToken,
    Scored,
    Tokenized,
)
from kvbaton.session import MAX_SILENT_TICKS, Event, Session

HELLO = Hello(protocol_version=1)
HELLO_REFUSAL = Error(code=HELLO_REQUIRED, message="say hello first")


class World:
    """A session, what it sent, and what its requests heard."""

    def __init__(self) -> None:
        self.sent: list[ClientMessage] = []
        self.is_full = False
        self.heard: dict[int, list[Event]] = {}
        self.session = Session("tcp://gateway", self._send)
        self.session.greet()

    def _send(self, raw: bytes) -> bool:
        if not self.is_full:
            self.sent.append(client_message_decoder().decode(raw))
        return not self.is_full

    def take_sent(self) -> list[ClientMessage]:
        sent, self.sent = self.sent, []
        return sent

    def start(self, request_id: int) -> None:
        self.heard[request_id] = []
        self.session.start(request_id, encode(request(request_id)), self.heard[request_id].append)

    def welcome(self, instance_id: str = "a") -> None:
        self.session.receive(
            Welcome(protocol_version=1, instance_id=instance_id, model="demo", max_model_len=1)
        )


def request(request_id: int) -> Generate:
    return Generate(id=request_id, text="x")


def tokens(request_id: int) -> Tokens:
    return Tokens(id=request_id, tokens=[Token(index=0, token_id=5)])


def done(request_id: int) -> Done:
    usage = Usage(num_prompt_tokens=1, num_output_tokens=1, num_cached_tokens=0)
    return Done(id=request_id, finish_reason="stop", usage=usage, timings=Timings())


def refused(request_id: int) -> Error:
    return Error(code=HELLO_REQUIRED, message="say hello first", id=request_id)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def welcomed(world: World) -> World:
    world.welcome()
    world.take_sent()
    return world


def test_hello_is_said_once_and_requests_wait_for_the_welcome(world: World) -> None:
    world.session.greet()
    world.start(1)
    assert world.take_sent() == [HELLO]
    world.welcome()
    assert world.take_sent() == [request(1)]


def test_a_request_hears_its_own_messages_until_it_is_done(welcomed: World) -> None:
    for request_id in (1, 2):
        welcomed.start(request_id)
    for message in (tokens(2), tokens(1), done(1), tokens(1), tokens(7), done(7)):
        welcomed.session.receive(message)
    assert welcomed.heard == {1: [tokens(1), done(1)], 2: [tokens(2)]}


def test_a_request_hears_that_it_is_accepted(welcomed: World) -> None:
    welcomed.start(1)
    accepted = Accepted(id=1, request_id="a" * 32, seed=7)
    welcomed.session.receive(accepted)
    assert welcomed.heard == {1: [accepted]}


def test_a_session_says_whether_it_is_welcome_and_how_much_it_has(world: World) -> None:
    assert not world.session.is_welcome
    world.welcome()
    for request_id in (1, 2):
        world.start(request_id)
    world.session.receive(done(1))
    assert (world.session.is_welcome, world.session.num_requests) == (True, 1)
    world.session.end(ConnectionLostError("gone"))
    assert (world.session.is_welcome, world.session.num_requests) == (False, 0)


def test_an_error_with_an_id_ends_that_request_alone(welcomed: World) -> None:
    for request_id in (1, 2):
        welcomed.start(request_id)
    welcomed.session.receive(
        Error(id=1, code="invalid_request", message="no", field="stop", retry_after_s=2.0)
    )
    (error,) = welcomed.heard[1]
    assert isinstance(error, InvalidRequestError)
    assert (error.message, error.field, error.retry_after_s) == ("no", "stop", 2.0)
    assert welcomed.heard[2] == []
    assert welcomed.session.error is None


def test_an_error_of_an_unknown_kind_is_still_an_error(welcomed: World) -> None:
    welcomed.start(1)
    welcomed.session.receive(Error(id=1, code="from_the_future", message="no"))
    (error,) = welcomed.heard[1]
    assert type(error) is KvbatonError


def test_an_error_without_an_id_ends_everything(welcomed: World) -> None:
    for request_id in (1, 2):
        welcomed.start(request_id)
    welcomed.session.receive(Error(code="protocol_error", message="what was that"))
    for request_id in (1, 2):
        (error,) = welcomed.heard[request_id]
        assert isinstance(error, ProtocolError)
    assert welcomed.heard[1][0] is not welcomed.heard[2][0]


def test_a_cancel_is_sent_and_its_answer_is_what_the_request_hears(welcomed: World) -> None:
    welcomed.start(1)
    welcomed.take_sent()
    welcomed.session.cancel(1)
    welcomed.session.cancel(9)
    assert welcomed.take_sent() == [Cancel(id=1)]
    assert welcomed.heard[1] == []
    welcomed.session.receive(Error(id=1, code="cancelled", message="it was"))
    assert isinstance(welcomed.heard[1][0], CancelledRequestError)
    welcomed.session.cancel(1)
    assert welcomed.take_sent() == []


def test_a_request_cancelled_before_the_welcome_is_never_sent(world: World) -> None:
    world.start(1)
    world.session.cancel(1)
    assert isinstance(world.heard[1][0], CancelledRequestError)
    world.welcome()
    assert world.take_sent() == [HELLO]


def test_requests_that_were_refused_for_want_of_a_hello_are_repeated(welcomed: World) -> None:
    for request_id in (1, 2):
        welcomed.start(request_id)
    welcomed.take_sent()
    for request_id in (1, 2):
        welcomed.session.receive(refused(request_id))
    welcomed.start(3)
    assert welcomed.take_sent() == [HELLO]
    welcomed.welcome("b")
    assert welcomed.take_sent() == [request(1), request(2), request(3)]
    assert welcomed.heard == {1: [], 2: [], 3: []}


def test_requests_in_flight_at_a_restart_are_lost(welcomed: World) -> None:
    welcomed.start(1)
    welcomed.session.receive(tokens(1))
    welcomed.session.receive(HELLO_REFUSAL)  # the answer to a ping
    welcomed.session.receive(HELLO_REFUSAL)
    assert welcomed.take_sent() == [request(1), HELLO]
    assert welcomed.heard[1] == [tokens(1)]
    welcomed.welcome("b")
    assert isinstance(welcomed.heard[1][1], ConnectionLostError)
    assert welcomed.session.error is None
    assert welcomed.session.welcome is not None
    assert welcomed.session.welcome.instance_id == "b"


def test_a_pong_of_another_instance_makes_the_client_say_hello(welcomed: World) -> None:
    welcomed.session.receive(Pong(instance_id="a"))
    assert welcomed.take_sent() == []
    welcomed.session.receive(Pong(instance_id="b"))
    assert welcomed.take_sent() == [HELLO]


def test_a_silent_gateway_is_pinged_and_then_given_up(welcomed: World) -> None:
    welcomed.start(1)
    welcomed.take_sent()
    for _ in range(MAX_SILENT_TICKS - 1):
        welcomed.session.tick()
    assert welcomed.take_sent() == [Ping()] * (MAX_SILENT_TICKS - 1)
    welcomed.session.tick()
    assert isinstance(welcomed.heard[1][0], ConnectionLostError)
    assert isinstance(welcomed.session.error, ConnectionLostError)
    assert welcomed.take_sent() == []


def test_any_message_is_a_sign_of_life(welcomed: World) -> None:
    welcomed.start(1)
    for _ in range(5 * MAX_SILENT_TICKS):
        welcomed.session.tick()
        welcomed.session.receive(tokens(1))
    assert welcomed.session.error is None


def test_a_gateway_that_never_says_welcome_is_given_up_without_pings(world: World) -> None:
    world.start(1)
    for _ in range(MAX_SILENT_TICKS):
        world.session.tick()
    assert world.take_sent() == [HELLO]
    assert isinstance(world.heard[1][0], ConnectionLostError)


def test_a_request_after_the_end_fails_at_once(welcomed: World) -> None:
    welcomed.session.end(ConnectionLostError("gone"))
    welcomed.session.end(ConnectionLostError("gone twice"))
    welcomed.start(1)
    assert [str(event) for event in welcomed.heard[1]] == ["gone"]


def test_closing_cancels_what_is_in_flight(welcomed: World) -> None:
    welcomed.start(1)
    welcomed.take_sent()
    welcomed.session.close()
    assert welcomed.take_sent() == [Cancel(id=1)]
    assert isinstance(welcomed.heard[1][0], ConnectionLostError)


def test_another_protocol_version_is_refused_in_words(world: World) -> None:
    world.start(1)
    world.session.receive(Welcome(protocol_version=2, instance_id="a", model="demo"))
    (error,) = world.heard[1]
    assert str(error) == "the gateway speaks protocol version 2, this client 1"


def test_a_full_queue_refuses_the_request(welcomed: World) -> None:
    welcomed.is_full = True
    welcomed.start(1)
    assert isinstance(welcomed.heard[1][0], OverloadedError)
    welcomed.is_full = False
    welcomed.start(2)
    assert welcomed.heard[2] == []


def test_a_queue_that_is_full_at_the_welcome_refuses_the_request(world: World) -> None:
    world.start(1)
    world.is_full = True
    world.welcome()
    assert isinstance(world.heard[1][0], OverloadedError)


def test_a_request_hears_its_prompt_and_ends_with_an_answer_of_any_kind(welcomed: World) -> None:
    answers: list[Answer] = [
        Scored(id=1, num_prompt_tokens=1),
        Tokenized(id=2, token_ids=[5]),
        Detokenized(id=3, text="x"),
        ModelList(id=4, models=[]),
        Counted(id=5, stats={}),
    ]
    prompt = Prompt(id=1, tokens=[PromptToken(index=0, token_id=5)])
    for answer in answers:
        welcomed.start(answer.id)
    welcomed.session.receive(prompt)
    for answer in answers:
        welcomed.session.receive(answer)
        welcomed.session.receive(answer)
    assert welcomed.heard.pop(1) == [prompt, answers[0]]
    assert welcomed.heard == {answer.id: [answer] for answer in answers[1:]}
    assert welcomed.session.num_requests == 0
