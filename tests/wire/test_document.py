"""docs/protocol.md says what the code does: its bytes, fields, defaults, limits and errors."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import msgspec
import pytest

from kvbaton import admin, codec, conversation, errors, operations, protocol, questions, sampling
from tests.wire.golden import golden_bytes

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")

RECORDS: dict[str, type[msgspec.Struct]] = {
    "### `hello`": protocol.Hello,
    "### `generate`": protocol.Generate,
    "A message of `messages`:": conversation.ChatMessage,
    "`sampling`:": sampling.SamplingParams,
    "A tool call:": conversation.ToolCall,
    "A function call:": conversation.FunctionCall,
    "A resumed choice:": protocol.Resumed,
    "### `score`": questions.Score,
    "### `tokenize`": questions.Tokenize,
    "### `detokenize`": questions.Detokenize,
    "### `models`": questions.Models,
    "### `stats`": questions.Stats,
    "### `prompt`": questions.Prompt,
    "A prompt token:": questions.PromptToken,
    "A finished choice:": protocol.FinishedChoice,
    "### `scored`": questions.Scored,
    "### `tokenized`": questions.Tokenized,
    "### `detokenized`": questions.Detokenized,
    "### `model_list`": questions.ModelList,
    "A model:": questions.ModelCard,
    "### `counted`": questions.Counted,
    "### `cancel`": protocol.Cancel,
    "`resume`, ": protocol.Resume,
    "### `welcome`": protocol.Welcome,
    "### `accepted`": protocol.Accepted,
    "### `tokens`": protocol.Tokens,
    "A token:": protocol.Token,
    "### `done`": protocol.Done,
    "`usage`:": protocol.Usage,
    "`timings`, in milliseconds": protocol.Timings,
    "### `error`": protocol.Error,
    "### `pong`": protocol.Pong,
    "### `audit`": protocol.Audit,
    "### `why`": protocol.Why,
    "### `status`": operations.Status,
    "### `drain`": operations.Drain,
    "### `log_level`": operations.SetLogLevel,
    "### `standing`": operations.Standing,
    "The status of a member:": operations.MemberStatus,
    "The status of a store:": operations.StoreStatus,
    "### `drained`": operations.Drained,
    "### `log_level_set`": operations.LogLevelSet,
    "### `audited`": protocol.Audited,
    "### `told`": protocol.Told,
    "The audit of a store:": admin.StoreAudit,
    "A member:": admin.MemberAudit,
    "A handoff:": admin.HandoffAudit,
    "The history of a store:": admin.StoreHistory,
    "An event:": admin.HistoryEvent,
}
LITERALS: dict[str, object] = {
    "nil": None,
    "empty": {},
    "`{}`": sampling.SamplingParams(),
    "`true`": True,
    "`false`": False,
}


def first_table(after: str) -> list[list[str]]:
    """The rows of the first table after a line that begins so, without its head."""
    text = re.split(rf"^{re.escape(after)}", DOCUMENT, maxsplit=1, flags=re.MULTILINE)[1]
    lines = text[text.index("\n|") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def default_of(field: msgspec.structs.FieldInfo) -> object:
    if field.default is not msgspec.NODEFAULT:
        return field.default
    factory = field.default_factory
    return "required" if factory is msgspec.NODEFAULT else factory()


@pytest.mark.parametrize("heading", RECORDS)
def test_every_field_is_documented_with_its_default(heading: str) -> None:
    documented = {}
    for name, _, default, meaning in first_table(heading):
        assert meaning
        if default == "required" or default in LITERALS:
            documented[name.strip("`")] = LITERALS.get(default, "required")
        else:
            documented[name.strip("`")] = ast.literal_eval(default.strip("`"))
    fields = msgspec.structs.fields(RECORDS[heading])
    assert documented == {field.name: default_of(field) for field in fields}


def test_every_error_is_documented_with_its_status_and_whether_to_retry() -> None:
    documented = {
        code.strip("`"): (int(status), {"yes": True, "no": False}[retry])
        for code, status, retry, _ in first_table("## 8. Errors")
    }
    base = errors.KvbatonError
    classes: list[type[errors.KvbatonError]] = [base, *base.__subclasses__()]
    public = [cls for cls in classes if cls.__module__ == errors.__name__]
    assert documented == {cls.code: (cls.status, cls.is_retryable) for cls in public}


EXAMPLES = re.findall(r"^```hex (\w+)\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("name", "lines"), EXAMPLES)
def test_the_examples_are_the_golden_bytes(name: str, lines: str) -> None:
    digits = "".join(line.partition(";")[0] for line in lines.splitlines())
    assert bytes.fromhex(digits) == golden_bytes(name)


def test_the_example_shows_every_kind_of_message() -> None:
    shown = {name.partition("_")[0] for name, _ in EXAMPLES}
    assert shown == {
        *("hello", "generate", "cancel", "ping", "audit", "why", "status", "drain", "log"),
        *("score", "tokenize", "detokenize", "models", "stats"),
        *("welcome", "accepted", "prompt", "tokens", "done", "error", "pong", "audited", "told"),
        *("scored", "tokenized", "detokenized", "model", "counted", "standing", "drained"),
    }


def test_the_limits_in_the_text_are_the_limits_in_the_code() -> None:
    for said in (
        f"protocol, version {protocol.PROTOCOL_VERSION}\n",
        f"more than {protocol.MAX_REQUEST_BYTES} bytes",
        f"than {codec.MAX_MESSAGE_BYTES}.",
        f"at most {codec.MAX_MAP_ITEMS} entries, arrays at most {codec.MAX_ITEMS}",
        f"at most {protocol.MAX_STOP_STRINGS}, each of 1 to {protocol.MAX_STOP_STRING_CHARS}",
        f"from 1 to {protocol.MAX_DEADLINE_MS}",
        f"At most {protocol.MAX_REQUESTS_IN_FLIGHT} requests",
        f"every {protocol.PING_INTERVAL_S:g} seconds",
        f"for {protocol.CLIENT_TIMEOUT_S:g} seconds",
        f"at most {sampling.MAX_STOP_TOKEN_IDS}; each ends",
        f"draws alone; at most {protocol.MAX_CHOICES} ",
        f"its logit; at most {sampling.MAX_BIASED_TOKENS} ",
        f"-{sampling.MAX_BIAS:g} to {sampling.MAX_BIAS:g}, added",
        f"at most {sampling.MAX_ALLOWED_TOKENS}; none: all",
        f"at most {sampling.MAX_BAD_WORDS}, each of 1 to {sampling.MAX_BAD_WORD_TOKENS} tokens",
        f"at most {sampling.MAX_BAD_WORDS // 2}, each of 1 to {protocol.MAX_STOP_STRING_CHARS}",
        f"with 1 to {questions.MAX_SCORED} entries",
        f"at most {questions.MAX_DETOKENIZED}, each from 0",
        f"at most {admin.MAX_ROWS} elements",
        f"the last {admin.MAX_EVENTS} at most",
        f"of the first {admin.MAX_EVENT_BLOCKS};",
        f"at most {admin.MAX_ID_CHARS} characters",
        f"0 to {sampling.MAX_TOP_LOGPROBS}: log probabilities",
    ):
        assert said in DOCUMENT
