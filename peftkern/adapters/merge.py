"""Merge LoRA adapters into the base of a model, 4-bit or dense, and take them out again to the byte."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.nf4 import NF4Weight
from ..merging import Branch
from ..patching.merged import Unmerged, base_weight, branches_of, install_merge, reason_against, unmerged
from .merge_layers import (
    Residual,
    Task,
    adapter_bytes,
    as_before,
    base_alone,
    lora_layers,
    merge_layer,
    only_adapters,
    stored_bytes,
)
from .merge_original import Originals
from .merge_probe import Reference, input_moments, probe_rows
from .merge_report import FORM_NAMES, MergeComparison, MergedLayer, MergeReport

__all__ = ["FORMS", "RESIDUAL", "compare_merges", "merge", "unmerge"]

FORMS = tuple(FORM_NAMES)
RESIDUAL = "merge_residual"  # the adapter that holds what rounding lost
_BASES = ("dequantized", "original")
_MOMENTS_LIMIT = 2 << 30  # bytes of input moments gathered in one pass over the probe
_SLOT = "_peftkern_merge"  # of the model

Source = str | Path | Mapping[str, Tensor]


@dataclass
class _Replaced:
    """The adapters that a residual took the place of, and which parameters were trained."""

    names: list[str]
    trained: list[nn.Parameter]


def merge(
    model: nn.Module,
    *,
    form: str = "requantize",
    base: str = "dequantized",
    adapters: Sequence[str] | None = None,
    original: Source | None = None,
    rank: int = 8,
    probe: Tensor | Sequence[Tensor] | Reference | None = None,
    calibration: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MergeReport:
    """Merge LoRA adapters into the weights of a PEFT model, reversibly, and report what that does.

    Layers on a dense base are merged in its dtype whatever the form. PEFT counts the adapters as merged:
    its `unmerge_adapter`, `merge_and_unload` and `disable_adapter` go on from here. `unmerge` puts every
    byte back; until then the old weights stay in memory.

    Args:
        model: a PEFT model with LoRA (rsLoRA, rank and alpha patterns, lora_bias, DoRA; linear layers,
            Conv1D and embeddings).
        form: of 4-bit layers: "requantize" to the nearest codes; "stochastic" rounding, unbiased and
            noisier; "feedback" of rounding errors along the layers' inputs (GPTQ); "residual":
            requantize, and the rounding error as an adapter of rank `rank` named "merge_residual", which
            takes the adapters' place; "dense": a plain linear in the dtype that was quantized.
        base: "dequantized": the 4-bit weights as the adapter was trained on them; "original": the weights
            they were quantized from.
        adapters: names, in the order they run; default: the active ones.
        original: the original weights, a safetensors folder or a mapping: for base="original", and for the
            mismatch in the report.
        rank: of the residual.
        probe: token ids, int64 [B, T] or a list of [T]: perplexity, KL and the verdict; or what base and
            adapters give on them, which several merges then share.
        calibration: token ids whose inputs "feedback" serves; default: the probe's, which then flatters it.
        seed: of "stochastic" and of the residual's first subspace; each layer draws by its own name.
        progress: show a bar.
    Returns: MergeReport.
    Raises: ValueError naming the argument, what was got and what to do; the model is then as it was.
    Source: QLoRA, GPTQ, LoftQ: see `peftkern.merging`.

    >>> report = merge(model, form="dense", probe=ids)                  # doctest: +SKIP
    >>> print(report)                                                   # doctest: +SKIP
    >>> unmerge(model)                                                  # doctest: +SKIP
    """
    _check(form, base, original, probe if calibration is None else calibration)
    tasks, left = _tasks(model, adapters, base, original)
    names, untied = _names(tasks), _shared(model, tasks)
    if form == "residual":
        _check_residual(model, tasks, left)
    reference = probe if probe is None or isinstance(probe, Reference) else _reference(model, names, probe)
    inputs = probe_rows(calibration) if calibration is not None else reference.rows if reference else None
    try:
        done, residuals = _merge_all(model, tasks, names, form, inputs, rank, seed, progress)
        if residuals:
            _add_residual(model, names, residuals)
        report = MergeReport(form, base, tuple(done), None, untied, left)
        if reference is None:
            return report
        return replace(report, probe=reference.compare(lambda: as_before(model, names)))
    except BaseException:
        unmerge(model)
        raise


def unmerge(model: nn.Module) -> int:
    """Take out what `merge`, or PEFT's `merge_adapter` on a patched model, put in; of how many layers.

    Every byte is as it was: the old weights themselves are put back.
    """
    replaced = model.__dict__.pop(_SLOT, None)
    if replaced is not None:
        model.set_adapter(replaced.names if len(replaced.names) > 1 else replaced.names[0])
        model.delete_adapter(RESIDUAL)
        trained = {id(parameter) for parameter in replaced.trained}
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in trained)
    merged = [layer for layer in lora_layers(model).values() if unmerged(layer) is not None]
    for layer in merged:
        layer.unmerge()
    return len(merged)


def compare_merges(
    model: nn.Module,
    probe: Tensor | Sequence[Tensor],
    *,
    forms: Sequence[str | tuple[str, str]] = ("requantize", "stochastic", "feedback", "residual", "dense"),
    adapters: Sequence[str] | None = None,
    original: Source | None = None,
    rank: int = 8,
    calibration: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MergeComparison:
    """Merge in each of several forms, measure, and unmerge again: which form to take.

    Args:
        model, probe, adapters, original, rank, calibration, seed, progress: as of `merge`.
        forms: names, or pairs of a form and a base ("dense", "original").
    Returns: MergeComparison; the model is as it was.
    """
    tasks, _ = _tasks(model, adapters, "dequantized", None)
    kept = sum(stored_bytes(task.weight) + adapter_bytes(task) for task in tasks)
    reference = _reference(model, _names(tasks), probe)
    reports = []
    for item in forms:
        form, base = (item, "dequantized") if isinstance(item, str) else item
        common = dict(
            adapters=adapters,
            original=original,
            rank=rank,
            seed=seed,
            progress=progress,
            calibration=calibration,
        )
        try:
            reports.append(merge(model, form=form, base=base, probe=reference, **common))
        finally:
            unmerge(model)
    return MergeComparison(tuple(reports), kept)


def _check(form: str, base: str, original: Source | None, probe: Any) -> None:
    if form not in FORMS:
        raise ValueError(f"form: got {form!r}, expected one of {', '.join(FORMS)}")
    if base not in _BASES:
        raise ValueError(f"base: got {base!r}, expected one of {', '.join(_BASES)}")
    if base == "original" and original is None:
        raise ValueError("original: is missing; base='original' needs the 16-bit model's folder or tensors")
    if form == "feedback" and probe is None:
        raise ValueError("probe: is missing; form='feedback' needs its token ids, or calibration's")


def _tasks(
    model: nn.Module,
    adapters: Sequence[str] | None,
    base: str,
    original: Source | None,
) -> tuple[list[Task], tuple[tuple[str, str], ...]]:
    """What to merge, and what has to be left, with the reason."""
    layers = lora_layers(model)
    if not layers:
        bottleneck = getattr(model, "peft_type", None) == "BOTTLENECK"
        hint = (
            "a bottleneck is no linear change of weights and cannot be merged"
            if bottleneck
            else "load an adapter with PEFT first"
        )
        raise ValueError(f"model: {type(model).__name__} has no LoRA layer; {hint}")
    if any(layer.merged for layer in layers.values()) or _SLOT in model.__dict__:
        raise ValueError("model: adapters are merged already; call unmerge(model) first")
    if isinstance(adapters, str):
        raise ValueError(f"adapters: got the string {adapters!r}, expected a list; write [{adapters!r}]")
    known = {name for layer in layers.values() for name in (*layer.lora_A, *layer.lora_embedding_A)}
    unknown = sorted(set(adapters or ()) - known)
    if unknown or (adapters is not None and not adapters):
        got = ", ".join(map(repr, unknown)) or "none"
        raise ValueError(f"adapters: got {got}; the model has {', '.join(sorted(known))}")
    source = None if original is None else Originals(original)
    tasks, left = [], []
    for name, layer in layers.items():
        held = {*layer.lora_A, *layer.lora_embedding_A}
        names = [name for name in adapters or layer.active_adapters if name in held]
        reason = reason_against(layer, names) if names else None
        if names and reason is None and not install_merge(layer):
            reason = f"{type(layer).__name__} has a merge of its own"
        if reason is not None:
            left.append((name, reason))
        elif names:
            tasks.append(_task(name, layer, tuple(names), source, base == "original"))
    if not tasks:
        raise ValueError(f"model: no layer can be merged: {left[0][1] if left else 'no adapter is active'}")
    return tasks, tuple(left)


def _task(
    name: str,
    layer: nn.Module,
    adapters: tuple[str, ...],
    source: Originals | None,
    onto: bool,
) -> Task:
    weight = base_weight(Unmerged.of(layer), layer)
    branches = branches_of(layer, adapters)
    _check_shapes(name, weight, branches)
    if source is None or isinstance(weight, Tensor):  # a dense base is its own original
        return Task(name, layer, adapters, None, False)
    plain = name.removeprefix("base_model.model.")
    rows = source.rows(plain, tuple(weight.shape), weight.device)
    return Task(name, layer, adapters, rows, onto)


def _check_shapes(name: str, weight: NF4Weight | Tensor, branches: Sequence[Branch]) -> None:
    n, k = weight.shape
    for branch in branches:
        got = (branch.up.shape[0], branch.down.shape[1])
        if got != (n, k):
            made = f"one of {name} is made for {got}, the weight is {(n, k)}"
            raise ValueError(f"adapters: {made}: it belongs to another base")


def _names(tasks: Sequence[Task]) -> list[str]:
    """The adapters, in the order they run."""
    return list(dict.fromkeys(name for task in tasks for name in task.adapters))


def _reference(model: nn.Module, names: Sequence[str], probe: Tensor | Sequence[Tensor]) -> Reference:
    with only_adapters(model, names):
        return Reference(model, probe_rows(probe), lambda: base_alone(model))


def _shared(model: nn.Module, tasks: Sequence[Task]) -> tuple[str, ...]:
    """Layers whose weight another module has too."""
    owners: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    return tuple(task.name for task in tasks if owners.get(id(task.layer.base_layer.weight), 0) > 1)


def _check_residual(model: nn.Module, tasks: Sequence[Task], left: Sequence[tuple[str, str]]) -> None:
    from peft import PeftModel
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not isinstance(model, PeftModel):
        raise ValueError(f"model: got {type(model).__name__}; form='residual' adds an adapter to a PeftModel")
    if RESIDUAL in model.peft_config:
        raise ValueError(f"model: already has an adapter {RESIDUAL!r}; delete or rename it")
    named = model.named_modules()
    other = next((name for name, module in named if isinstance(module, AuxiliaryTrainingWrapper)), None)
    if left or other:
        what = left[0][0] if left else other
        raise ValueError(f"form: 'residual' replaces the adapters, but {what} is part of them; take another")
    if all(isinstance(task.weight, Tensor) for task in tasks):
        raise ValueError("form: 'residual' is of 4-bit weights, and no merged layer has one; take 'dense'")


def _merge_all(
    model: nn.Module,
    tasks: Sequence[Task],
    names: Sequence[str],
    form: str,
    rows: list[Tensor] | None,
    rank: int,
    seed: int,
    progress: bool,
) -> tuple[list[MergedLayer], dict[str, Residual]]:
    residuals: dict[str, Residual] = {}
    done: list[MergedLayer] = []
    dtype = _activations(model)
    with _bar(len(tasks), progress) as bar:
        for chunk in _chunks(tasks, form):
            moments = _moments(model, names, chunk, rows) if form == "feedback" else {}
            for task in chunk:
                of_input = moments.pop(task.name, None)
                made, residual = merge_layer(task, form, dtype=dtype, moments=of_input, rank=rank, seed=seed)
                done.append(made)
                if residual is not None:
                    residuals[task.name] = residual
                bar.update()
    return done, residuals


def _chunks(tasks: Sequence[Task], form: str) -> Iterator[list[Task]]:
    """Layers whose input moments are gathered in one pass over the probe: as many as fit."""
    if form != "feedback":
        yield list(tasks)
        return
    chunk: list[Task] = []
    size = 0
    for task in tasks:
        own = 4 * task.layer.in_features**2 if isinstance(task.weight, NF4Weight) else 0
        if chunk and size + own > _MOMENTS_LIMIT:
            yield chunk
            chunk, size = [], 0
        chunk.append(task)
        size += own
    yield chunk


def _moments(
    model: nn.Module,
    names: Sequence[str],
    chunk: Sequence[Task],
    rows: list[Tensor],
) -> dict[str, Tensor]:
    """Of the inputs that the chunk's 4-bit layers see in the unmerged model."""
    chosen = [task for task in chunk if isinstance(task.weight, NF4Weight)]
    with as_before(model, names):
        found = input_moments(model, [task.layer for task in chosen], rows)
    return {task.name: moments for task, moments in zip(chosen, found, strict=True)}


