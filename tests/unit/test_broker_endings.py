"""The broker by value: who is told of the end of a handoff, and who may bring it about."""

from __future__ import annotations

import pytest

from common.messages import (
    Aborted,
    AbortHandoff,
    Commit,
    Failed,
    Fill,
    OpenHandoff,
    Quit,
    Release,
    Seal,
    StaleError,
)
from kvbaton.errors import ProtocolError
from services.kvstore.handoff import HandoffState
from tests.unit.broker_store import (
    DECODE,
    GATEWAY,
    PREFILL,
    ROOT,
    TENANT,
    Store,
    aborted,
)


def test_an_abort_is_told_to_all_three() -> None:
    store = Store()
    store.fill()
    store.worker(DECODE, Quit(handoff_id="h1", epoch=1))
    told = store.sent()
    assert [member for member, _ in told] == [PREFILL, DECODE, GATEWAY]
    assert {type(message) for _, message in told} == {Aborted}


def test_a_gateway_is_not_told_of_its_own_abort() -> None:
    store = Store()
    store.fill()
    store.gateway(AbortHandoff(handoff_id="h1"))
    told = store.sent()
    assert [member for member, _ in told] == [PREFILL, DECODE]
    assert {type(message) for _, message in told} == {Aborted}


def test_a_worker_for_both_parts_is_told_once() -> None:
    store = Store()
    store.gateway(
        OpenHandoff(
            request_id="r",
            prefill_id=DECODE,
            decode_id=DECODE,
            tenant=TENANT,
            root_key=ROOT,
            keys=[],
            num_tokens=1,
        )
    )
    store.sent()
    store.broker.lose(DECODE, "it was silent")
    assert [member for member, _ in store.sent()] == [DECODE, GATEWAY]


def test_a_call_that_waits_for_room_is_ended_by_its_number() -> None:
    store = Store()
    store.open([1] * 12, call_id=7)
    store.open([2] * 12, call_id=8)
    store.sent()
    store.gateway(AbortHandoff(open_call_id=8))
    member, failed = store.sent()[0]
    assert (member, failed.call_id) == (GATEWAY, 8)
    assert isinstance(failed, Failed)
    assert failed.code == StaleError.code
    assert list(store.ledger.handoffs) == ["h1"]


def test_a_gateway_cannot_end_the_handoffs_of_another() -> None:
    store = Store()
    store.open([1] * 12, call_id=7)
    store.open([2] * 12, call_id=8)
    store.sent()
    store.gateway(AbortHandoff(handoff_id="h1"), sender="other")
    store.gateway(AbortHandoff(open_call_id=8), sender="other")
    assert store.sent() == []
    assert list(store.ledger.handoffs) == ["h1", "h2"]


def test_an_abort_of_what_is_over_is_nothing() -> None:
    store = Store()
    store.gateway(AbortHandoff(handoff_id="h1"))
    store.gateway(AbortHandoff(open_call_id=5))
    assert store.sent() == []


def test_a_worker_that_gives_up_ends_the_handoff_for_all() -> None:
    store = Store()
    store.fill()
    store.worker(PREFILL, Quit(handoff_id="h1", epoch=1))
    assert store.ledger.handoffs["h1"].state is HandoffState.HELD
    assert {member for member, _ in store.sent()} == {PREFILL, DECODE, GATEWAY}


def test_decode_that_gives_up_waits_for_prefill_to_quit() -> None:
    store = Store()
    store.fill()
    store.worker(DECODE, Quit(handoff_id="h1", epoch=1))
    assert store.ledger.pool.counts()["quarantined"] == 3
    store.worker(PREFILL, Quit(handoff_id="h1", epoch=1))
    assert store.ledger.pool.counts()["free"] == 8


def test_prefill_that_has_sealed_cannot_give_up_any_more() -> None:
    store = Store()
    store.claim()
    store.worker(PREFILL, Quit(handoff_id="h1", epoch=1))
    assert store.sent() == []
    assert list(store.ledger.handoffs) == ["h1"]


