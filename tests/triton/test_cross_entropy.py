"""Linear + cross-entropy on Triton's kernel and torch's GEMMs, against fp64 and within plain PyTorch's
error."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from peftkern import NF4Weight, use_backend  # noqa: E402
from peftkern.functional import linear_cross_entropy  # noqa: E402
from peftkern.ops.linear_cross_entropy import reference  # noqa: E402
from peftkern.ops.linear_cross_entropy import triton as kernels  # noqa: E402

from ..cases import each_choice  # noqa: E402
from ..ops.bounds import FACTOR, relative_norm  # noqa: E402
from ..ops.test_linear_cross_entropy import OPTIONS, leaf, make, named, plain  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_QUANT = (None,) * 6 + (64, 256)


def _move(case, device: str) -> tuple:
    return tuple(None if t is None else t.to(device) for t in case)


def _ours(case, device: str, *, train_weight=False, d_loss=None, **options) -> dict[str, torch.Tensor]:
    x, weight, labels, bias, a, b = _move(case, device)
    x, bias, a, b = map(leaf, (x, bias, a, b))
    weight = leaf(weight) if train_weight else weight
    with use_backend("triton"):
        loss = linear_cross_entropy(x, weight, labels, bias=bias, lora_a=a, lora_b=b, scaling=0.7, **options)
        loss.backward(None if d_loss is None else d_loss.to(device))
    return {name: t.cpu() for name, t in named(loss, x, bias, a, b, weight if train_weight else None).items()}


def _check(device: str, cases: list, **options) -> None:
    runs = [
        (_ours(c, device, **options), plain(c, None, **options), plain(c, torch.float64, **options))
        for c in cases
    ]
    for name in runs[0][2]:
        got, yardstick, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert got.dtype == yardstick.dtype and torch.isfinite(got).all(), name
        error, allowed = (
            relative_norm(got, exact),
            max(FACTOR * relative_norm(yardstick, exact), torch.finfo(got.dtype).eps),
        )
        assert error <= allowed, f"{name}: relative error {error:.3e}, plain PyTorch's allows {allowed:.3e}"


SHAPES = [(1, 97, 64, 4), (5, 1, 32, 2), (17, 63, 100, 3), (9, 5000, 40, 0)]


@pytest.mark.parametrize(("shape", "dtype"), each_choice(SHAPES, DTYPES))
def test_loss_and_every_gradient(device: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    _check(device, [make(*shape, dtype) for _ in range(max(16, 64 // shape[0]))], train_weight=True)


QUICK = list(zip(OPTIONS[1:], ("none", "mean", "none", "mean"), strict=True))  # no option: above


@pytest.mark.parametrize(
    ("options", "reduction"), each_choice(OPTIONS, ["mean", "none"], quick=QUICK, nightly=[{}])
)
def test_options(device: str, options: dict, reduction: str) -> None:
    d_loss = torch.rand(19) if reduction == "none" else torch.tensor(0.37)
    _check(
        device,
        [make(19, 130, 48, 4, torch.float32) for _ in range(12)],
        reduction=reduction,
        d_loss=d_loss,
        train_weight=True,
        **options,
    )


@pytest.mark.parametrize("slab_bytes", [1 << 30, 1 << 15])
def test_4bit_weight_in_one_slab_and_in_several(
    device: str, slab_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_SLAB_BYTES", slab_bytes)
    _check(device, [make(12, 500, 64, 4, torch.float32, four_bit={}) for _ in range(12)])


def test_blocks_of_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks, the last one ragged; the same as in one block but for the order of sums over rows."""
    case = make(40, 130, 48, 4, torch.float32)
    whole = _ours(case, device, train_weight=True, reduction="none", d_loss=torch.ones(40))
    monkeypatch.setattr(kernels, "block_rows", lambda *_: 16)
    _check(device, [make(40, 130, 48, 4, torch.float32) for _ in range(8)], train_weight=True)
    loss = _ours(case, device, reduction="none", d_loss=torch.ones(40))["loss"]
    # On a device the vendor's product of 16 rows may sum in another order than that of 40.
    if device == "cpu":
        assert torch.equal(loss, whole["loss"])
    else:
        torch.testing.assert_close(loss, whole["loss"], rtol=1e-6, atol=1e-6)


