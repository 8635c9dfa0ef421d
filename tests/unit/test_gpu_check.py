"""What scripts/gpu_check can be held to without a GPU: its verdicts, and the model it measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.engine.model import Model
from common.engine.native.model import NativeModel
from common.engine.runner import TorchEngine
from scripts.gpu.blank_model import write_blank_model
from scripts.gpu.parts import Result, run_part


def test_verdicts() -> None:
    result = Result("part")
    result.check("error", 0.5, 1.0)
    result.agree("tokens", [1, 2, 3], [1, 2, 4], 2)
    result.aim("share", 0.1, 0.6)
    result.tell("attention", "xformers")
    assert [line.is_well for line in result.lines] == [True, True, None, None]
    assert result.lines[2].found == "10%, missed"
    assert result.is_well
    result.agree("tokens again", [1, 2, 3], [1, 2, 4], 3)
    assert not result.is_well


@pytest.mark.parametrize(("found", "is_well"), [(1.0, True), (1.01, False), (float("nan"), False)])
def test_an_error_must_be_a_number_within_its_limit(found: float, is_well: bool) -> None:
    result = Result("part")
    result.check("error", found, 1.0)
    assert result.is_well is is_well


def test_a_part_that_fails_or_hangs_says_so() -> None:
    assert "No module named scripts.gpu.nothing" in run_part("nothing", "cpu", 60).failure
    assert run_part("parity", "cpu", 0.01).failure == "not done after 0 s"


def test_a_blank_model_takes_no_room_and_can_be_loaded(tmp_path: Path) -> None:
    write_blank_model(
        tmp_path, context=128, layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16,
        intermediate=96, vocab=65536, tied=True,
    )  # fmt: skip
    weights = (tmp_path / "model.safetensors").stat()
    assert weights.st_size > 65536 * 64 * 2
    assert weights.st_blocks * 512 < weights.st_size // 4
    engine = TorchEngine(tmp_path)
    assert isinstance(engine.model, NativeModel | Model)
    assert torch.equal(engine.model._norm, torch.ones(64, dtype=torch.bfloat16))
    engine.close()
