"""Linear + cross-entropy among torch's machinery (opcheck, compile, autocast, checkpointing, inference mode),
and what memory it takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peftkern import NF4Weight, use_backend
from peftkern.functional import linear_cross_entropy
from peftkern.ops import backend
from peftkern.ops.linear_cross_entropy import cpu, heads

from .test_linear_cross_entropy import leaf, make, named

OPTIONS = (-100, 0.1, 1e-3, 5.0)


def _arguments(four_bit: dict | None = None, needs=(True,) * 5) -> tuple:
    x, weight, labels, bias, a, b = make(6, 40, 16, 2, torch.float32, four_bit=four_bit)
    if isinstance(weight, Tensor):
        quant, data = (None,) * 6 + (64, 256), weight
    else:
        w, data = weight, weight.packed
        quant = (
            w.code,
            w.absmax,
            w.absmax_8bit,
            w.absmax_code,
            w.nested_absmax,
            w.absmax_offset,
            w.blocksize,
            w.nested_blocksize,
        )
    return x, data, *quant, 40, labels, bias, a, b, 0.5, *OPTIONS, None, list(needs)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_opcheck(name: str) -> None:
    with use_backend(name):
        for args in (
            _arguments(),
            _arguments({}, (True, True, True, True, False)),
            _arguments(needs=(False,) * 5),
        ):
            library.opcheck(torch.ops.peftkern.linear_cross_entropy.default, args)


def _grads(case, function, **options) -> dict[str, Tensor]:
    x, weight, labels, bias, a, b = case
    x, weight, bias, a, b = map(leaf, (x, weight, bias, a, b))
    loss = function(x, weight, labels, bias=bias, lora_a=a, lora_b=b, **options)
    loss.backward(torch.ones_like(loss))
    return named(loss, x, bias, a, b, weight)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "softcap": 4.0}, {"num_items_in_batch": torch.tensor(11)}], ids=str
)
def test_compiles_into_one_graph_with_the_same_bits(options: dict) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for m in (12, 20):
        case = make(m, 40, 16, 2, torch.float32)
        eager, graph = _grads(case, linear_cross_entropy, **options), _grads(case, compiled, **options)
        assert all(torch.equal(eager[name], graph[name]) for name in eager)


def test_autocast_changes_nothing() -> None:
    case = make(12, 40, 16, 2, torch.float32)
    expected = _grads(case, linear_cross_entropy)
    with torch.autocast("cpu", torch.bfloat16):
        got = _grads(case, linear_cross_entropy)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool, reduction: str) -> None:
    case = make(12, 40, 16, 2, torch.float32)

    def checkpointed(x, weight, labels, *, bias, lora_a, lora_b, **options):
        def run(*t):
            return linear_cross_entropy(t[0], t[1], labels, bias=t[2], lora_a=t[3], lora_b=t[4], **options)

        return checkpoint(run, x, weight, bias, lora_a, lora_b, use_reentrant=reentrant)

    got, expected = (
        _grads(case, function, reduction=reduction) for function in (checkpointed, linear_cross_entropy)
    )
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_the_last_backward_hands_out_what_forward_made() -> None:
    """No second tensor of the weight's size: the gradient kept since forward is scaled where it lies."""
    x, weight, labels, *_ = make(12, 40, 16, 0, torch.float32)
    weight, kept = leaf(weight), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        loss = linear_cross_entropy(x, weight, labels)
    loss.backward()
    assert weight.grad.data_ptr() in kept


def test_backward_again_sees_nothing_of_what_was_done_to_the_first_gradients() -> None:
    case = make(12, 40, 16, 2, torch.float32)
    expected = _grads(case, linear_cross_entropy)
    x, weight, labels, bias, a, b = case
    leaves = [leaf(t) for t in (x, weight, bias, a, b)]
    loss = linear_cross_entropy(
        leaves[0], leaves[1], labels, bias=leaves[2], lora_a=leaves[3], lora_b=leaves[4]
    )
    for retain in (True, True, False):
        loss.backward(retain_graph=retain)
        got = named(loss, leaves[0], leaves[2], leaves[3], leaves[4], leaves[1])
        assert all(torch.equal(got[name], expected[name]) for name in got)
        for t in leaves:
            t.grad.fill_(torch.nan)
            t.grad = None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_batched_gradients_of_the_loss() -> None:
    x, weight, labels, *_ = make(12, 40, 16, 0, torch.float32)
    x, weight = leaf(x), leaf(weight)
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, labels), (x, weight))
    loss = linear_cross_entropy(x, weight, labels)
    got = torch.autograd.grad(loss, (x, weight), torch.tensor([1.0, 2.0]), is_grads_batched=True)
    for batch, single in zip(got, expected, strict=True):
        assert torch.equal(batch[0], single) and torch.allclose(batch[1], 2 * single)


