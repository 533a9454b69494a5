"""Linear + cross-entropy against fp64, bounded by the error of plain PyTorch's logits and cross_entropy, on
every ISA level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftkern import NF4Weight, use_backend
from peftkern.functional import linear_cross_entropy
from peftkern.ops.linear_cross_entropy import cpu, heads

from ..cases import each_choice
from .bounds import FACTOR, assert_as_accurate, relative_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-3},
    {"softcap": 5.0},
    {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 3.0},
]
# (M, V, K, R): one row, a vocabulary of one word, ragged everything, a tail shorter than a vector, several
# row blocks, no adapter.
SHAPES = [
    (1, 97, 64, 4),
    (5, 1, 32, 2),
    (17, 63, 100, 3),
    (33, 1030, 65, 0),
    (70, 257, 48, 16),
    (600, 50, 40, 0),
    (3, 5, 7, 0),
]


def make(
    m: int,
    v: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    ignored: float = 0.3,
    four_bit=None,
    weight_dtype=None,
):
    """x, weight, labels (some ignored, one at least not), bias, A, B."""
    x, weight = torch.randn(m, k).to(dtype), torch.randn(v, k) / k**0.5
    weight = (
        NF4Weight.from_dense(weight, **four_bit) if four_bit is not None else weight.to(weight_dtype or dtype)
    )
    labels = torch.randint(0, v, (m,))
    labels[torch.rand(m) < ignored] = -100
    labels[m // 2] = v - 1
    a, b = (torch.randn(r, k) / k**0.5).to(dtype), (torch.randn(v, r) * 0.2).to(dtype)
    return (
        x,
        weight,
        labels,
        (torch.randn(v) * 0.5).to(dtype) if bias else None,
        a if r else None,
        b if r else None,
    )


def leaf(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()


def ours(
    x, weight, labels, bias, a, b, *, train_weight: bool = False, d_loss: Tensor | None = None, **options
) -> dict[str, Tensor]:
    x, bias, a, b = map(leaf, (x, bias, a, b))
    weight = leaf(weight) if train_weight else weight
    loss = linear_cross_entropy(x, weight, labels, bias=bias, lora_a=a, lora_b=b, scaling=0.7, **options)
    loss.backward(d_loss)
    return named(loss, x, bias, a, b, weight if train_weight else None)


def named(loss, x, bias, a, b, weight) -> dict[str, Tensor]:
    values = {"dx": x, "d_bias": bias, "d_lora_a": a, "d_lora_b": b, "d_weight": weight}
    return {"loss": loss.detach().reshape(-1)} | {name: t.grad for name, t in values.items() if t is not None}


def plain(
    case,
    dtype: torch.dtype | None,
    *,
    train_weight=False,
    d_loss=None,
    z_loss=0.0,
    softcap=None,
    reduction="mean",
    items=None,
    **options,
):
    """What stock models compute: logits in `dtype` (None: x's), then fp32 (fp64 stays)."""
    x, weight, labels, bias, a, b = case
    dtype = dtype or x.dtype
    weight = weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
    x, bias, a, b = (leaf(t, dtype) for t in (x, bias, a, b))
    weight = leaf(weight, dtype)
    logits = F.linear(x, weight, bias)
    if a is not None:
        logits = logits + 0.7 * (x @ a.t() @ b.t())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if dtype == torch.float64 else logits.float()
    each = F.cross_entropy(logits, labels, reduction="none", **options)
    keep = labels != options.get("ignore_index", -100)
    each = each + torch.where(keep, z_loss * torch.logsumexp(logits, 1).square(), 0)
    count = keep.sum() if items is None else items
    loss = {"none": each, "sum": each.sum(), "mean": each.sum() / count}[reduction]
    loss.backward(d_loss if d_loss is None else d_loss.to(loss.dtype))
    return named(loss, x, bias, a, b, weight if train_weight else None)


def check(cases: list, *, items=None, **options) -> None:
    """Every output and gradient of several draws together: errors of a handful of numbers would compare
    noise.

    Gradients by the norm: their errors have long tails (the few rows whose label is uncertain carry them;
    plain PyTorch's worst element is 10 to 40 times its root mean square), so that two draws of the worst one
    compare noise. Losses by element too.
    """
    named_items = {} if items is None else {"num_items_in_batch": items}
    runs = []
    for case in cases:
        plainly, exactly = (plain(case, dtype, items=items, **options) for dtype in (None, torch.float64))
        runs.append((ours(*case, **options, **named_items), plainly, exactly))
    for name in runs[0][2]:
        got, yardstick, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert got.dtype == yardstick.dtype, name
        if name == "loss":
            assert_as_accurate(name, got, yardstick, exact)
            continue
        assert got.shape == exact.shape and torch.isfinite(got).all(), name
        error, allowed = relative_norm(got, exact), FACTOR * relative_norm(yardstick, exact)
        assert error <= max(allowed, torch.finfo(got.dtype).eps), (
            f"{name}: relative error {error:.3e}, plain PyTorch's allows {allowed:.3e}"
        )


@pytest.mark.parametrize("shape, dtype", each_choice(SHAPES, DTYPES))
def test_loss_and_every_gradient(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    draws = max(16, min(64, 256 // shape[0]))
    check([make(*shape, dtype) for _ in range(draws)], train_weight=True)
    check([make(*shape, dtype, bias=False) for _ in range(draws)])


@pytest.mark.parametrize("options, reduction", each_choice(OPTIONS, ["mean", "sum", "none"]))
def test_options(isa: str, options: dict, reduction: str) -> None:
    d_loss = torch.rand(19) if reduction == "none" else torch.tensor(0.37)
    for dtype in (torch.float32, torch.bfloat16):
        check(
            [make(19, 130, 48, 4, dtype) for _ in range(16)],
            reduction=reduction,
            d_loss=d_loss,
            train_weight=True,
            **options,
        )


@pytest.mark.parametrize(
    "quant", [{}, {"nested": False}, {"blocksize": 4096}, {"quant_type": "fp4", "blocksize": 32}], ids=str
)
@pytest.mark.parametrize("k", [64, 100])
def test_4bit_weight(isa: str, quant: dict, k: int) -> None:
    """Slices of the vocabulary begin with a block: here several of them."""
    check([make(20, 500, k, 4, torch.float32, four_bit=quant) for _ in range(12)])
    check([make(20, 500, k, 0, torch.bfloat16, four_bit=quant) for _ in range(12)])


def test_slices_of_the_vocabulary(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of several slices and a last narrow one, and blocks of few rows: dense 16-bit, 4-bit, and
    all gradients."""
    monkeypatch.setattr(heads, "_WIDTH", 300)
    monkeypatch.setattr(cpu, "_MAX_ROWS", 16)
    for four_bit in (None, {}, {"nested": False}):
        head = {"four_bit": four_bit} if four_bit is not None else {"weight_dtype": torch.bfloat16}
        cases = [make(40, 1250, 128, 4, torch.float32, **head) for _ in range(8)]
        check(cases)
    monkeypatch.setattr(heads, "served_by_vendor", lambda *_: False)
    monkeypatch.setattr(cpu, "served_by_vendor", lambda *_: False)
    check(
        [make(40, 1250, 128, 4, torch.float32) for _ in range(8)],
        train_weight=True,
        softcap=4.0,
        label_smoothing=0.1,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_heads_serve_the_same_call(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who multiplies is a matter of speed alone: the vendor's 16-bit products, too, are within the bounds."""
    for vendor in (True, False):
        monkeypatch.setattr(cpu, "served_by_vendor", lambda *_, vendor=vendor: vendor)
        check([make(33, 200, 64, 4, dtype) for _ in range(32)])


def test_num_items_in_batch_as_a_number_and_as_a_tensor(isa: str) -> None:
    case = make(19, 130, 48, 0, torch.float32)
    check([case, *(make(19, 130, 48, 0, torch.float32) for _ in range(15))], items=53)
    number, tensor = ours(*case, num_items_in_batch=53), ours(*case, num_items_in_batch=torch.tensor(53))
    assert all(torch.equal(number[name], tensor[name]) for name in number)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits(isa: str, scale: float) -> None:
    """Neither overflow nor a loss of digits beyond plain PyTorch's: the maximum is taken off before the
    exponential."""
    cases = []
    for _ in range(8):
        x, weight, *rest = make(9, 70, 32, 0, torch.float32)
        cases.append((x * scale, weight, *rest))
    check(cases, train_weight=True)


def test_exponential_and_tanh_over_their_range(isa: str) -> None:
    """One logit per row runs from -90 to 90 against another of 0; and through a softcap, small and saturated
    ones."""
    x = torch.linspace(-90, 90, 4001)[:, None]
    weight, labels = torch.tensor([[1.0], [0.0]]), torch.randint(0, 2, (4001,))
    for softcap in (None, 30.0, 1.0):
        check(
            [(x * size, weight, labels, None, None, None) for size in (1.0, 1e-2, 1e-4)],
            softcap=softcap,
            reduction="sum",
        )


def test_infinite_and_nan_logits_are_as_torchs(isa: str) -> None:
    for value in (torch.inf, -torch.inf, torch.nan):
        x, weight, labels, bias, *_ = make(4, 40, 16, 0, torch.float32, ignored=0.0)
        bias[5], labels[:] = value, 7
        loss = linear_cross_entropy(x, weight, labels, bias=bias, reduction="none")
        expected = F.cross_entropy(F.linear(x, weight, bias), labels, reduction="none")
        assert torch.equal(loss.isnan(), expected.isnan()), value
        torch.testing.assert_close(loss, expected, equal_nan=True)
    bias[:] = -torch.inf  # a first chunk without a finite logit, and none at all
    assert linear_cross_entropy(x, weight, labels, bias=bias, reduction="none").isnan().all()
    bias = torch.full((3000,), -torch.inf)
    bias[2500:] = 0.0
    x, weight, labels, *_ = make(4, 3000, 16, 0, torch.float32, ignored=0.0)
    labels[:] = 2600
    expected = F.cross_entropy(F.linear(x, weight, bias), labels)
    torch.testing.assert_close(linear_cross_entropy(x, weight, labels, bias=bias), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_any_label_the_loss_is_torchs_and_the_gradients_are_zero(isa: str, reduction: str) -> None:
    x, weight, labels, bias, a, b = make(6, 30, 16, 2, torch.float32)
    labels[:] = -100
    got = ours(
        x,
        weight,
        labels,
        bias,
        a,
        b,
        reduction=reduction,
        train_weight=True,
        d_loss=None if reduction != "none" else torch.ones(6),
    )
    expected = F.cross_entropy(F.linear(x, weight), labels, reduction=reduction).reshape(-1)
    torch.testing.assert_close(got.pop("loss"), expected, equal_nan=True)
    assert set(got) == {"dx", "d_bias", "d_lora_a", "d_lora_b", "d_weight"}
    assert all(not g.any() for g in got.values())


def test_another_ignore_index(isa: str) -> None:
    cases = [make(40, 20, 16, 2, torch.float32, ignored=0.0) for _ in range(16)]
    assert all((case[2] == 19).any() for case in cases)
    check(cases, ignore_index=19)


def test_no_rows() -> None:
    x, weight, labels, bias, a, b = make(3, 20, 64, 2, torch.float32)
    got = ours(x[:0], weight, labels[:0], bias, a, b, reduction="sum")
    assert got.pop("loss").item() == 0 and got["dx"].shape == (0, 64)
    assert all(not g.any() for g in got.values())


def test_leading_dimensions_and_strides(isa: str) -> None:
    x, weight, labels, *_ = make(40, 32, 64, 0, torch.float32)
    strided = torch.empty(64, 40).t().copy_(x)
    wide = torch.empty(32, 128)[:, ::2].copy_(weight)
    expected = ours(x, weight, labels, None, None, None, reduction="none", d_loss=torch.ones(40))
    shaped = strided.view(40, 64).reshape(4, 10, 64).requires_grad_()
    loss = linear_cross_entropy(shaped, wide, labels.view(4, 10), reduction="none")
    loss.sum().backward()
    assert loss.shape == (4, 10) and torch.equal(loss.detach().view(-1), expected["loss"])
    assert torch.equal(shaped.grad.view(40, 64), expected["dx"])


def test_only_what_needs_a_gradient_gets_one(isa: str) -> None:
    x, weight, labels, bias, a, b = make(12, 40, 16, 4, torch.float32)
    everything = ours(x, weight, labels, bias, a, b)
    for name, tensor in {"dx": x, "d_bias": bias, "d_lora_a": a, "d_lora_b": b}.items():
        tensor.requires_grad_()
        linear_cross_entropy(x, weight, labels, bias=bias, lora_a=a, lora_b=b, scaling=0.7).backward()
        assert torch.equal(tensor.grad, everything[name]), name
        assert [t.grad is not None for t in (x, bias, a, b)].count(True) == 1, name
        tensor.requires_grad_(False)
        tensor.grad = None


def test_two_runs_give_the_same_bits(isa: str) -> None:
    case = make(150, 300, 64, 8, torch.bfloat16)
    first, second = (ours(*case, softcap=10.0, label_smoothing=0.1) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_backward_twice_and_inputs_are_not_written(isa: str) -> None:
    x, weight, labels, bias, a, b = make(12, 40, 16, 4, torch.float32)
    before = [t.clone() for t in (x, weight, labels, bias, a, b)]
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, bias=bias, lora_a=a, lora_b=b)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = once.clone()
    (again,) = torch.autograd.grad(3 * loss, x)
    assert torch.equal(once, kept) and torch.allclose(again, 3 * once)
    assert all(
        torch.equal(t.detach(), old) for t, old in zip((x, weight, labels, bias, a, b), before, strict=True)
    )


def test_labels_out_of_range_are_an_index_error(isa: str) -> None:
    x, weight, labels, *_ = make(5, 20, 16, 0, torch.float32)
    for bad in (20, -1, -101):
        labels[2] = bad
        with pytest.raises(IndexError, match="labels: from"):
            linear_cross_entropy(x, weight, labels)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": torch.zeros(5, dtype=torch.int32)}, TypeError, "labels: got torch.int32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"labels: got shape \(4,\)"),
        ({"weight": torch.zeros(20, 15)}, ValueError, "x: got shape"),
        ({"weight": torch.zeros(20, 16, dtype=torch.int8)}, TypeError, "weight: got a torch.int8"),
        ({"bias": torch.zeros(19)}, ValueError, "bias: got"),
        ({"lora_a": torch.zeros(2, 16)}, ValueError, "lora_b: is missing"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"z_loss": -1.0}, ValueError, "z_loss"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"reduction": "sum", "num_items_in_batch": 3}, ValueError, "num_items_in_batch"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change: dict, error: type[Exception], words: str) -> None:
    arguments = {
        "x": torch.zeros(5, 16),
        "weight": torch.zeros(20, 16),
        "labels": torch.zeros(5, dtype=torch.int64),
    } | change
    with pytest.raises(error, match=words):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("by_row", [False, True])
def test_gradcheck_of_the_reference(options: dict, by_row: bool) -> None:
    from peftkern.ops.linear_cross_entropy import linear_cross_entropy as op

    shapes = ((5, 6), (9, 6), (9,), (2, 6), (9, 2))
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    labels = torch.tensor([3, -100, 0, 8, 3])
    numbers = (-100, options.get("label_smoothing", 0.0), options.get("z_loss", 0.0), options.get("softcap"))
    divisor = None if by_row else torch.tensor(3.0, dtype=torch.float64)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, w, bias, a, b: op(x, w, labels, bias, a, b, 0.7, numbers, divisor, by_row), inputs
        )
