"""Exact bytes of the tensors that a piece of code makes: a dispatch mode over storages, phase by phase.

Every storage that an operator makes is counted once, from its birth until nothing holds it, whoever does: a
variable, autograd's graph, an optimizer. Parameters, and whatever else was there before, are not. It works on
real tensors of any device and on those of `FakeTensorMode`, which have sizes and no memory: a 70B shape is
counted on a laptop. What an operator allocates and frees inside itself is not seen; for peftkern's own
operators `peftkern.memory.planner.scratch` says how much that is.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Live", "MemoryCount", "SavedCount", "training_phase"]

# In backward an operator tells the part of a decoder layer that it belongs to; those that are not here belong
# where the one before them did.
_LOSS = ("linear_cross_entropy", "_log_softmax", "nll_loss", "cross_entropy")
_MLP = ("qlora_glu", "glu_fwd", "glu_bwd", "tiled_mlp", "silu", "gelu")
_ATTENTION = (
    "scaled_dot_product",
    "flash_attention",
    "attention_backward",
    "attention_bwd",
    "efficient_attention",
    "bmm",
)


@dataclass(frozen=True)
class Live:
    """A storage that is alive: bytes, the operator that made it, the phase it was made in, its shape and
    dtype.
    """

    nbytes: int
    op: str
    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Phase:
    peak: int = 0
    live: list[Live] = field(default_factory=list)


def training_phase(op: str, phase: str) -> str:
    """The phase of a training step that an operator begins: "loss", "mlp_backward" or "attention_backward";
    `phase`, the one before, where it begins none.

    Args:
        op: the operator's name without its namespace and overload.
    """
    backward = torch._C._current_graph_task_id() != -1
    if not backward:
        return "loss" if phase == "forward" and any(name in op for name in _LOSS) else phase
    if torch.is_grad_enabled():  # a layer computed again, for its MLP's backward first
        return "mlp_backward"
    if any(name in op for name in _ATTENTION):
        return "attention_backward"
    return "mlp_backward" if phase in ("forward", "loss") or any(name in op for name in _MLP) else phase


class MemoryCount(TorchDispatchMode):
    """Bytes of the storages made while it is entered: `current`, and `peaks` by phase.

    Args:
        phase: the first phase's name. With `training_phase` as `classify`, "forward" becomes "loss",
            "mlp_backward" and "attention_backward" by itself; set "optimizer" by `enter`.
        classify: (operator's name, phase) -> phase; None: phases change by `enter` alone.
        round_to: bytes that a block is rounded up to: 1 for exact bytes, 512 as CUDA's caching allocator.

    >>> with MemoryCount() as count:
    ...     x = torch.ones(256)
    ...     y = (x * 2).sum()
    >>> count.current, count.peaks["forward"]
    (1028, 2052)
    """

    def __init__(
        self,
        phase: str = "forward",
        classify: Callable[[str, str], str] | None = training_phase,
        round_to: int = 1,
    ) -> None:
        super().__init__()
        self.phase, self.classify, self.round_to = phase, classify, round_to
        self.current = 0
        self._live: dict[int, tuple[Live, Any]] = {}
        self._phases: dict[str, _Phase] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor):
                self._seen(leaf)
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if self.classify is not None:
            self.phase = self.classify(name, self.phase)
        returns = func._schema.returns
        for place, result in zip(returns, out if len(returns) > 1 else (out,), strict=False):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    (self._add(leaf, name) if place.alias_info is None else self._seen(leaf))
        return out

    @property
    def peaks(self) -> dict[str, int]:
        """The most bytes alive at once, by phase."""
        return {name: phase.peak for name, phase in self._phases.items()}

    def live(self, phase: str | None = None) -> list[Live]:
        """What is alive now, or was at the peak of a phase; the largest first."""
        found = [live for live, _ in self._live.values()] if phase is None else self._phases[phase].live
        return sorted(found, key=lambda live: -live.nbytes)

    @contextlib.contextmanager
    def enter(self, phase: str) -> Iterator[None]:
        """What is made inside belongs to `phase`, whatever the operators are."""
        before = self.phase, self.classify
        self.phase, self.classify = phase, None
        self._note()
        try:
            yield
        finally:
            self.phase, self.classify = before

    def _seen(self, tensor: Tensor) -> None:
        """A storage that was there before counting began is never counted."""
        key = _key(tensor)
        if key is not None and key not in self._live and key not in self._known:
            self._known.add(key)
            weakref.finalize(tensor.untyped_storage(), self._known.discard, key)

    def _add(self, tensor: Tensor, op: str) -> None:
        key = _key(tensor)
        if key is None or key in self._live or key in self._known:
            return
        storage = tensor.untyped_storage()
        nbytes = -(-storage.nbytes() // self.round_to) * self.round_to
        live = Live(nbytes, op, self.phase, tuple(tensor.shape), tensor.dtype)
        self._live[key] = live, weakref.finalize(storage, self._freed, key)
        self.current += nbytes
        self._note()

    def _freed(self, key: int) -> None:
        live, _ = self._live.pop(key)
        self.current -= live.nbytes

    def _note(self) -> None:
        phase = self._phases.setdefault(self.phase, _Phase())
        if self.current > phase.peak or not phase.live:
            phase.peak = max(phase.peak, self.current)
            phase.live = [live for live, _ in self._live.values()]


def _key(tensor: Tensor) -> int | None:
    """The storage's identity; None of a tensor without one."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


class SavedCount:
    """What autograd keeps for backward, each storage once, without those of `model`'s parameters and buffers:
    a context; `bytes` after it. `by_shape` lists it.

    >>> layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
    >>> with SavedCount(layer) as saved:
    ...     y = layer(x).exp()
    >>> saved.bytes  # x and y
    64
    """

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        held = () if model is None else (*model.parameters(), *model.buffers())
        self._skipped = {_key(tensor) for tensor in held}
        self._sizes: dict[int, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self._held: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in self._skipped and key not in self._sizes:
            self._sizes[key] = tensor.untyped_storage().nbytes(), tuple(tensor.shape), tensor.dtype
            self._held.append(tensor.detach())  # its address is not given to another while we count
        return tensor

    def __enter__(self) -> SavedCount:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._held.clear()

    @property
    def bytes(self) -> int:
        return sum(size for size, _, _ in self._sizes.values())

    def by_shape(self) -> Counter[tuple[tuple[int, ...], torch.dtype]]:
        """How many storages there are of each shape and dtype."""
        return Counter((shape, dtype) for _, shape, dtype in self._sizes.values())