def test_training_after_inference_mode() -> None:
    """The scratch outlives the call; made in inference mode it could not be written to in training."""
    from peftkern.runtime import native

    native._local.__dict__.clear()
    case = make(12, 40, 16, 2, torch.float32)
    with torch.inference_mode():
        linear_cross_entropy(case[0], case[1], case[2])
    _grads(case, linear_cross_entropy)


class _Sizes(TorchDispatchMode):
    """The most bytes behind a tensor that any torch function returned here."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("head", ["vendor", "bf16", "4bit", "trained", "reference"])
def test_no_tensor_of_rows_times_vocabulary(head: str) -> None:
    m, v, k = 1100, 9000, 32
    weight = torch.randn(v, k).to(torch.bfloat16 if head == "bf16" else torch.float32)
    quant, x, labels = (None,) * 6 + (64, 256), torch.randn(m, k), torch.randint(0, v, (m,))
    if head == "4bit":
        w = NF4Weight.from_dense(weight)
        quant = (
            w.code,
            w.absmax,
            w.absmax_8bit,
            w.absmax_code,
            w.nested_absmax,
            w.absmax_offset,
            w.blocksize,
            w.nested_blocksize,
        )
        weight = w.packed
    needs = (True, False, False, False, head == "trained")
    rest = (v, labels, None, None, None, 1.0, *OPTIONS, None, needs)
    with torch.no_grad(), _Sizes() as sizes:
        backend("linear_cross_entropy", "reference" if head == "reference" else "cpu").linear_cross_entropy(
            x, weight, quant, *rest
        )
    rows = 128 if head == "reference" else cpu.block_rows(v, 4)
    assert 0 < sizes.largest <= 4 * v * max(rows, k) < 4 * m * v / 2


@pytest.mark.parametrize("v", [1, 5, 1000, 32_000, 49_152, 152_064, 256_000, 2_000_000])
def test_bound_of_the_block(v: int) -> None:
    rows = cpu.block_rows(v, 4)
    assert rows % 16 == 0 and 16 <= rows <= 512 and (rows == 16 or rows * v * 4 <= 48 << 20)


_PEAK = """
import resource, torch
from peftkern.functional import linear_cross_entropy
m, v, k = 6000, 40000, 64
x, w, labels = torch.randn(m, k, requires_grad=True), torch.randn(v, k), torch.randint(0, v, (m,))
linear_cross_entropy(x[:4], w, labels[:4]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(x, w, labels).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_peak_memory_of_the_process() -> None:
    """The logits are 960 MB here; the block, the gradient and all else take less than a tenth of that."""
    run = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 0.1 * 6000 * 40000 * 4


def test_kept_for_backward() -> None:
    """dx and two numbers, where the head is frozen: no copy of x, of the weight, of the labels."""
    x, weight, labels, *_ = make(50, 300, 32, 0, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(x.requires_grad_(), weight, labels)
    assert sum(t.numel() * t.element_size() for t in saved) <= x.numel() * 2 + 16


@pytest.mark.parametrize("m", [40, 0])
def test_every_output_is_written(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out uninitialized is NaN here."""
    monkeypatch.setattr(cpu, "_MAX_ROWS", 16)
    torch.use_deterministic_algorithms(True)
    try:
        x, weight, labels, bias, a, b = make(max(m, 1), 70, 16, 2, torch.float32)
        for ignored in (False, True):
            labels[:] = -100 if ignored else labels
            case = (x[:m], weight, labels[:m], bias, a, b)
            got = _grads(case, linear_cross_entropy, reduction="sum")
            assert all(t.isfinite().all() for t in got.values())
            assert got["d_weight"].any() == bool(m and not ignored)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["VendorHead", "EngineHead"])
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Who multiplies, whichever this CPU would take."""
    monkeypatch.setattr(cpu, "served_by_vendor", lambda *_: request.param == "VendorHead")
    return getattr(heads, request.param)


def test_nothing_is_computed_for_gradients_nobody_wants(head: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*_):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(head, "gradients", unwanted)
    x, weight, labels, *_ = make(5, 30, 16, 0, torch.float32)
    with torch.no_grad():
        linear_cross_entropy(x.clone().requires_grad_(), weight, labels)
    linear_cross_entropy(x, weight, labels)
    with pytest.raises(AssertionError, match="a gradient was computed"):
        linear_cross_entropy(x.requires_grad_(), weight, labels)


def test_rows_without_a_label_are_not_multiplied(head: type, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], head.logits
    monkeypatch.setattr(head, "logits", lambda self, x, out: (seen.append(len(x)), original(self, x, out))[1])
    x, weight, labels, *_ = make(50, 30, 16, 0, torch.float32, ignored=0.5)
    linear_cross_entropy(x, weight, labels)
    assert sum(seen) == (labels != -100).sum() < 50