def _activations(model: nn.Module) -> torch.dtype | None:
    """The dtype that the model computes in: its embeddings', which no quantization touches; None without."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(getattr(embeddings, "base_layer", embeddings), "weight", None)
    return None if weight is None or not weight.is_floating_point() else weight.dtype


def _add_residual(model: Any, names: Sequence[str], residuals: dict[str, Residual]) -> None:
    """The residuals as an adapter of their own, active in the place of the merged ones."""
    from peft import LoraConfig

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ranks = {name.removeprefix("base_model.model."): side[1].shape[0] for name, side in residuals.items()}
    most = max(ranks.values())
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=sorted(ranks),
        rank_pattern={f"^{name}$": rank for name, rank in ranks.items() if rank != most},
        alpha_pattern={f"^{name}$": rank for name, rank in ranks.items() if rank != most},
        task_type=model.peft_config[names[0]].task_type,
        inference_mode=True,
    )
    active = list(model.active_adapters)
    model.add_adapter(RESIDUAL, config)
    model.__dict__[_SLOT] = _Replaced(active, trained)
    layers = lora_layers(model)
    with torch.no_grad():
        for name, (up, down) in residuals.items():
            layers[name].lora_A[RESIDUAL].weight.copy_(down)
            layers[name].lora_B[RESIDUAL].weight.copy_(up)
    model.set_adapter(RESIDUAL)
    model.requires_grad_(False)


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    """A progress bar; without tqdm, or not shown, one that does nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield type("NoBar", (), {"update": lambda self: None})()
        return
    with tqdm(total=total, desc="merging", unit="layer", disable=None if shown else True) as bar:
        yield bar