@pytest.mark.parametrize(("sender", "epoch"), [(PREFILL, 0), (PREFILL, 2), ("other", 1)])
def test_a_quit_of_another_epoch_or_of_a_stranger_is_nothing(sender: str, epoch: int) -> None:
    store = Store()
    store.fill()
    store.worker(sender, Quit(handoff_id="h1", epoch=epoch))
    assert store.sent() == []
    assert store.ledger.pool.counts()["granted"] == 3


def test_the_loss_of_a_worker_ends_its_handoffs_and_no_others() -> None:
    store = Store()
    store.claim()
    store.open([7, 8, 9], call_id=8)
    store.sent()
    store.broker.lose(PREFILL, "prefill.1 is lost")
    told = store.sent()
    assert {(type(message), getattr(message, "handoff_id", "")) for _, message in told} == {
        (Aborted, "h2")
    }
    store.broker.lose(DECODE, "decode.1 is lost")
    assert (GATEWAY, aborted("decode.1 is lost")) in store.sent()


def test_the_loss_of_a_gateway_ends_what_it_opened() -> None:
    store = Store()
    store.open()
    store.broker.lose(GATEWAY, "it was silent")
    assert store.ledger.handoffs == {}


@pytest.mark.parametrize("who", [PREFILL, DECODE])
def test_a_gateway_that_is_told_of_an_abort_lets_go_of_what_is_read_by_saying_so(who: str) -> None:
    store = Store()
    blocks = store.claim() if who == DECODE else store.fill()
    if who == PREFILL:
        store.worker(PREFILL, Commit(handoff_id="h1", epoch=1, first_index=0, blocks=blocks[:2]))
    store.broker.lose(who, "it was silent")
    assert (GATEWAY, aborted("it was silent")) in store.sent()
    assert store.ledger.pool.counts()["committed"] == 2
    store.gateway(AbortHandoff(handoff_id="h1"), sender="other")
    assert store.ledger.pool.counts()["committed"] == 2
    for _ in range(2):
        store.gateway(AbortHandoff(handoff_id="h1"))
        assert store.ledger.pool.counts()["cached"] == 2
    assert store.sent() == []


def test_a_gateway_that_ends_a_handoff_itself_takes_nothing_of_it_any_more() -> None:
    store = Store()
    store.claim()
    store.gateway(AbortHandoff(handoff_id="h1"))
    counts = store.ledger.pool.counts()
    assert (counts["cached"], counts["committed"], counts["granted"]) == (2, 0, 1)
    store.worker(DECODE, Quit(handoff_id="h1", epoch=1))
    assert store.ledger.handoffs == {}


# ---- what nobody may say ------------------------------------------------------------------------


def test_each_side_may_say_only_its_own_messages() -> None:
    store = Store()
    with pytest.raises(ProtocolError, match="a gateway must not send Fill"):
        store.gateway(Fill(handoff_id="h1", epoch=1))
    with pytest.raises(ProtocolError, match="a worker must not send OpenHandoff"):
        store.worker(
            PREFILL,
            OpenHandoff(
                request_id="r",
                prefill_id=PREFILL,
                decode_id=DECODE,
                tenant=TENANT,
                root_key=ROOT,
                keys=[],
                num_tokens=1,
            ),
        )


@pytest.mark.parametrize("sender", [PREFILL, DECODE])
def test_an_ending_that_crosses_an_abort_is_as_good_as_a_quit(sender: str) -> None:
    store = Store()
    ending: Seal | Release
    if sender == PREFILL:
        store.fill()
        ending = Seal(handoff_id="h1", epoch=1, first_token=5)
    else:
        store.claim()
        ending = Release(handoff_id="h1", epoch=1)
    store.gateway(AbortHandoff(handoff_id="h1"))
    assert list(store.ledger.handoffs) == ["h1"]
    store.sent()
    store.worker(sender, ending)
    assert store.ledger.handoffs == {}
    assert store.sent() == []
    store.ledger.check()


def test_a_late_ending_of_another_than_the_writer_is_refused() -> None:
    store = Store()
    store.claim()
    store.gateway(AbortHandoff(handoff_id="h1"))
    for epoch, sender in ((1, PREFILL), (2, DECODE)):
        with pytest.raises(StaleError):
            store.worker(sender, Release(handoff_id="h1", epoch=epoch))
    assert list(store.ledger.handoffs) == ["h1"]
