"""A sum of four LoRA adapters of rank 16 cut to rank 16: QR and an SVD of 64 x 64, against PEFT's SVD of the
whole update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftkern.adapters.arithmetic import recompress
from peftkern.adapters.arithmetic.low_rank import concatenate

from .harness import OURS, Provider, Spec, main
from .peers import has

__all__ = ["build", "specs"]

ADAPTERS, RANK = 4, 16


def specs(small: bool) -> list[Spec]:
    shapes = ((192, 64),) if small else ((576, 576), (4096, 4096), (14336, 4096))
    return [Spec("recompress", "rank 64 to 16", "float32", n, k, ADAPTERS * RANK) for n, k in shapes]


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    # Spectra that fall off, as those of trained adapters do.
    falloff = torch.logspace(0, -1.5, RANK)
    factors = [(torch.randn(spec.n, RANK) * falloff, torch.randn(RANK, spec.k)) for _ in range(ADAPTERS)]
    check = same_error(*concatenate(factors))

    def ours() -> tuple[Tensor, Tensor]:
        result = recompress(*concatenate(factors), rank=RANK)
        return result.b, result.a

    providers = [Provider(OURS, ours, check)]
    if has("peft"):
        providers += [
            Provider("PEFT svd", by_peft(factors, full_matrices=True), check),
            Provider("PEFT svd, reduced", by_peft(factors, full_matrices=False), check),
        ]
    return providers


def same_error(b: Tensor, a: Tensor) -> Callable[[tuple[Tensor, Tensor]], None]:
    """A check that a result's error is that of the best cut, known from the eigenvalues of the Gram matrices
    in fp64."""
    gram_b, gram_a = b.double().T @ b.double(), a.double() @ a.double().T
    squares = torch.linalg.eigvals(gram_b @ gram_a).real.clamp(min=0).sort(descending=True).values
    best = (squares[RANK:].sum() / squares.sum()).sqrt().item()

    def check(result: tuple[Tensor, Tensor]) -> None:
        left, right = torch.cat([b, -result[0]], 1).double(), torch.cat([a, result[1]], 0).double()
        rest = ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt().item()
        error = rest / squares.sum().sqrt().item()
        if not abs(error - best) <= 1e-4 * best:
            raise AssertionError(f"relative error {error:.6e}, the best cut has {best:.6e}")

    return check


def by_peft(
    factors: list[tuple[Tensor, Tensor]],
    *,
    full_matrices: bool,
) -> Callable[[], tuple[Tensor, Tensor]]:
    """PEFT's add_weighted_adapter on a model of this one layer, which is made beforehand."""
    from peft import LoraConfig, get_peft_model

    n, k = factors[0][0].shape[0], factors[0][1].shape[1]
    layer = nn.utils.skip_init(nn.Linear, k, n, bias=False)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"])
    model = get_peft_model(nn.ModuleDict({"linear": layer}), config, adapter_name="0")
    names = [str(number) for number in range(ADAPTERS)]
    for name in names[1:]:
        model.add_adapter(name, config)
    lora = model.base_model.model["linear"]
    for name, (b, a) in zip(names, factors, strict=True):
        lora.lora_A[name].weight, lora.lora_B[name].weight = nn.Parameter(a), nn.Parameter(b)

    def call() -> tuple[Tensor, Tensor]:
        if "sum" in model.peft_config:
            model.delete_adapter("sum")
        model.add_weighted_adapter(
            names,
            [1.0] * ADAPTERS,
            "sum",
            "svd",
            svd_rank=RANK,
            svd_full_matrices=full_matrices,
        )
        return lora.lora_B["sum"].weight.data, lora.lora_A["sum"].weight.data

    return call


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
