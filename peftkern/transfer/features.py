"""Pooled features of every layer of a transformer, from one forward pass over the data.

A hidden state [B, S, D] is pooled in the hook of its layer, so that nothing of size S x D outlives its layer: what stays is one
row [D] a text, a layer and a pooling. Depth 0 is the input of the first layer (the embeddings), depth i the output of layer i, which
is what a model that is cut there hands on. The forward pass ends at the last layer that is asked for: no head, no logits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..finetune.errors import InputError
from .depth import layer_stacks

if TYPE_CHECKING:
    import numpy as np

__all__ = ["POOLS", "Features", "adapters_disabled", "layer_stack", "pool_last", "pool_mean", "pooled_features"]

POOLS = ("mean", "last")
_PROBE_TOKENS = 8  # of the first text, to count how often the layers are called


@dataclass(frozen=True)
class Features:
    """Pooled features: `arrays[pool]` is [depths, n, D] in fp32, a numpy array or a memory map; `depths` names its first axis.

    `truncated` counts the texts that were longer than `max_length` tokens.
    """

    arrays: Mapping[str, np.ndarray]
    depths: tuple[int, ...]
    truncated: int = 0

    def at(self, depth: int, pool: str = "mean") -> np.ndarray:
        """[n, D] in fp32: the features after `depth` layers, a negative depth counting from the last."""
        if pool not in self.arrays:
            raise ValueError(f"pool: got {pool!r}, expected one of {tuple(self.arrays)}")
        wanted = self.depths[depth] if depth < 0 and -depth <= len(self.depths) else depth
        if wanted not in self.depths:
            raise ValueError(f"depth: got {depth}, expected one of {self.depths}")
        return self.arrays[pool][self.depths.index(wanted)]

    def __len__(self) -> int:
        """The number of texts."""
        return next(iter(self.arrays.values())).shape[1]


def pool_mean(hidden: Tensor, mask: Tensor | None = None, *, skip_first: bool = True) -> Tensor:
    """The mean over the tokens of each row, without padding and, with `skip_first`, without the first token.

    The first token of a causal model is an attention sink whose norm is some hundred times the others' (Sun et al., 2024, Massive
    Activations). A row of a single token gives that token, a row without any gives zeros. Differentiable.

    Args:
        hidden: [B, S, D], any floating dtype.
        mask: [B, S], 1 for a token and 0 for padding on either side; None: all are tokens.
    Returns: [B, D] in fp32 (fp64 for fp64).
    """
    weights = _token_mask(hidden, mask)
    if skip_first:
        first = (weights.cumsum(1) == 1) & (weights == 1)
        weights = weights * ~(first & (weights.sum(1, keepdim=True) > 1))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.bmm(weights[:, None].to(dtype), hidden.to(dtype))[:, 0]
    return sums / weights.sum(1, keepdim=True).clamp(min=1)


def pool_last(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The last token of each row that is no padding: [B, D] in fp32 (fp64 for fp64) of hidden [B, S, D]. Differentiable."""
    weights = _token_mask(hidden, mask)
    last = (weights * torch.arange(1, weights.shape[1] + 1, device=weights.device)).argmax(1)
    rows = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return rows.to(torch.promote_types(hidden.dtype, torch.float32))


def _token_mask(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S] of integers; virtual tokens that a prompt puts before the text count as padding."""
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    virtual = hidden.shape[1] - mask.shape[1]
    if mask.dim() != 2 or len(mask) != len(hidden) or virtual < 0:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected [{hidden.shape[0]}, {hidden.shape[1]}]")
    mask = (mask != 0).long().to(hidden.device)
    return torch.cat([mask.new_zeros(len(mask), virtual), mask], dim=1)


def layer_stack(model: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The name and the layers of the stack of a model (`depth.layer_stacks`) that holds most parameters.

    Of an encoder-decoder it is the encoder's. Raises ValueError where there is none.
    """
    root, prefix = _encoder(model)
    stack = max(layer_stacks(root), key=lambda each: sum(p.numel() for layer in each.layers for p in layer.parameters()))
    return prefix + stack.path, list(stack.layers)


