"""--compare, and the patched run itself: the same losses as the stock libraries, bit-exact resumption."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from peftkern.__main__ import main
from peftkern.finetune import FinetuneConfig, FinetuneResult, finetune
from peftkern.finetune import compare as compare_module
from peftkern.finetune.compare import run_stock, table
from peftkern.finetune.signals import Interrupted
from peftkern.finetune.trainer import RecipeTrainer


def losses(output: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def test_patched_run_follows_the_stock_run(options: dict[str, Any], tmp_path: Path) -> None:
    patched = finetune(FinetuneConfig(**(options | {"patch": True, "steps": 20})), quiet=True)
    stock = finetune(
        FinetuneConfig(**(options | {"steps": 20, "output": str(tmp_path / "stock")})), quiet=True
    )
    assert losses(patched.output) == pytest.approx(losses(stock.output), rel=1e-3)
    assert patched.perplexity_after["held-out"] == pytest.approx(stock.perplexity_after["held-out"], rel=1e-3)
    assert patched.perplexity_after["held-out"] < 0.9 * patched.perplexity_before["held-out"]


def test_patched_run_resumes_bit_for_bit(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched = options | {"patch": True, "dropout": 0.1}
    whole = finetune(FinetuneConfig(**(patched | {"output": str(tmp_path / "whole")})), quiet=True)
    original = RecipeTrainer.training_step

    def breaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecipeTrainer, "training_step", breaking)
        finetune(FinetuneConfig(**patched), quiet=True)
    resumed = finetune(FinetuneConfig(**patched, resume=True), quiet=True)
    assert losses(resumed.output) == losses(whole.output)
    assert resumed.perplexity_after == whole.perplexity_after


def test_table_shows_both_and_the_ratio() -> None:
    def result(speed: float, memory: int) -> FinetuneResult:
        return FinetuneResult(
            output="out",
            perplexity_before={"held": 9.0},
            perplexity_after={"held": 8.0},
            final_loss=2.0,
            steps=1,
            tokens=1,
            tokens_per_second=speed,
            peak_memory=memory,
            train_seconds=1.0,
            sample_prompt="",
            sample_before="",
            sample_after="",
        )

    lines = table(result(300.0, 2**30), result(200.0, 2**31)).splitlines()
    assert [line.split()[-3:] for line in lines[-2:]] == [["300", "200", "1.500"], ["1.00", "2.00", "0.500"]]


def test_failing_stock_run_is_told(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module.sys, "executable", shutil.which("false"))
    with pytest.raises(ChildProcessError, match="ended with status 1.*--resume tries again"):
        run_stock(FinetuneConfig(**options))


@pytest.mark.slow
def test_compare_prints_and_writes_both(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["finetune", *FinetuneConfig(**(options | {"patch": True, "compare": True})).to_arguments()])
        == 0
    )
    assert "peftkern       stock    ratio" in capsys.readouterr().out
    both = json.loads((Path(options["output"]) / "compare.json").read_text())
    assert both["peftkern"]["final_loss"] == pytest.approx(both["stock"]["final_loss"], rel=1e-3)
    assert both["stock"]["output"].endswith("stock") and both["stock"]["peak_memory"] > 0


def test_signal_reaches_the_stock_run(tmp_path: Path) -> None:
    """The child ends in its own way, after which this process ends by the same signal."""
    saved = tmp_path / "saved"
    child = "import os, pathlib, signal, sys, time\n"
    child += "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(143)))\n"
    child += "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    with pytest.raises(Interrupted) as stopped:
        compare_module._wait([sys.executable, "-c", child, str(saved)])
    assert stopped.value.status == 143 and saved.exists()
