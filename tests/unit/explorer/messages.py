"""What members and the store say, as short values and as messages."""

from __future__ import annotations

from collections.abc import Callable

from common.messages import (
    Aborted,
    AbortHandoff,
    Claim,
    Commit,
    Fill,
    GiveBack,
    Granted,
    HandoffOpened,
    Lease,
    Leased,
    Message,
    OpenHandoff,
    Quit,
    Release,
    Seal,
    Sealed,
    Suspend,
)
from tests.unit.explorer.values import (
    LEASE_CALL,
    PROMPT_TOKENS,
    ROOT,
    TENANT,
    Said,
    key_of,
    member_id,
)


def _opens(said: Said, prompt: int) -> Message:
    _, number, (prefill, decode), _ = said
    return OpenHandoff(
        call_id=number + 1,
        request_id=f"r{number}",
        prefill_id=member_id(*prefill),
        decode_id=member_id(*decode),
        tenant=TENANT,
        root_key=ROOT,
        keys=[key_of(prompt, 0)],
        num_tokens=PROMPT_TOKENS,
    )


def _aborts(said: Said, _prompt: int) -> Message:
    kind, number, _, _ = said
    if kind == "abort":
        return AbortHandoff(handoff_id=f"h{number}")
    return AbortHandoff(open_call_id=number + 1)


def _calls(said: Said, _prompt: int) -> Message:
    kind, number, epoch, _ = said
    call = Fill if kind == "fill" else Claim
    return call(call_id=number + 1, handoff_id=f"h{number}", epoch=epoch)


def _commits(said: Said, prompt: int) -> Message:
    _, number, (epoch, first), blocks = said
    keys = [key_of(prompt, first + place) for place in range(len(blocks))]
    return Commit(
        handoff_id=f"h{number}",
        epoch=epoch,
        first_index=first,
        blocks=list(blocks),
        keys=keys if first else [],  # the first is the prompt's
    )


def _seals(said: Said, _prompt: int) -> Message:
    _, number, (epoch, finished), _ = said
    return Seal(handoff_id=f"h{number}", epoch=epoch, first_token=1, finished=finished)


def _suspends(said: Said, _prompt: int) -> Message:
    _, number, (epoch, num_tokens), _ = said
    return Suspend(call_id=number + 1, handoff_id=f"h{number}", epoch=epoch, num_tokens=num_tokens)


def _ends(said: Said, _prompt: int) -> Message:
    kind, number, epoch, _ = said
    return (Release if kind == "release" else Quit)(handoff_id=f"h{number}", epoch=epoch)


def _leases(said: Said, _prompt: int) -> Message:
    kind, _, num_blocks, blocks = said
    if kind == "lease":
        return Lease(call_id=LEASE_CALL, num_blocks=num_blocks)
    return GiveBack(blocks=list(blocks))


_MAKERS: dict[str, Callable[[Said, int], Message]] = {
    "open": _opens,
    "abort": _aborts,
    "abort_open": _aborts,
    "fill": _calls,
    "claim": _calls,
    "commit": _commits,
    "seal": _seals,
    "suspend": _suspends,
    "release": _ends,
    "quit": _ends,
    "lease": _leases,
    "give_back": _leases,
}


def message_of(said: Said, prompt: int) -> Message:
    """What a member says as the store gets it."""
    return _MAKERS[said[0]](said, prompt)


def said_by_store(message: Message) -> Said:
    """What the store says as the explored world has it."""
    match message:
        case Granted():
            return "granted", message.call_id - 1, message.num_committed, tuple(message.blocks)
        case Leased():
            return "leased", 0, 0, tuple(message.blocks)
        case HandoffOpened():
            return "opened", int(message.handoff_id[1:]), message.epoch, ()
        case Sealed() | Aborted():
            kind = type(message).__name__.lower()
            return kind, int(message.handoff_id[1:]), message.epoch, ()
    return "refused", message.call_id - 1, 0, ()
