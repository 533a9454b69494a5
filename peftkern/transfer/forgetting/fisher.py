"""The diagonal Fisher information of the weights under LoRA layers, kept as row and column sums: N + K
numbers a layer, not N K."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...files import TEMP_PREFIX
from .gradients import source_gradients
from .identity import base_identity
from .layers import Factors, lora_factors
from .marginals import SEQUENCE, UNITS, marginals
from .predictions import TRUE, Predictions, causal_lm

__all__ = ["FisherFactors", "collect_fisher"]

_FORMAT = "peftkern-fisher-1"


@dataclass(frozen=True)
class FisherFactors:
    """Row sums [N] and column sums [K] of each layer's diagonal Fisher, per prediction: sum F dW^2 / 2 is in
    nats per prediction.

    rows, columns: by the layer's name, on the CPU, in fp32 (fp64 of fp64 models). predictions and examples:
        how many it was measured on.
    labels: "true" (drawn from the model) or "empirical" (the data's). unit: "sequence" (gradients of whole
        examples are squared, the definition) or "token" (of single positions). base: what tells each layer's
        base weight from another, see `base_identity`.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    predictions: int
    examples: int
    labels: str
    unit: str
    base: dict[str, str]

    @property
    def bytes(self) -> int:
        """Memory that the sums take."""
        return sum(vector.nbytes for vector in (*self.rows.values(), *self.columns.values()))

    def require_base(self, factors: Mapping[str, Factors]) -> None:
        """Raise ValueError where it was measured on another base, or lacks one of these layers."""
        absent = [name for name in factors if name not in self.rows]
        if absent:
            raise ValueError(
                "fisher: it has no layer"
                f" {absent[0]}{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}: it was measured"
                " for other layers; collect it again with this adapter's target_modules"
            )
        now = base_identity(factors)
        other = next((name for name in factors if self.base.get(name) != now[name]), None)
        if other:
            raise ValueError(
                f"fisher: it was measured on another base: {other} has other weights or another shape, or is"
                " quantized otherwise, than the layer of that name in this model; collect it on this base"
            )

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, whole or not at all."""
        from safetensors.torch import save_file

        final = Path(path)
        tensors = {f"{name}.rows": vector for name, vector in self.rows.items()}
        tensors |= {f"{name}.columns": vector for name, vector in self.columns.items()}
        facts = {
            "predictions": self.predictions,
            "examples": self.examples,
            "labels": self.labels,
            "unit": self.unit,
            "base": self.base,
        }
        temporary = final.with_name(f"{TEMP_PREFIX}{final.name}")
        try:
            save_file(tensors, temporary, metadata={"format": _FORMAT, "facts": json.dumps(facts)})
            temporary.replace(final)
        except Exception as error:  # safetensors has an error of its own for a full disk
            temporary.unlink(missing_ok=True)
            raise OSError(
                f"could not write {final}: {error}. Check the free disk space and the permissions"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> FisherFactors:
        """Read what `save` wrote; ValueError where the file is another."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no sound safetensors file ({error}): collect the Fisher information again"
            ) from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} holds no Fisher information of peftkern (format {metadata.get('format')!r}, expected"
                f" {_FORMAT!r})"
            )
        rows = {
            name.removesuffix(".rows"): vector for name, vector in tensors.items() if name.endswith(".rows")
        }
        columns = {
            name.removesuffix(".columns"): vector
            for name, vector in tensors.items()
            if name.endswith(".columns")
        }
        return cls(rows, columns, **json.loads(metadata["facts"]))


def collect_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    labels: str = TRUE,
    unit: str = SEQUENCE,
    predictions: Predictions = causal_lm,
    adapter: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> FisherFactors:
    """Measure the Fisher information of the pretrained weights (adapters off, evaluation mode) on source
    text.

    One forward and one backward a batch; no gradient of a weight is formed. A batch may hold several examples
    in the first dimension of every tensor; where layers see positions without that dimension (experts), give
    one example a batch. 64 to 256 examples suffice.

    Args:
        model: with LoRA layers (see `lora_factors`), patched or not; it is left as it was.
        batches: what `predictions` takes; tensors are moved to the model's device.
        labels: "true": drawn from the model's own predictions, as the definition has it; "empirical": the
            data's labels.
        unit: "sequence": the gradient of each example is squared; "token": of each position.
        predictions: logits and labels of a batch; `causal_lm`, `classifier`, or your own.
        adapter: which adapter's layers; None: the active one's.
        seed: of the labels' draws, which depend on it and the batch's number alone.
    Raises: ValueError for empty batches, for layers whose update is not s B A, or for a layer that is called
    twice in one pass.
    """
    if unit not in UNITS:
        raise ValueError(f"unit: got {unit!r}, expected one of {UNITS}")
    factors = lora_factors(model, adapter=adapter)
    rows = {name: _zeros(layer.b.shape[0], layer) for name, layer in factors.items()}
    columns = {name: _zeros(layer.a.shape[1], layer) for name, layer in factors.items()}

    def receive(name: str, x: Tensor, delta: Tensor) -> None:
        of_rows, of_columns = marginals(x, delta, unit=unit)
        rows[name] += of_rows
        columns[name] += of_columns

    counted = examples = 0
    for number in source_gradients(
        model, batches, factors, receive, labels=labels, predictions=predictions, seed=seed, progress=progress
    ):
        counted, examples = counted + number.predictions, examples + number.examples
    if not any(vector.any() for vector in rows.values()):
        raise ValueError(
            "model: no gradient reached any of its LoRA layers: if it is compiled, pass the model itself and"
            " compile later; else check that the predictions depend on them"
        )
    rows, columns = (
        {name: vector.div_(counted).cpu() for name, vector in each.items()} for each in (rows, columns)
    )
    return FisherFactors(rows, columns, counted, examples, labels, unit, base_identity(factors))


def _zeros(size: int, layer: Factors) -> Tensor:
    return torch.zeros(size, device=layer.a.device, dtype=torch.promote_types(layer.a.dtype, torch.float32))
