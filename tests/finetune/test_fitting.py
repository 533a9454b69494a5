"""`--fit`: memory used as the planner chooses, the same training; and what is said when memory runs out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.finetune import FinetuneConfig, finetune, fitting
from peftkern.finetune.errors import InputError

from .conftest import save_tiny_gemma2, save_tiny_model

pytestmark = pytest.mark.any_isa

PATCHED = {"patch": True, "seq_length": 128, "batch_size": 1, "steps": 3, "save_steps": 3}


def run(options: dict[str, Any], **changes: Any) -> Any:
    return finetune(FinetuneConfig(**options | PATCHED | changes), quiet=True)


def losses(result: Any) -> list[float]:
    lines = (Path(result.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def needed(options: dict[str, Any], **changes: Any) -> int:
    """Bytes of the plan for a run on this machine."""
    from peftkern.finetune.fitting import run_options
    from peftkern.memory.planner.cards import CPU
    from peftkern.memory.planner.plan import predict
    from peftkern.memory.planner.shapes import read_shape

    shape = read_shape(options["model"])
    plan = run_options(FinetuneConfig(**options | PATCHED).resolved(), shape, 128)
    return predict(shape, plan.but(**changes), CPU)


def test_a_run_that_fits_is_left_as_it_is_and_a_smaller_budget_checkpoints(
    options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    plain = run(options)
    whole, least = needed(options, checkpointing=False), needed(options, checkpointing=True)
    assert least < whole
    roomy = run(options, output=str(tmp_path / "roomy"), fit=f"{whole + 1}B")
    assert "no gradient checkpointing" in capfd.readouterr().err
    assert losses(roomy) == losses(plain)
    tight = run(options, output=str(tmp_path / "tight"), fit=f"{least}B")
    assert "gradient checkpointing: layers' inputs 2 on the card" in capfd.readouterr().err
    assert losses(tight) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize(
    ("adapter", "reads"),
    [("bottleneck", "its output"), ("seq_bn", "the stream behind it"), ("par_bn", "its")],
)
def test_bottlenecks_are_fitted(
    adapter: str, reads: str, options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    options = options | {"adapter": adapter} | ({} if adapter == "bottleneck" else {"r": 16})
    plain = run(options)
    whole, least = needed(options, checkpointing=False), needed(options, checkpointing=True)
    assert least < whole
    tight = run(options, output=str(tmp_path / "tight"), fit=f"{least}B")
    said = capfd.readouterr().err
    assert "gradient checkpointing: layers' inputs 2 on the card" in said and f"which read {reads}" in said
    assert losses(tight) == pytest.approx(losses(plain), rel=1e-5)


def test_the_least_of_bottlenecks_is_a_store_and_tiles(
    options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    from peftkern.memory.planner.cards import CPU
    from peftkern.memory.planner.choose import minimum
    from peftkern.memory.planner.shapes import read_shape

    options = options | {"adapter": "bottleneck"}
    plain, shape = run(options), read_shape(options["model"])
    asked = fitting.run_options(FinetuneConfig(**options | PATCHED).resolved(), shape, 128)
    least, _ = minimum(shape, asked, CPU)
    smallest = run(options, output=str(tmp_path / "small"), fit=f"{least}B", fit_disk="1GB")
    assert "on disk" in capfd.readouterr().err
    assert losses(smallest) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize(
    ("packed", "apart", "batch", "multiple", "lengths", "expected"),
    [
        (True, True, 1, None, [9, 5], "packed"),
        (True, False, 1, None, [9, 5], "whole"),
        (True, False, 2, None, [9, 5], "padded"),  # the last window is shorter
        (False, True, 1, None, [9, 5], "whole"),
        (False, True, 2, None, [9, 5], "padded"),
        (False, True, 2, None, [200, 300], "whole"),  # all are cut to one length
        (False, True, 1, 8, [16, 9], "padded"),
        (False, True, 1, 8, [16, 8], "whole"),
    ],
)
def test_what_the_rows_of_a_batch_are(
    packed: bool, apart: bool, batch: int, multiple: int | None, lengths: list[int], expected: str
) -> None:
    config = FinetuneConfig(batch_size=batch, seq_length=128, pad_to_multiple_of=multiple)
    assert fitting._rows(config, lengths, packed, apart) == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_take_what_is_planned_in_the_recipe(
    checkpointing: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the recipe itself is counted; its batch of two windows is one row under a mask."""
    from peftkern.finetune import trainer
    from peftkern.memory.count import MemoryCount
    from peftkern.memory.planner.shapes import read_shape

    from ..memory.test_planner_count import PHASES, predicted

    step, chosen, seen = trainer.RecipeTrainer.training_step, [], []
    choose = fitting.choose_fit

    def counted(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with MemoryCount() as count:
            result = step(self, model, inputs, *args, **kwargs)
        seen.append((tuple(inputs["input_ids"].shape), count.peaks))
        return result

    def watched(*args: Any, **kwargs: Any) -> Any:
        chosen.append(choose(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(trainer.RecipeTrainer, "training_step", counted)
    monkeypatch.setattr(fitting, "choose_fit", watched)
    packed = {"document_boundaries": True, "batch_size": 2, "steps": 2, "seq_length": 256}
    whole, least = (
        needed(options, checkpointing=on, rows="packed", batch=2, length=256) for on in (False, True)
    )
    run(options, **packed, fit=f"{least if checkpointing else whole + 1}B")
    (fit,) = chosen
    assert fit.options.rows == "packed" and fit.options.checkpointing is checkpointing
    for (rows, length), peaks in seen:
        assert rows == 1 and length <= 512
        known = fit.options.to_dict() | {"batch": 1}
        del known["length"], known["batch"]
        plan = predicted(read_shape(options["model"]), length, 1, known)
        for phase in PHASES:
            assert plan[phase] == pytest.approx(peaks[phase], rel=0.05), (phase, length)


def test_a_prefix_is_fitted_unless_it_has_a_gate(
    options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    from peftkern.memory.planner.cards import CPU
    from peftkern.memory.planner.choose import minimum
    from peftkern.memory.planner.shapes import read_shape

    del options["r"]
    options = options | {"adapter": "prefix[tokens=8]"}
    plain, shape = run(options), read_shape(options["model"])
    assert needed(options, checkpointing=True) < needed(options, checkpointing=False)
    asked = fitting.run_options(FinetuneConfig(**options | PATCHED).resolved(), shape, 128)
    least, _ = minimum(shape, asked, CPU)
    smallest = run(options, output=str(tmp_path / "small"), fit=f"{least}B", fit_disk="1GB")
    assert "on disk" in capfd.readouterr().err
    assert losses(smallest) == pytest.approx(losses(plain), rel=1e-4)
    with pytest.raises(InputError, match="init=gate puts one beside attention's output: drop --fit"):
        run(options, output=str(tmp_path / "gate"), adapter="prefix[init=gate]", fit="1GB")


def test_the_disk_and_tiles_are_used_where_they_must_be(
    options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    from peftkern.finetune.fitting import run_options
    from peftkern.memory.planner.cards import CPU
    from peftkern.memory.planner.choose import minimum
    from peftkern.memory.planner.shapes import read_shape

    plain, shape = run(options), read_shape(options["model"])
    asked = run_options(FinetuneConfig(**options | PATCHED).resolved(), shape, 128)
    least, _ = minimum(shape, asked, CPU)
    smallest = run(options, output=str(tmp_path / "small"), fit=f"{least}B", fit_disk="1GB")
    said = capfd.readouterr().err
    assert "on disk" in said
    assert losses(smallest) == pytest.approx(losses(plain), rel=1e-4)


def test_budgets_below_the_minimum_are_refused_before_loading(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"--fit 100KB: .* needs .* at the least"):
        run(options, fit="100KB")
    with pytest.raises(InputError, match="--fit many"):
        run(options, fit="many")
    with pytest.raises(InputError, match="drop --no-patch"):
        finetune(FinetuneConfig(**options | {"fit": "1GB", "patch": False}), quiet=True)
    assert not Path(options["output"]).exists()


def test_running_out_of_memory_says_which_part_took_how_much(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkern.finetune import trainer

    def exhausted(*args: Any, **kwargs: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(trainer.RecipeTrainer, "training_step", exhausted)
    with pytest.raises(
        MemoryError, match=r"Planned for 1 × 128 tokens: .* at the peak .*KiB.*What takes less: "
    ):
        run(options)
    with pytest.raises(
        MemoryError, match=r"^out of memory .*--quantization nf4: --overwrite, or another --output$"
    ):
        finetune(FinetuneConfig(**options | {"overwrite": True}), quiet=True)


def test_the_longest_batch_first_changes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    dropping = options | {"dropout": 0.1}
    plain = run(dropping)
    rehearsed = run(dropping, output=str(tmp_path / "rehearsed"), longest_first=True)
    assert losses(rehearsed) == losses(plain)


def test_the_longest_batch_tells_before_training(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkern.finetune import trainer

    seen = []

    def exhausted(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(inputs["input_ids"].shape)
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(trainer.RecipeTrainer, "compute_loss", exhausted)
    with pytest.raises(MemoryError, match="no memory left"):
        run(options, longest_first=True)
    assert seen == [(1, 128)]


def test_the_optimizer_is_stored_and_compared(options: dict[str, Any]) -> None:
    run(options)
    config = json.loads((Path(options["output"]) / "run.json").read_text())["config"]
    assert config["optimizer"] == ("paged_adamw_8bit" if torch.cuda.is_available() else "adamw")
    with pytest.raises(InputError, match="--optimizer: 'adamw' in the stored run, 'adamw_8bit' now"):
        run(options, optimizer="adamw_8bit", resume=True, steps=6)
    with pytest.raises(InputError, match="--optimizer must be one of"):
        FinetuneConfig(optimizer="sgd")


def test_all_that_can_be_chosen_is_put_on_a_model(options: dict[str, Any], tmp_path: Path) -> None:
    from peftkern.finetune.fitting import Fit, install_fit
    from peftkern.finetune.model import load_model
    from peftkern.memory.planner.budgets import Limits
    from peftkern.memory.planner.cards import CPU
    from peftkern.memory.planner.options import RunOptions
    from peftkern.memory.planner.shapes import read_shape

    # whose weights are large enough to be streamed
    base = str(save_tiny_model(tmp_path / "base", hidden=512))
    config = FinetuneConfig(**options | PATCHED | {"model": base}).resolved()
    ids = torch.arange(128)[None] % 300

    def step(model: torch.nn.Module) -> list[torch.Tensor]:
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    shape = read_shape(base)
    chosen = RunOptions(
        length=128,
        rank=4,
        keep_layers=1,
        disk_layers=1,
        mlp_tile=64,
        kv_groups=True,
        rebuild_norms=True,
        layers_on_host=True,
    )
    torch.manual_seed(0)
    plain = step(load_model(base, config))
    torch.manual_seed(0)
    model = load_model(base, config, on_host=True)
    handles = install_fit(model, Fit(shape, chosen, Limits(1 << 40, 1 << 30, 0, 1 << 30), CPU))
    assert [type(handle).__name__ for handle in handles] == ["HostLayers", "LayerCheckpointing"]
    for got, expected in zip(step(model), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_lengths_rounded_up_compute_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    from peftkern.finetune import trainer

    shapes: list[tuple[int, ...]] = []
    step = trainer.RecipeTrainer.training_step

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return step(self, model, inputs, *args, **kwargs)

    rows = tmp_path / "rows.jsonl"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs"]
    texts = [" ".join(words[: 2 + n % 9]) for n in range(40)]
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    options |= {"data": str(rows), "eval_fraction": 0.2, "packing": False}
    plain = run(options, batch_size=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer.RecipeTrainer, "training_step", watched)
        rounded = run(options, batch_size=2, output=str(tmp_path / "rounded"), pad_to_multiple_of=16)
    assert shapes and all(length % 16 == 0 for _, length in shapes)
    assert losses(rounded) == pytest.approx(losses(plain), rel=1e-5)
    config = FinetuneConfig(**(options | {"pad_to_multiple_of": 16}))
    assert fitting._longest(config, [3, 33], packed=False) == 48
    with pytest.raises(InputError, match="--pad-to-multiple-of must be a whole number of at least 1"):
        FinetuneConfig(**(options | {"pad_to_multiple_of": 0}))


@pytest.mark.parametrize(
    ("environment", "release", "expected"),
    [
        ({}, "6.8.0-generic", "expandable_segments:True"),
        ({}, "5.15.90.1-microsoft-standard-WSL2", None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "6.8.0-generic", None),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "6.8.0-generic", "backend:native"),
    ],
)
def test_segments_grow_unless_the_user_says_otherwise(
    environment: dict[str, str],
    release: str,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peftkern.finetune import allocator

    for name in allocator._NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(allocator.platform, "release", lambda: release)
    monkeypatch.setattr(allocator.platform, "system", lambda: "Linux")
    allocator.grow_segments()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


def test_attention_with_a_soft_cap_is_fitted_by_tiles(
    options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Gemma 2, on packed documents: the losses of eager attention, whose scores are no longer kept."""
    folder = save_tiny_gemma2(tmp_path / "gemma2")
    options = options | {"model": str(folder)}
    plain = run(options)
    roomy = needed(options, checkpointing=False, kv_groups=True)
    assert roomy < needed(options, checkpointing=False)
    fitted = run(options, output=str(tmp_path / "fitted"), fit=f"{roomy + 1}B")
    said = capfd.readouterr().err
    assert "no gradient checkpointing" in said and "by key/value heads and tiles of queries" in said
    assert "2 of them, and their masks, by tiles of queries" in said and "runs whole" not in said
    assert losses(fitted) == pytest.approx(losses(plain), rel=1e-5)


def test_a_piece_that_the_model_refuses_is_one_message() -> None:
    from peftkern.memory.planner.cards import CPU
    from peftkern.memory.planner.options import RunOptions

    fit = fitting.Fit(None, RunOptions(kv_groups=True), None, CPU)
    with pytest.raises(InputError, match="--fit: model: Linear: no attention module .* without --fit"):
        fitting.install_fit(torch.nn.Linear(2, 2), fit)
