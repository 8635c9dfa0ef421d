"""What an operator sees of an audit and of a history, with and without rich."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvbaton.__main__ import main
from kvbaton.admin import HandoffAudit, HistoryEvent, MemberAudit, StoreAudit, StoreHistory
from kvbaton.protocol import Audited, Told
from kvbaton.tables import audit_parts, draw, plain_lines, why_parts

AUDITED = Audited(
    id=1,
    closes=False,
    stores=[
        StoreAudit(
            endpoint="tcp://a",
            num_blocks=4,
            blocks={"free": 3, "quarantined": 1},
            handoffs={"aborting": 1},
            members=[
                MemberAudit(
                    member_id="m",
                    name="decode.1",
                    role="decode",
                    num_quarantined=1,
                    answer="differs",
                    waits_for="decode.1 must end its step",
                )
            ],
            oldest_handoffs=[
                HandoffAudit(handoff_id="h1", request_id="[r]", state="aborting", age_s=1.25)
            ],
            warnings=["prefill.1 did not answer"],
            discrepancies=["decode.1: it holds block 3 in 2 places"],
        ),
        StoreAudit(store=1, endpoint="tcp://b", problem="it cannot be reached"),
    ],
)
TOLD = Told(
    id=1,
    stores=[
        StoreHistory(
            endpoint="tcp://a",
            now="free, stamp 2",
            events=[
                HistoryEvent(
                    age_s=2.0,
                    event="handoff_filled",
                    handoff_id="h1",
                    request_id="r",
                    member="prefill.1",
                    num_blocks=3,
                    blocks=[(3, 1), (2, 7)],
                )
            ],
            num_cut=4,
            num_forgotten=5,
        ),
        StoreHistory(store=1, endpoint="tcp://b"),
        StoreHistory(store=2, endpoint="tcp://c", problem="it cannot be reached"),
    ],
)


def test_an_audit_as_plain_text() -> None:
    assert list(plain_lines(audit_parts(AUDITED))) == [
        "KV store 0 at tcp://a",
        "  blocks       number",
        "  free         3",
        "  quarantined  1",
        "  total        4",
        "  reserved     0",
        "",
        "  handoffs  number",
        "  aborting  1",
        "",
        "  holder    state  granted  leased  quarantined  says     waits for",
        "  decode.1  here   0        0       1            differs  decode.1 must end its step",
        "",
        "  handoff  request  state     age      holder  final  granted  waits for",
        "  h1       [r]      aborting  1.250 s          0      0",
        "",
        "warning: prefill.1 did not answer",
        "discrepancy: decode.1: it holds block 3 in 2 places",
        "KV store 1 at tcp://b: it cannot be reached",
        "The audit does not close: 1 discrepancies, 1 KV stores could not be asked.",
    ]


def test_a_history_as_plain_text() -> None:
    assert list(plain_lines(why_parts(TOLD))) == [
        "KV store 0 at tcp://a",
        "  age      event           by         handoff  request  blocks",
        "  2.000 s  handoff filled  prefill.1  h1       r        3(1) 2(7) and 1 more",
        "",
        "now: free, stamp 2",
        "4 older events are not shown",
        "the store has forgotten its 5 oldest events",
        "KV store 1 at tcp://b: nothing is remembered of it",
        "KV store 2 at tcp://c: it cannot be reached",
    ]


def test_rich_shows_the_same_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert draw(audit_parts(AUDITED))
    shown = capsys.readouterr().out
    for words in ("quarantined", "[r]", "decode.1 must end its step", "warning: prefill.1 did"):
        assert words in shown
    assert draw(why_parts(TOLD))
    assert "3(1) 2(7) and 1 more" in capsys.readouterr().out


def test_nothing_is_drawn_where_rich_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    assert not draw(audit_parts(AUDITED))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("stores", "status"),
    [
        ([StoreAudit()], 0),
        ([StoreAudit(discrepancies=["a block is lost"])], 1),
        ([StoreAudit(), StoreAudit(problem="it does not answer")], 2),
        ([StoreAudit(discrepancies=["a block is lost"]), StoreAudit(problem="silent")], 2),
    ],
)
def test_the_exit_status_tells_what_was_found_out(
    stores: list[StoreAudit], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    key_file.write_text("a key that is long enough\n")
    answer = Audited(id=1, closes=status == 0, stores=stores)

    @asynccontextmanager
    async def operator_of(_options: object) -> AsyncIterator[SimpleNamespace]:
        async def audit() -> Audited:
            return answer

        yield SimpleNamespace(audit=audit)

    monkeypatch.setattr("kvbaton.commands.books.operator_of", operator_of)
    assert main(["audit", "--json", "--admin-key-file", str(key_file)]) == status
