"""Nothing that comes from a file or a wire is ever run: weights are safetensors, no pickles."""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.engine.config import ModelError
from common.engine.weights import read_entries

ROOT = Path(__file__).parents[2]
FOLDERS = ("common", "kvbaton", "services")
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "torch.load", "numpy.load", "np.load", "yaml.load"}


def _used(tree: ast.AST) -> Iterator[str]:
    """The names of what is imported, and of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_no_module_reads_what_can_run_code() -> None:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    for file in files:
        used = set(_used(ast.parse(file.read_text(encoding="utf-8"))))
        assert not used & (MODULES | CALLS), file
    assert set(_used(ast.parse("import pickle\ntorch.load(x)"))) == {"pickle", "torch.load"}


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_pickled_weights_are_refused_unread(name: str, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (tmp_path / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ModelError):
        read_entries(tmp_path)
    assert not sprung.exists()
