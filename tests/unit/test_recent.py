"""The last requests are kept within bounds, and shown to their own tenant."""

from __future__ import annotations

from typing import Any

import msgspec

from common.messages import MAX_CHUNKS, WorkReport
from services.gateway.observe.recent import Ended, Recent
from tests.unit.explanations import at, begin, chunk, served


def ended(tenant: str, request_id: str) -> Ended:
    return Ended(tenant, request_id, 16, served().timeline, at(200), 1.7e9)


def add(recent: Recent, tenant: str, request_id: str) -> None:
    recent.add(ended(tenant, request_id))


def ids(recent: Recent, limit: int, tenant: str | None) -> list[Any]:
    return [each["id"] for each in msgspec.json.decode(recent.latest(limit, tenant))["requests"]]


def test_the_latest_come_first_and_as_many_as_asked_for() -> None:
    recent = Recent()
    for number in range(5):
        add(recent, "acme", f"request-{number}")
    assert ids(recent, 2, None) == ["request-4", "request-3"]
    assert len(ids(recent, 100, None)) == 5


def test_a_tenant_sees_its_own() -> None:
    recent = Recent()
    add(recent, "acme", "a")
    add(recent, "other", "b")
    add(recent, "acme", "c")
    assert ids(recent, 10, "acme") == ["c", "a"]
    assert ids(recent, 1, "acme") == ["c"]
    assert ids(recent, 10, "") == []
    assert ids(recent, 10, None) == ["c", "b", "a"]


def test_the_oldest_go_when_there_are_too_many() -> None:
    recent = Recent(most=3)
    for number in range(5):
        add(recent, "", str(number))
    assert ids(recent, 10, None) == ["4", "3", "2"]


def test_the_oldest_go_when_they_take_too_much_room() -> None:
    room = ended("", "0").num_bytes
    recent = Recent(most_bytes=3 * room + room // 2)
    for number in range(5):
        add(recent, "", str(number))
    assert ids(recent, 10, None) == ["4", "3", "2"]


def test_a_request_with_much_to_tell_takes_the_room_of_many() -> None:
    most = ended("", "most")
    for _ in range(100):
        attempt = begin(most.timeline, 3)
        report = WorkReport(arrived_ms=1, joined_ms=1, chunks=[chunk(1.0, 0.0)] * MAX_CHUNKS)
        for by_decode in (False, True):
            attempt.heard(report, at(50), by_decode=by_decode)
    assert len(most.shown()) < most.num_bytes < 2 << 20
    assert len(ended("", "few").shown()) < ended("", "few").num_bytes


def test_the_page_finds_what_it_draws() -> None:
    recent = Recent()
    add(recent, "", "request-1")
    (shown,) = msgspec.json.decode(recent.latest(1, None))["requests"]
    assert {"id", "received_at", "outcome", "verdict", "ttft_ms", "tpot_ms", "total_ms"} <= {*shown}
    assert shown["num_prompt_tokens"] == 128
    assert shown["num_cached_tokens"] == 16
    assert shown["num_output_tokens"] == 5
    assert shown["prefill_worker"] == "prefill.1"
    assert shown["decode_worker"] == "decode.1"
    assert shown["stages"][-1] == {
        "name": "decode", "start_ms": 70.0, "end_ms": 101.0, "worker": "decode.1", "attempt": 1,
    }  # fmt: skip
