"""Pooled features of every layer of a transformer, from one forward pass over the data.

A hidden state [B, S, D] is pooled in the hook of its layer, so that nothing of size S x D outlives its layer:
what stays is one row [D] a text, a layer and a pooling. Depth 0 is the input of the first layer (the
embeddings), depth i the output of layer i, which is what a model that is cut there hands on. The forward pass
ends at the last layer that is asked for: no head, no logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .depth import layer_stacks
from .pooling import POOLS, pool_last, pool_mean
from .tap import Tap, count_calls

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "POOLS",
    "Features",
    "adapters_disabled",
    "layer_stack",
    "pool_last",
    "pool_mean",
    "pooled_features",
]


@dataclass(frozen=True)
class Features:
    """Pooled features: `arrays[pool]` is [depths, n, D] in fp32, a numpy array or a memory map; `depths`
    names its first axis.

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


def layer_stack(model: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The name and the layers of the stack of a model (`depth.layer_stacks`) that holds most parameters.

    Of an encoder-decoder it is the encoder's. Raises ValueError where there is none.
    """
    root, prefix = _encoder(model)
    stack = max(
        layer_stacks(root),
        key=lambda each: sum(p.numel() for layer in each.layers for p in layer.parameters()),
    )
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
    """Within it the base answers without its PEFT adapters, whether the model is a PeftModel or adapters were
    injected into it.
    """
    if not disabled:
        yield
        return
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    tuned = [
        m
        for m in model.modules()
        if isinstance(
            getattr(m, "disable_adapters", None),
            bool,
        )
        and not m.disable_adapters
    ]
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
    """Features of the texts (or batches) after every layer, pooled over tokens; one forward pass, no
    gradients, in evaluation mode.

    Args:
        inputs: texts, with `tokenizer`; or batches: mappings of what the model's forward takes, whose first
            tensor's first dimension is the batch, and whose `attention_mask`, where there is one, says which
            tokens are padding.
        pools: of "mean" (`pool_mean`) and "last" (`pool_last`). A layer that gives [B, D] is taken as it is.
        depths: which to keep, 0 (the first layer's input) to the number of layers; default: all.
        layers: the stack, where `layer_stack` would take another.
        max_length, batch_size: of tokenized texts, which are sorted by length and padded on the right.
        adapters: False switches PEFT's adapters off for this pass.
        project: keep a seeded Gaussian projection to so many dimensions, the same for all layers (it keeps
            distances and inner products up to about 1/sqrt(project)), where the features themselves are too
            large.
        directory: keep the features in memory-mapped .npy files there instead of in memory.
        memory_limit: bytes that features in memory may take.
    Returns: Features, rows in the order of `inputs`.
    Raises: InputError where there is no input, an empty text, or more than `memory_limit`, with the remedy.

    >>> features = pooled_features(model, ["one text", "another"], tokenizer=tokenizer)  # doctest: +SKIP
    >>> features.at(-1, "mean").shape  # doctest: +SKIP
    (2, 576)
    """

    model = getattr(model, "_orig_mod", model)  # hooks do not run inside a compiled module
    unknown = [pool for pool in pools if pool not in POOLS]
    if unknown or not pools:
        raise ValueError(f"pools: got {tuple(pools)}, expected some of {POOLS}")
    batches, order, truncated = _batches(inputs, tokenizer, max_length, batch_size)
    stack = list(layers) if layers is not None else list(layer_stack(model)[1])
    run, tap = _encoder(model)[0], Tap(stack, tuple(pools), skip_first, project)
    store = _Store(tuple(pools), len(order), directory, memory_limit)
    with adapters_disabled(model, not adapters), _evaluating(model), torch.no_grad(), tap:
        tap.choose(depths, count_calls(run, tap, batches[0]))
        for batch in _shown(batches, progress):
            rows = tap.run(run, batch)
            store.put(rows, order[store.filled : store.filled + rows.shape[2]])
    return Features(store.arrays, tap.kept, truncated)


class _Store:
    """Arrays [depths, n, D] in fp32, one a pooling, in memory or in files."""

    def __init__(self, pools: tuple[str, ...], n: int, directory: str | Path | None, limit: int) -> None:
        self.pools, self.n, self.directory, self.limit = pools, n, directory, limit
        self.arrays: dict[str, Any] = {}
        self.filled = 0

    def put(self, rows: np.ndarray, index: list[int]) -> None:
        """Keep the features [pools, depths, B, D] of the texts `index`."""
        if not self.arrays:
            shape = (rows.shape[1], self.n, rows.shape[3])
            self.arrays = {
                pool: _allocate(
                    shape,
                    pool,
                    len(self.pools),
                    self.directory,
                    self.limit,
                )
                for pool in self.pools
            }
        for pool, values in zip(self.pools, rows, strict=True):
            self.arrays[pool][:, index] = values
        self.filled += len(index)


def _allocate(
    shape: tuple[int, ...],
    pool: str,
    pools: int,
    directory: str | Path | None,
    limit: int,
) -> np.ndarray:
    import numpy as np

    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(
            Path(directory) / f"features-{pool}.npy",
            mode="w+",
            dtype=np.float32,
            shape=shape,
        )
    size = 4 * pools * shape[0] * shape[1] * shape[2]
    if size > limit:
        raise InputError(
            f"the features of {shape[1]} texts, {shape[0]} depths and {shape[2]} dimensions take"
            f" {size / 2**30:.1f} GiB, more than memory_limit = {limit / 2**30:.1f} GiB: give directory=...,"
            " project=..., fewer depths or fewer texts"
        )
    return np.empty(shape, dtype=np.float32)


def _shown(batches: Sequence[Any], progress: bool) -> Any:
    if not progress:
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc="features", unit="batch")


def _batches(
    inputs: Sequence[Any],
    tokenizer: Any,
    max_length: int,
    batch_size: int,
) -> tuple[list[Mapping[str, Tensor]], list[int], int]:
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
    padding = next(
        (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None),
        0,
    )
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [_padded([tokens[index] for index in chunk], padding) for chunk in chunks], order, truncated


def _tokenized(texts: Sequence[str], tokenizer: Any, max_length: int) -> tuple[list[list[int]], int]:
    tokens = tokenizer(list(texts), truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    empty = next((index for index, ids in enumerate(tokens) if not ids), None)
    if empty is not None:
        raise InputError(f"text {empty} is empty (it has no tokens): leave it out")
    longer = sum(len(ids) > max_length for ids in tokens)
    if longer:
        tokens = tokenizer(
            list(texts),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )["input_ids"]
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
