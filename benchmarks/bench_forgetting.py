"""The factored EWC penalty beside the training step it joins: SmolLM2-135M-shaped Llama (random weights),
NF4, LoRA r 16 on every linear.

Timed in turn: the whole step of 512 tokens without it, its gradients added to those that are there (what a
run does each step), the same through autograd, and layer by layer in plain PyTorch. The row of the step has
in `ratio` how many penalties take as long.
"""

from __future__ import annotations

from collections.abc import Callable

from . import peers  # first: it switches peftkern's bitsandbytes hook off

# isort: split
import torch
from torch import Tensor, nn

from peftkern.transfer.forgetting import DeltaPenalty, FisherFactors, lora_factors
from peftkern.transfer.forgetting.identity import base_identity

from .bench_step import Step
from .harness import OURS, Provider, Row, force_isa, measure, parser, write_csv
from .machine import Load, describe

__all__ = ["rows"]

AUTOGRAD, PLAIN, STEP = "through autograd", "plain PyTorch, by layer", "whole step without it"


def random_fisher(model: nn.Module) -> FisherFactors:
    """Positive sums of the right shapes."""
    factors, generator = lora_factors(model), torch.Generator().manual_seed(0)
    sums = {
        name: (
            torch.rand(layer.b.shape[0], generator=generator),
            torch.rand(layer.a.shape[1], generator=generator),
        )
        for name, layer in factors.items()
    }
    chosen = ({name: pair[side] for name, pair in sums.items()} for side in (0, 1))
    return FisherFactors(*chosen, 1, 1, "true", "sequence", base_identity(factors))


def plain(model: nn.Module, fisher: FisherFactors) -> Callable[[], Tensor]:
    """The formula, one layer after the other, with autograd."""
    factors = lora_factors(model)

    def value() -> Tensor:
        total = torch.zeros(())
        for name, layer in factors.items():
            rows, columns = fisher.rows[name], fisher.columns[name]
            left = layer.b.float().T @ (rows[:, None] * layer.b.float())
            right = (layer.a.float() * columns) @ layer.a.float().T
            total = total + layer.scaling**2 / (2 * rows.sum()) * (left * right).sum()
        return total

    return value


def rows(dtype_name: str, small: bool, rounds: int, base: str = OURS) -> list[Row]:
    step = Step(base, peers.DTYPES[dtype_name], small)
    fisher = random_fisher(step.model)
    penalty = DeltaPenalty(step.model, fisher)
    by_layer = plain(step.model, fisher)
    step.optimizer.zero_grad()
    by_layer().backward()
    expected = gradients(step)

    def check(got: Tensor) -> None:
        if not torch.allclose(got, by_layer().detach(), rtol=1e-3):
            raise AssertionError(f"the penalty is {got.item()}, plain PyTorch has {by_layer().item()}")

    def checked(function: Callable[[], Tensor]) -> Callable[[Tensor], None]:
        def compare(got: Tensor) -> None:
            check(got)
            step.optimizer.zero_grad()
            function()
            error = peers.relative(gradients(step), expected)
            if error > 1e-3 if dtype_name == "float32" else error > 0.02:
                raise AssertionError(f"its gradients differ from plain PyTorch's by {error:.2g}")

        return compare

    calls = {
        OURS: lambda: penalty.add_gradients(1.0),
        AUTOGRAD: lambda: backward(penalty.value),
        PLAIN: lambda: backward(by_layer),
    }
    providers = [Provider(name, call, checked(call)) for name, call in calls.items()]
    providers.append(Provider(STEP, step, lambda got: None))
    load = Load()
    timings = measure(providers, rounds=rounds, cap_s=600.0)
    words, found = load.words(), []
    for name, timing in timings.items():
        seconds, ratios = sorted(timing.seconds), sorted(timing.ratios)
        cut = [seconds[int(q * (len(seconds) - 1))] * 1e3 for q in (0.2, 0.5, 0.8)]
        what = (
            "forgetting",
            name,
            "EWC, r 16",
            dtype_name,
            "small" if small else "SmolLM2-135M",
            step.ids.numel(),
        )
        found.append(
            Row(
                *describe(),
                *what,
                *cut,
                ratios[len(ratios) // 2],
                "ms",
                words,
                note=f"{penalty.bytes / 1e6:.2f} MB of sums",
            )
        )
    return found


def backward(value: Callable[[], Tensor]) -> Tensor:
    result = value()
    result.backward()
    return result.detach()


def gradients(step: Step) -> Tensor:
    return torch.cat([p.grad.flatten().float() for p in step.parameters])


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    p.add_argument(
        "--base", choices=(OURS, "peft dense"), default=OURS, help="NF4 and patched, or dense and stock"
    )
    args = p.parse_args()
    force_isa(args.isa)
    found = rows(args.dtype, args.small, args.rounds or (3 if args.small else 7), args.base)
    for row in found:
        print(
            f"{row.provider:26s} {row.dtype:9s} {row.p50:10.2f} ms  x{row.ratio:8.2f}  {row.note}  {row.load}"
        )
    if args.out:
        write_csv(args.out, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
