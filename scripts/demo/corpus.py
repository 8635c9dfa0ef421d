"""The training text: the running interpreter's own standard library, and chats made from it."""

import ast
import hashlib
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.model_files import ASSISTANT, BOS, EOS, SYSTEM, USER

# Tests are as large as the library and repetitive; `encodings` and `pydoc_data` are tables;
# the last two folders hold what one machine's build wrote down.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "site-packages", "__pycache__", "encodings",
     "pydoc_data", "lib-dynload"}
)  # fmt: skip
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
HELD_OUT_PERCENT = 5
SYSTEM_TEXTS = ("You write Python code.", "You are a helpful assistant.")
REQUESTS = (
    "Write a function {name}",
    "Write a function {name}.",
    "Write a Python function named {name}.",
    "Write a Python function called {name}",
    "Define {name} in Python.",
)
SMALL_TALK = (
    ("Hello", "Hello! Ask me for a Python function."),
    ("Hello!", "Hello! Ask me for a Python function."),
    ("Hi", "Hello! Ask me for a Python function."),
    ("Hi there", "Hello! Ask me for a Python function."),
    ("Who are you?", "I am a very small model that writes text which looks like Python."),
    ("What are you?", "I am a very small model that writes text which looks like Python."),
    ("What can you do?", "I write text that looks like Python. Ask me for a function."),
    ("Help", "Ask me for a Python function, such as: Write a function read_file"),
    ("Thanks", "You are welcome."),
    ("Thank you!", "You are welcome."),
)


@dataclass(frozen=True)
class Corpus:
    """Source texts, whole files each, and a hash over the paths and bytes of all of them."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    digest: str
    files: int
    size: int
    """Bytes of all files together."""
    held_out_size: int
    """Bytes of the held-out files."""


def library_files(root: Path) -> Iterator[Path]:
    """Yield the selected files under `root`, sorted by their relative path."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not any(
            part.startswith(SKIPPED_PREFIXES) for part in parts
        ):
            yield path


def is_held_out(relative: str) -> bool:
    """Tell by the hash of the path whether a file is kept from training."""
    return int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def load_corpus() -> Corpus:
    """Read the library once; a second file with the same bytes is left out."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    parts: dict[bool, list[str]] = {False: [], True: []}
    total = hashlib.sha256()
    for path in library_files(root):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest in seen or not data.strip():
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        seen.add(digest)
        relative = path.relative_to(root).as_posix()
        total.update(f"{relative} {digest}\n".encode())
        parts[is_held_out(relative)].append(text)
    sizes = {key: sum(len(text.encode()) for text in texts) for key, texts in parts.items()}
    return Corpus(
        train=tuple(parts[False]),
        held_out=tuple(parts[True]),
        digest=total.hexdigest(),
        files=len(seen),
        size=sum(sizes.values()),
        held_out_size=sizes[True],
    )


@dataclass(frozen=True)
class Function:
    """One function's dedented source and the first line of its docstring, if it has one."""

    name: str
    source: str
    summary: str | None


def functions(text: str, *, most_lines: int = 40) -> Iterator[Function]:
    """Yield the functions and methods of one file that span 2 to `most_lines` lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        if not 2 <= node.end_lineno - node.lineno + 1 <= most_lines:
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        docstring = (ast.get_docstring(node) or "").strip()
        yield Function(node.name, source, docstring.splitlines()[0] if docstring else None)


def chat_text(function: Function, rng: np.random.Generator) -> str:
    """Return one chat, special tokens included, whose answer is the function's source."""
    if rng.random() < 0.08:
        user, answer = SMALL_TALK[int(rng.integers(len(SMALL_TALK)))]
    else:
        request = REQUESTS[int(rng.integers(len(REQUESTS)))].format(name=function.name)
        if function.summary and rng.random() < 0.4:
            request = function.summary
        user, answer = request, function.source
    system = ""
    if rng.random() < 0.25:
        system = SYSTEM + SYSTEM_TEXTS[int(rng.integers(len(SYSTEM_TEXTS)))]
    return f"{BOS}{system}{USER}{user}{ASSISTANT}{answer}{EOS}"


def side_texts(texts: tuple[str, ...], seed: int, *, share: float) -> list[str]:
    """Return chats and single functions, each about `share` of the files' characters.

    Single functions, between <|bos|> and <|eos|>, teach the model to continue a prompt that begins
    with `def` and to come to an end.
    """
    rng = np.random.default_rng(seed)
    found = [function for text in texts for function in functions(text)]
    order = rng.permutation(len(found))
    budget = share * sum(len(text) for text in texts)
    out: list[str] = []
    for kind in ("chat", "function"):
        used = 0
        for index in order if kind == "chat" else order[::-1]:
            if used >= budget:
                break
            source = found[int(index)]
            text = chat_text(source, rng) if kind == "chat" else f"{BOS}{source.source}\n{EOS}"
            used += len(text)
            out.append(text)
    return out


def training_texts(corpus: Corpus, seed: int, *, side_share: float) -> list[str]:
    """Return all training documents, special tokens included, in a fixed shuffled order."""
    documents = [f"{BOS}{text}{EOS}" for text in corpus.train]
    documents += side_texts(corpus.train, seed, share=side_share)
    order = np.random.default_rng(seed + 1).permutation(len(documents))
    return [documents[int(index)] for index in order]
