"""A sweep of lambdas in one batched pass against the same models run one by one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import peftkern
from peftkern.adapters.arithmetic import add_to_model, combine, of_model
from peftkern.adapters.arithmetic.sweep import Sweep, losses_by_adapter, scaled_adapters, sweep

from .kinds import KINDS, Kind, adapted, llama, peft

VALUES = (-0.5, 0.0, 0.3, 1.0, 2.0)
IDS = torch.randint(0, 48, (5, 9), generator=torch.Generator().manual_seed(8))


# fp32 losses of the same passes in another batch: one unit in the last place where it was measured.
ROUNDING = {"rtol": 8 * torch.finfo(torch.float32).eps, "atol": 0.0}


def assert_same_losses(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding, and rows [values, samples] so far apart that another value's would be seen."""
    torch.testing.assert_close(got, expected, **ROUNDING)
    assert (expected.diff(dim=0).abs() > 10 * ROUNDING["rtol"] * expected[1:].abs()).all()


def patched(kind: str = "rslora") -> torch.nn.Module:
    model = adapted(KINDS[kind], KINDS[kind].one, 3)
    peftkern.patch(model)
    return model


def one_by_one(model: torch.nn.Module, values: tuple[float, ...]) -> torch.Tensor:
    """The stock way: every layer's scaling set, then a pass of its own."""
    rows = []
    layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    before = [layer.scaling["default"] for layer in layers]
    for value in values:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling["default"] = scaling * value
        with torch.no_grad():
            logits = model(input_ids=IDS).logits
        rows.append(
            torch.stack([F.cross_entropy(row[:-1], own[1:]) for row, own in zip(logits, IDS, strict=True)]),
        )
    for layer, scaling in zip(layers, before, strict=True):
        layer.scaling["default"] = scaling
    return torch.stack(rows)


@pytest.mark.parametrize("rows", [None, 1, 3, 7])
def test_one_batched_pass_is_every_lambda_by_itself(rows: int | None) -> None:
    model = patched()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = sweep(model, "default", {"t": IDS}, values=VALUES, rows=rows, progress=False)
    assert_same_losses(result.losses["t"], one_by_one(model, VALUES))
    assert model.state_dict().keys() == state.keys(), "the names of the lambdas are gone"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["embeddings", "lora_bias"])
def test_other_kinds(kind: str) -> None:
    model = patched(kind)
    result = sweep(model, "default", {"t": IDS}, values=VALUES, progress=False)
    assert_same_losses(result.losses["t"], one_by_one(model, VALUES))


def test_no_weight_is_copied() -> None:
    model = patched()
    before = {parameter.data_ptr() for parameter in model.parameters()}
    with scaled_adapters(model, "default", VALUES) as names:
        assert {parameter.data_ptr() for parameter in model.parameters()} == before
        assert len(set(names)) == len(VALUES)
    assert not any("times" in name for name, _ in model.named_modules())


def test_a_sum_of_two_adapters_is_swept(tmp_path: Path) -> None:
    kind = KINDS["lora"]
    model = adapted(kind, kind.one, 3)
    b = of_model(adapted(kind, kind.other, 4))
    add_to_model(model, combine("a + b", {"a": of_model(model), "b": b}).adapter, "sum")
    peftkern.patch(model)
    losses = losses_by_adapter(model, ["__base__", "default", "sum"], IDS)
    with scaled_adapters(model, "sum", (0.0, 1.0)) as names:
        assert_same_losses(losses_by_adapter(model, names, IDS), losses[[0, 2]])
    model.set_adapter("sum")
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    expected = torch.stack([F.cross_entropy(row[:-1], own[1:]) for row, own in zip(logits, IDS, strict=True)])
    torch.testing.assert_close(losses[2], expected, **ROUNDING)


def curve(target: list[float], control: list[float] | None = None, **options: object) -> Sweep:
    noise = torch.tensor([-0.1, 0.0, 0.1])
    losses = {"target": torch.tensor(target)[:, None] + noise}
    if control is not None:
        losses["control"] = torch.tensor(control)[:, None] + noise
    values = tuple(i / (len(target) - 1) for i in range(len(target)))
    return Sweep(values, losses, "target", "control" if control else None, 0.05, **options)


def test_the_best_is_the_least_within_the_budget() -> None:
    assert curve([3.0, 2.5, 2.0, 2.2, 2.6]).best == 0.5
    assert curve([3.0, 2.5, 2.0, 2.2, 2.6], [2.0, 2.05, 2.2, 2.3, 2.4]).best == 0.25
    assert curve([3.0, 3.5, 4.0, 4.5, 9.0], [2.0, 2.05, 2.09, 2.3, 2.4], maximize=True).best == 0.5
    assert "sweep further" in curve([3.0, 2.5, 2.0, 1.9, 1.8]).verdict
    assert "sweep further" not in curve([3.0, 2.5, 2.0, 2.2, 2.6]).verdict
    words = curve([3.0, 2.5, 2.0, 2.2, 2.6], [2.0, 2.05, 2.2, 2.3, 2.4]).verdict
    assert (
        words == "lambda 0.25: target -0.500 ± 0.000 nats a token, control +0.050 ± 0.000 (at most 5% more is"
        " allowed)"
    )


def test_changes_are_paired_window_by_window() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [1.5, 2.3, 3.4]])
    change, error = Sweep((0.0, 1.0), {"t": losses}, "t", None, 0.05).change("t")
    paired = torch.tensor([0.5, 0.3, 0.4], dtype=torch.float64)
    assert change[1].item() == pytest.approx(0.4) and error[1].item() == pytest.approx(
        (paired.std() / 3**0.5).item(),
        rel=1e-5,
    )


def test_plot_and_table(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    result = curve([3.0, 2.5, 2.0, 2.2, 2.6], [2.0, 2.05, 2.2, 2.3, 2.4])
    result.draw(figure.add_subplot())
    figure.savefig(tmp_path / "sweep.png")
    result.write_csv(tmp_path / "sweep.csv")
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["lambda"] for row in rows] == ["0", "0.25", "0.5", "0.75", "1"]
    assert float(rows[2]["control change"]) == pytest.approx(0.2, abs=1e-5)


def test_bad_arguments() -> None:
    model = patched()
    with pytest.raises(ValueError, match="adapter: the model has no LoRA adapter 'x'"):
        sweep(model, "x", {"t": IDS}, progress=False)
    with pytest.raises(ValueError, match="control: got 'c', expected one of 't'"):
        sweep(model, "default", {"t": IDS}, control="c", progress=False)
    with pytest.raises(ValueError, match="values"):
        sweep(model, "default", {"t": IDS}, values=(), progress=False)
    with pytest.raises(ValueError, match="ids: got shape"):
        sweep(model, "default", {"t": IDS[0]}, progress=False)
    dora = adapted(Kind(llama, {}, {}), {"target_modules": ["q_proj"], "use_dora": True}, 3)
    peftkern.patch(dora)
    with pytest.raises(ValueError, match="not linear in its scaling"):
        sweep(dora, "default", {"t": IDS}, progress=False)
    with pytest.raises(ValueError, match="is patched"):
        sweep(
            peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])),
            "default",
            {"t": IDS},
            progress=False,
        )
