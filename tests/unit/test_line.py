"""The gateway's line: by priority, fairly between tenants, and nobody starves."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.routing.line import Line


def add(line: Line[str], item: str, tenant: str = "", **fields: float) -> None:
    line.add(
        item,
        priority=int(fields.get("priority", 0)),
        tenant=tenant,
        num_tokens=int(fields.get("num_tokens", 10)),
        takes_s=fields.get("takes_s", 1.0),
        due_at=fields.get("due_at", 0.0),
        has_target=bool(fields.get("has_target", False)),
    )


def take(line: Line[str], count: int, now: float = 0.0) -> list[str]:
    return [line.take(now) for _ in range(count)]


def test_a_lower_priority_goes_first_and_among_equals_the_one_that_is_due() -> None:
    line: Line[str] = Line()
    add(line, "late", due_at=9)
    add(line, "soon", due_at=3)
    add(line, "urgent", priority=-1, due_at=50)
    add(line, "same", due_at=3)
    assert take(line, 4) == ["urgent", "soon", "same", "late"]


def test_who_is_too_late_lets_those_pass_who_need_not_be() -> None:
    line: Line[str] = Line()
    for item, due_at in (("lost", 4), ("no target", 4.5), ("soon", 6), ("lost too", 4.9)):
        add(line, item, due_at=due_at, has_target=item != "no target")
    assert take(line, 4, now=4.0) == ["no target", "soon", "lost", "lost too"]


def test_who_is_too_late_does_not_wait_for_ever() -> None:
    line: Line[str] = Line()
    add(line, "lost", due_at=1, has_target=True)
    for number in range(20):
        add(line, f"next-{number}", due_at=9, has_target=True)
        if line.take(5.0) == "lost":
            break
    assert number < 8


def test_a_tenant_that_floods_gets_no_more_than_another() -> None:
    line: Line[str] = Line()
    for number in range(100):
        add(line, f"flood-{number}", "flood", due_at=number)
    for number in range(6):
        add(line, f"few-{number}", "few", due_at=1000 + number)
    taken = Counter(item.split("-")[0] for item in take(line, 13))
    assert taken["few"] >= 5


def test_tokens_are_shared_not_requests() -> None:
    line: Line[str] = Line()
    for number in range(40):
        add(line, f"big-{number}", "big", num_tokens=40, due_at=number)
        add(line, f"small-{number}", "small", num_tokens=10, due_at=number)
    taken = Counter(item.split("-")[0] for item in take(line, 40))
    assert 2.5 < taken["small"] / taken["big"] < 4.5


def test_who_was_away_has_saved_up_no_turns() -> None:
    line: Line[str] = Line()
    for number in range(50):
        add(line, f"a-{number}", "a", due_at=number)
    take(line, 40)
    for number in range(10):
        add(line, f"b-{number}", "b", due_at=number)
    taken = Counter(item[0] for item in take(line, 12))
    assert taken["a"] >= 4
    line.charge("b", 10_000)  # it was given long answers
    assert all(item.startswith("a") for item in take(line, 1))


def test_who_leaves_is_not_served_and_leaves_no_trace() -> None:
    line: Line[str] = Line()
    for item in "abc":
        add(line, item, item)
    line.remove("a")
    line.remove("a")
    assert len(line) == 2
    assert take(line, 2) == ["b", "c"]
    add(line, "d", "a")
    assert take(line, 1) == ["d"]
    assert len(line) == 0


def test_the_wait_ahead_is_that_of_all_or_of_as_much_of_each_tenant() -> None:
    line: Line[str] = Line()
    assert line.ahead_s("a") == 0.0
    for number in range(10):
        add(line, f"a-{number}", "a", takes_s=2.0)
    assert line.ahead_s("a") == 20.0
    assert line.ahead_s("b") <= 4.0


@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.sampled_from("abc"), st.integers(1, 99), st.booleans()),
        min_size=1,
        max_size=60,
    )
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_nobody_starves(steps: list[tuple[int, str, int, bool]]) -> None:
    """Whoever comes is served within eight turns for each that was there, whoever comes later."""
    line: Line[str] = Line()
    most_turns: dict[str, int] = {}
    num_turns = 0

    def turn() -> None:
        nonlocal num_turns
        item = line.take(0.0)
        num_turns += 1
        assert num_turns <= most_turns.pop(item)

    for number, (priority, tenant, num_tokens, takes) in enumerate(steps):
        item = str(number)
        add(line, item, tenant, priority=priority, num_tokens=num_tokens, due_at=-number)
        most_turns[item] = num_turns + 8 * len(line)
        if takes:
            turn()
    while line:
        turn()
    assert not most_turns


def test_a_flood_of_the_highest_priority_does_not_starve_the_lowest() -> None:
    line: Line[str] = Line()
    add(line, "patient", priority=100)
    for number in range(20):
        add(line, f"urgent-{number}", priority=-100)
        if line.take(0.0) == "patient":
            break
    assert number < 8