def _encoder(model: nn.Module) -> tuple[nn.Module, str]:
    """What is run, and the prefix of its modules' names: of an encoder-decoder the encoder alone."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = model.get_encoder()
        prefix = next((name for name, module in model.named_modules() if module is encoder), "")
        return encoder, f"{prefix}." if prefix else ""
    return model, ""


@contextlib.contextmanager
def adapters_disabled(model: nn.Module, disabled: bool = True) -> Iterator[None]:
    """Within it the base answers without its PEFT adapters, whether the model is a PeftModel or adapters were injected into it."""
    if not disabled:
        yield
        return
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    tuned = [m for m in model.modules() if isinstance(getattr(m, "disable_adapters", None), bool) and not m.disable_adapters]
    try:
        for module in tuned:
            module.enable_adapters(False)
        yield
    finally:
        for module in tuned:
            module.enable_adapters(True)


def pooled_features(
    model: nn.Module,
    inputs: Sequence[str] | Sequence[Mapping[str, Tensor]],
    *,
    tokenizer: Any = None,
    pools: Sequence[str] = POOLS,
    depths: Sequence[int] | None = None,
    layers: Sequence[nn.Module] | None = None,
    max_length: int = 256,
    batch_size: int = 16,
    skip_first: bool = True,
    adapters: bool = True,
    project: int | None = None,
    directory: str | Path | None = None,
    memory_limit: int = 2 << 30,
    progress: bool = False,
) -> Features:
    """Features of the texts (or batches) after every layer, pooled over tokens; one forward pass, no gradients, in evaluation mode.

    Args:
        inputs: texts, with `tokenizer`; or batches: mappings of what the model's forward takes, whose first tensor's first dimension is
            the batch, and whose `attention_mask`, where there is one, says which tokens are padding.
        pools: of "mean" (`pool_mean`) and "last" (`pool_last`). A layer that gives [B, D] is taken as it is.
        depths: which to keep, 0 (the first layer's input) to the number of layers; default: all.
        layers: the stack, where `layer_stack` would take another.
        max_length, batch_size: of tokenized texts, which are sorted by length and padded on the right.
        adapters: False switches PEFT's adapters off for this pass.
        project: keep a seeded Gaussian projection to so many dimensions, the same for all layers (it keeps distances and inner
            products up to about 1/sqrt(project)), where the features themselves are too large.
        directory: keep the features in memory-mapped .npy files there instead of in memory.
        memory_limit: bytes that features in memory may take.
    Returns: Features, rows in the order of `inputs`.
    Raises: InputError where there is no input, an empty text, or more than `memory_limit`, with the remedy.

    >>> features = pooled_features(model, ["one text", "another"], tokenizer=tokenizer)  # doctest: +SKIP
    >>> features.at(-1, "mean").shape  # doctest: +SKIP
    (2, 576)
    """
    import numpy as np

    model = getattr(model, "_orig_mod", model)  # hooks do not run inside a compiled module
    unknown = [pool for pool in pools if pool not in POOLS]
    if unknown or not pools:
        raise ValueError(f"pools: got {tuple(pools)}, expected some of {POOLS}")
    batches, order, truncated = _batches(inputs, tokenizer, max_length, batch_size)
    run, _ = _encoder(model)
    tap = _Tap(list(layers) if layers is not None else list(layer_stack(model)[1]), tuple(pools), skip_first, project)
    with adapters_disabled(model, not adapters), _evaluating(model), torch.no_grad(), tap:
        tap.choose(depths, _count(run, tap, batches[0]))
        arrays: dict[str, Any] = {}
        start = 0
        for batch in _shown(batches, progress):
            rows = tap.run(run, batch)  # [pools, depths, B, D]
            if not arrays:
                shape = (rows.shape[1], len(order), rows.shape[3])
                arrays = {pool: _allocate(shape, pool, len(pools), directory, memory_limit) for pool in pools}
            index = order[start : start + rows.shape[2]]
            for pool, values in zip(pools, rows, strict=True):
                arrays[pool][:, np.asarray(index)] = values
            start += rows.shape[2]
    return Features(arrays, tap.kept, truncated)


def _allocate(shape: tuple[int, ...], pool: str, pools: int, directory: str | Path | None, limit: int) -> np.ndarray:
    import numpy as np

    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(Path(directory) / f"features-{pool}.npy", mode="w+", dtype=np.float32, shape=shape)
    size = 4 * pools * shape[0] * shape[1] * shape[2]
    if size > limit:
        raise InputError(
            f"the features of {shape[1]} texts, {shape[0]} depths and {shape[2]} dimensions take {size / 2**30:.1f} GiB, more than "
            f"memory_limit = {limit / 2**30:.1f} GiB: give directory=..., project=..., fewer depths or fewer texts"
        )
    return np.empty(shape, dtype=np.float32)


def _shown(batches: Sequence[Any], progress: bool) -> Any:
    if not progress:
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc="features", unit="batch")


def _batches(inputs: Sequence[Any], tokenizer: Any, max_length: int, batch_size: int) -> tuple[list[Mapping[str, Tensor]], list[int], int]:
    """The batches, the place of each of their rows among the inputs, and how many texts were cut off."""
    if len(inputs) == 0:
        raise InputError("there are no texts to take features of: give at least one")
    if not isinstance(inputs[0], str):
        rows = sum(len(next(iter(batch.values()))) for batch in inputs)
        return list(inputs), list(range(rows)), 0
    if tokenizer is None:
        raise ValueError("tokenizer: got None, expected the tokenizer of the model, as the inputs are texts")
    tokens, truncated = _tokenized(inputs, tokenizer, max_length)
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [_padded([tokens[index] for index in chunk], padding) for chunk in chunks], order, truncated


def _tokenized(texts: Sequence[str], tokenizer: Any, max_length: int) -> tuple[list[list[int]], int]:
    tokens = tokenizer(list(texts), truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    empty = next((index for index, ids in enumerate(tokens) if not ids), None)
    if empty is not None:
        raise InputError(f"text {empty} is empty (it has no tokens): leave it out")
    longer = sum(len(ids) > max_length for ids in tokens)
    if longer:
        tokens = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    return tokens, longer


def _padded(rows: list[list[int]], padding: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Stop(Exception):
    """Ends a forward pass whose rest nobody reads."""


def _count(model: nn.Module, tap: _Tap, batch: Mapping[str, Tensor]) -> int:
    """How many times a forward pass calls the layers (more than there are where a model shares them), from a few tokens of one row."""
    few = {name: value[:1, :_PROBE_TOKENS] if name in ("input_ids", "attention_mask") else value[:1] for name, value in batch.items()}
    tap.run(model, few)
    if not tap.calls:
        raise ValueError("layers: none of them was called in a forward pass; name the ones that are, layers=[...]")
    return tap.calls


class _Tap:
    """Hooks on the layers that pool what passes; a context manager which removes them at its end."""

    def __init__(self, layers: list[nn.Module], pools: tuple[str, ...], skip_first: bool, project: int | None) -> None:
        self.layers, self.pools, self.skip_first, self.project = layers, pools, skip_first, project
        self.kept: tuple[int, ...] = ()
        self.calls = 0  # of layers in the current forward pass
        self._last: int | None = None  # the call after which nothing is read
        self._mask: Tensor | None = None
        self._rows: list[Tensor] = []
        self._projection: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> _Tap:
        distinct = list(dict.fromkeys(self.layers))
        self._handles = [layer.register_forward_hook(self._after) for layer in distinct]
        self._handles.append(distinct[0].register_forward_pre_hook(self._before, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def choose(self, depths: Sequence[int] | None, count: int) -> None:
        """Keep these depths of 0 ... count."""
        kept = tuple(range(count + 1)) if depths is None else tuple(sorted({d + count + 1 if d < 0 else d for d in depths}))
        if not kept or not 0 <= kept[0] <= kept[-1] <= count:
            raise ValueError(f"depths: got {depths}, expected some of 0 ... {count}")
        self.kept, self._last = kept, kept[-1]

    def run(self, model: nn.Module, batch: Mapping[str, Tensor]) -> np.ndarray:
        """[pools, depths, B, D] in fp32 of one batch."""
        device = next(model.parameters()).device
        placed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        self.calls, self._rows, self._mask = 0, [], placed.get("attention_mask")
        options = {"use_cache": False} if _takes_use_cache(model) else {}
        with contextlib.suppress(_Stop):
            model(**placed, **options)
        rows, self._rows = self._rows, []
        widths = sorted({row.shape[-1] for row in rows})
        if len(widths) > 1:
            raise ValueError(f"layers: they give features of {widths} dimensions, expected one; choose depths or layers of one width")
        return torch.stack(rows, dim=1).float().cpu().numpy() if rows else None

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.calls == 0:
            self._record(0, args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()))

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.calls += 1
        self._record(self.calls, output if isinstance(output, Tensor) else output[0])

    def _record(self, depth: int, hidden: Tensor) -> None:
        if depth in self.kept:
            self._rows.append(self._projected(torch.stack([self._pooled(hidden, pool) for pool in self.pools])))
        if depth == self._last:
            raise _Stop

    def _pooled(self, hidden: Tensor, pool: str) -> Tensor:
        if hidden.dim() == 2:
            return hidden.float()
        if hidden.dim() != 3:
            raise ValueError(f"layers: one gives a tensor of shape {tuple(hidden.shape)}, expected [B, S, D] or [B, D]")
        mask = None if self._mask is None else self._mask.to(hidden.device)
        return pool_mean(hidden, mask, skip_first=self.skip_first) if pool == "mean" else pool_last(hidden, mask)

    def _projected(self, rows: Tensor) -> Tensor:
        if self.project is None or self.project >= rows.shape[-1]:
            return rows.to(next(iter(self._rows)).device) if self._rows else rows
        if self._projection is None:
            draw = torch.randn(rows.shape[-1], self.project, generator=torch.Generator().manual_seed(0))
            self._projection = draw / self.project**0.5
        self._projection = self._projection.to(rows.device)
        return rows.to(self._projection.device).float() @ self._projection


def _takes_use_cache(model: nn.Module) -> bool:
    if getattr(getattr(model, "config", None), "use_cache", None) is None:
        return False
    parameters = inspect.signature(model.forward).parameters
    return "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
