"""Writers by value: who is surely not the process that it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.messages import Member
from services.kvstore.writers import Writers


class FakeProcesses:
    """All are alive, and began at `began`."""

    def __init__(self, began: int) -> None:
        self.began = began

    def on_exit(self, pid: int, callback: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def started_at(self, pid: int) -> int:
        return self.began


@pytest.mark.parametrize(
    ("noted", "began", "host_id", "has_ended"),
    [
        (5, 5, "host", False),
        (5, 6, "host", True),  # its number is another's by now
        (0, 6, "host", False),  # nothing was noted
        (5, 0, "host", False),  # it cannot be seen
        (5, 6, "elsewhere", False),
    ],
)
def test_a_number_used_again_tells_that_a_process_has_ended(
    noted: int, began: int, host_id: str, has_ended: bool
) -> None:
    writers = Writers(FakeProcesses(began), "host")
    member = Member(member_id="a" * 32, role="decode", name="decode.1", host_id=host_id, pid=7)
    assert writers.has_ended(member, noted) == has_ended
