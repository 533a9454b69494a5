"""--no-patch: the stock libraries, as far as they are right on this machine. Repacking is driven on any
CPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern import bnb_backend
from peftkern.__main__ import main
from peftkern.finetune import FinetuneConfig, InputError, finetune

bnb_modules = importlib.import_module("bitsandbytes.nn.modules")
repacks = pytest.mark.skipif(
    not hasattr(bnb_modules, "has_avx512bf16"), reason="this bitsandbytes does not repack weights"
)


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hook as an installed package has it; afterwards as it was."""
    was = bnb_backend.state()[0]
    monkeypatch.delenv("PEFTKERN_BNB_BACKEND", raising=False)
    yield bnb_backend.register()
    monkeypatch.undo()
    if not was:
        bnb_backend.unregister()


def norms(output: str) -> list[float]:
    return [
        json.loads(line)["grad_norm"] for line in (Path(output) / "metrics.jsonl").read_text().splitlines()
    ]


@repacks
def test_the_stock_run_trains_after_its_evaluation(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    never = finetune(FinetuneConfig(**options), quiet=True)
    capsys.readouterr()
    repacked = []
    monkeypatch.setattr(bnb_modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb_modules, "_convert_weight_packed_for_cpu", lambda *args: repacked.append(args))
    result = finetune(FinetuneConfig(**(options | {"output": str(tmp_path / "able")})), quiet=True)
    assert not repacked and norms(result.output) == norms(never.output)
    assert (
        "Stock run: 14 4-bit layers are kept from being repacked for CPU inference" in capsys.readouterr().err
    )


@pytest.mark.parametrize("patch", [True, False])
def test_the_hook_is_out_of_a_stock_run_alone(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, hook: bool, patch: bool
) -> None:
    from peftkern.finetune.trainer import RecipeTrainer

    original, states = RecipeTrainer.training_step, []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        states.append(bnb_backend.state()[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "training_step", watched)
    finetune(FinetuneConfig(**(options | {"patch": patch, "steps": 2})), quiet=True)
    assert states == [hook and patch] * 2 and bnb_backend.state()[0] == hook


def test_a_stock_that_decodes_wrongly_is_refused(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hook: bool
) -> None:
    import bitsandbytes

    right = bitsandbytes.functional.dequantize_4bit

    def wrong(weight: torch.Tensor, state: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        dense = right(weight, state, *args, **kwargs)
        return dense.roll(1, 0) if state.shape[1] == 128 else dense

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", wrong)
    with pytest.raises(
        InputError, match=r"--no-patch: .*mlp\.down_proj.* \(64 x 128, blocks of 64\) wrongly on this CPU"
    ):
        finetune(FinetuneConfig(**options), quiet=True)
    assert bnb_backend.state()[0] == hook and not (Path(options["output"]) / "run.json").exists()
    assert main(["finetune", *FinetuneConfig(**options).to_arguments()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peftkern finetune: error: --no-patch: ") and "--quantization none" in error
    # our own kernels do not ask it
    finetune(FinetuneConfig(**(options | {"patch": True, "steps": 1})), quiet=True)