def _direct(
    device: str, logits: torch.Tensor, labels: torch.Tensor, options=(-100, 0.0, 0.0, None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradients of the kernel alone; the losses' tensor poisoned."""
    out, loss = logits.clone().to(device), torch.full((len(logits),), torch.nan, device=device)
    kernels.run(kernels._call(out, labels.to(device), None, None, loss, options, True))
    return loss.cpu(), out.cpu()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_saturated_caps_keep_the_digits_of_their_slope(device: str, scale: float) -> None:
    u, labels = torch.randn(100, 70) * scale, torch.randint(0, 70, (100,))
    _, d_u = _direct(device, u, labels, (-100, 0.0, 0.0, 7.0))
    plainly, exactly = u.clone().requires_grad_(), u.double().requires_grad_()
    for leaf_ in (plainly, exactly):
        torch.nn.functional.cross_entropy(7.0 * torch.tanh(leaf_ / 7.0), labels, reduction="sum").backward()
    assert relative_norm(d_u, exactly.grad) <= FACTOR * relative_norm(plainly.grad, exactly.grad)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
def test_infinities_nan_and_first_blocks_without_a_finite_logit(device: str) -> None:
    logits = torch.randn(6, 9000)
    logits[0, :8500], logits[1, 3], logits[2, 3], logits[3, 3], logits[4] = (
        -torch.inf,
        -torch.inf,
        torch.inf,
        torch.nan,
        -torch.inf,
    )
    labels = torch.full((6,), 8700)
    loss, _ = _direct(device, logits, labels)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, labels, reduction="none"), equal_nan=True
    )


def test_ignored_rows_are_zero_and_unknown_labels_are_nan(device: str) -> None:
    logits = torch.randn(4, 300)
    logits[0] = torch.nan
    loss, d_u = _direct(device, logits, torch.tensor([-100, 300, -1, 299]))
    assert loss[0] == 0 and not d_u[0].any()
    assert loss[1].isnan() and loss[2].isnan() and loss[3].isfinite()


def test_equals_the_reference_for_any_needs(device: str) -> None:
    x, weight, labels, bias, a, b = make(7, 50, 32, 2, torch.float32)
    for needs in (
        (True, False, False, False, False),
        (False, True, False, True, False),
        (False, False, True, False, True),
        (False,) * 5,
    ):
        rest = (0.7, -100, 0.1, 1e-3, 4.0, None, needs)
        moved = _move((x, weight, labels, bias, a, b), device)
        got = kernels.linear_cross_entropy(moved[0], moved[1], NO_QUANT, 50, *moved[2:], *rest)
        expected = reference.linear_cross_entropy(x, weight, NO_QUANT, 50, labels, bias, a, b, *rest)
        for mine, theirs in zip(got, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine.cpu(), theirs, atol=2e-6, rtol=2e-5)


def test_two_runs_give_the_same_bits(device: str) -> None:
    case = make(20, 300, 64, 8, torch.bfloat16)
    first, second = (_ours(case, device, softcap=10.0, label_smoothing=0.1) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("n", [1, 1000, 49_152, 128_256, 256_000, 100_000_000])
def test_bound_of_the_block(n: int) -> None:
    rows = kernels.block_rows(n, 2)
    assert rows == 16 or rows * n * 2 <= 128 << 20


def test_a_4bit_weight_of_the_same_values(device: str) -> None:
    x, weight, labels, *_ = make(6, 128, 64, 0, torch.float32, four_bit={})
    assert isinstance(weight, NF4Weight)
    dense = weight.dequantize(torch.float32)
    got, expected = (_ours((x, w, labels, None, None, None), device) for w in (weight, dense))
    assert torch.equal(got["loss"], expected["loss"]) and torch.equal(got["dx"], expected["dx"])
