"""`--fit`: how a run is to use memory, chosen by the planner before a model is loaded, and put on the model;
and what the planner says when memory has run out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..memory.planner.budgets import bytes_of, in_bytes, limits_of
from ..memory.planner.cards import CPU, Card, this_card
from ..memory.planner.choose import changes
from ..memory.planner.options import RunOptions
from ..memory.planner.plan import Plan, plan
from ..memory.planner.shapes import Shape, read_shape
from ..memory.planner.table import described, name_of
from .adapters import planned_adapter
from .agreement import Need, agree
from .errors import InputError
from .processes import local_process_count, process_count, say
from .resolve import compute_dtype, resolve_model

if TYPE_CHECKING:
    from ..memory.planner.budgets import Limits
    from .config import FinetuneConfig

__all__ = ["Fit", "choose_fit", "explanation", "install_fit", "run_options"]

_SHARE = 0.97  # of a card's memory: the rest is lost between blocks
_LAYERS, _CHANGES = 6, 3  # parts and changes that a message names


@dataclasses.dataclass(frozen=True)
class Fit:
    """What was chosen: the shape, the options, and the limits that they keep to, of each process."""

    shape: Shape
    options: RunOptions
    limits: Limits
    card: Card


def run_options(config: FinetuneConfig, shape: Shape, length: int, rows: str = "whole") -> RunOptions:
    """The run as the planner knows it, with sequences of `length` tokens, `rows` of RunOptions; memory is
    used as the options say."""
    half = compute_dtype(config.dtype).itemsize == 2
    cuda = torch.cuda.is_available()
    flash = not cuda or (half and torch.cuda.get_device_capability() >= (8, 0))
    return RunOptions(
        length=length,
        batch=config.batch_size or 1,
        rows=rows,
        accumulation=config.grad_accumulation or 1,
        dtype_bytes=2 if half else 4,
        four_bit=config.quantization != "none",
        nested=config.double_quant,
        checkpointing=config.gradient_checkpointing,
        optimizer=config.optimizer or "adamw",
        attention="flash" if flash else "math",
        cards=process_count() if config.shard else 1,
        replicas=1 if config.shard else process_count(),
        **planned_adapter(config, shape),
    )


def choose_fit(
    config: FinetuneConfig, path: str, lengths: Iterable[int], *, packed: bool, apart: bool = False
) -> Fit | None:
    """What --fit chooses for the longest batch of a run; None without --fit. In several processes all call
    it, and get the same options.

    Args:
        lengths: of the rows, in tokens; packed: whether they are put together in windows; apart: whether a
            window's documents are kept apart.
    Raises: InputError with the least that the run needs, where nothing fits; and for what the planner does
    not know.
    """
    if config.fit is None:
        return None
    _require_known(config)
    shape, card = read_shape(path, trust_remote_code=config.trust_remote_code), this_card()
    lengths = list(lengths)
    rows = _rows(config, lengths, packed, apart)
    options = run_options(config, shape, _longest(config, lengths, packed), rows)
    try:
        found = agree(shape, Need(options, _limits(config, card), card))
    except InputError as error:
        raise InputError(f"--fit {config.fit}: {error}") from None
    fit = Fit(shape, found.options, found.limits, card)
    say(_said(config, fit))
    return fit


def _require_known(config: FinetuneConfig) -> None:
    if not config.patch:
        what = "peftkern's own kernels (drop --no-patch)"
        raise InputError(f"--fit {config.fit}: the planner knows {what} alone")


def _rows(config: FinetuneConfig, lengths: Sequence[int], packed: bool, apart: bool) -> str:
    """What the rows of a batch are, as the planner's RunOptions say. Windows cut from running text have a
    shorter one at the end, which a batch of several fills up."""
    multiple, several = config.pad_to_multiple_of or 1, config.batch_size != 1
    if packed and apart:
        return "packed"
    found = {config.seq_length} if packed else {min(length, config.seq_length) for length in lengths}
    uneven = several and (packed or len(found) > 1)
    return "padded" if uneven or any(length % multiple for length in found) else "whole"


def _longest(config: FinetuneConfig, lengths: Iterable[int], packed: bool) -> int:
    if packed:
        return config.seq_length
    multiple = config.pad_to_multiple_of or 1
    return -(-min(max(lengths, default=1), config.seq_length) // multiple) * multiple


def _limits(config: FinetuneConfig, card: Card) -> Limits:
    """Of this process: --fit is each one's, host memory and disk are divided among those of this machine."""
    asked = bytes_of(config.fit, "--fit")
    room = int(min(asked, card.memory) * _SHARE) if card.is_gpu else asked
    ram = None if config.fit_ram is None else bytes_of(config.fit_ram, "--fit-ram")
    disk = 0 if config.fit_disk is None else bytes_of(config.fit_disk, "--fit-disk")
    return limits_of(card, ram=ram, disk=disk, room=room, processes=local_process_count())


def _said(config: FinetuneConfig, fit: Fit) -> str:
    found, options = plan(fit.shape, fit.options, fit.limits, fit.card), fit.options
    how = "; ".join(described(options, fit.shape))
    run = f"{in_bytes(found.device_bytes)} planned for {options.batch} × {options.length:,} tokens"
    run += f" in each of {options.processes} processes" if options.processes > 1 else ""
    text = f"--fit {config.fit}: {run}: {how}."
    return "\n".join([text, *(f"  note: {warning}." for warning in found.warnings)])


def install_fit(model: nn.Module, fit: Fit) -> list[Any]:
    """Put the choice on a patched model; the handles that hold memory, to be kept as long as the model is.

    Raises: InputError where the model refuses a piece that the planner took it to allow.
    """
    try:
        return _installed(model, fit)
    except ValueError as error:
        raise InputError(f"--fit: {error}; run without --fit, or give more memory") from error


def _installed(model: nn.Module, fit: Fit) -> list[Any]:
    from ..memory import attention_by_groups, embedding_on_host, layers_on_host, rebuild_norms, tile_mlps

    options, handles = fit.options, []
    device = "cuda" if fit.card.is_gpu else "cpu"
    if options.layers_on_host:
        handles.append(layers_on_host(model, device=device))
    if options.embedding_on_host:
        handles.append(embedding_on_host(model, device=device))
    if options.layers_on_host:
        _rest_to(model, torch.device(device), stay=options.embedding_on_host)
    steps: list[tuple[bool, Callable[[], Any]]] = [
        (options.mlp_tile is not None, lambda: tile_mlps(model, tile=options.mlp_tile)),
        (options.rebuild_norms, lambda: rebuild_norms(model)),
        (options.kv_groups, lambda: attention_by_groups(model)),
    ]
    for wanted, install in steps:
        if wanted:
            say(str(install()))
    if options.away(fit.shape.layers):
        handles.append(_checkpoints(model, fit, device))
    return handles


def _rest_to(model: nn.Module, device: torch.device, *, stay: bool) -> None:
    """Move what is in no decoder layer, which was loaded on the host: head, last norm, tables of positions,
    and the embedding unless it is to stay.
    """
    from ..memory.checkpoint import stacks_of

    layers = max(stacks_of(model), key=len)
    inside = {id(module) for layer in layers for module in layer.modules()}
    if stay:
        inside.add(id(model.get_input_embeddings()))
    for module in model.modules():
        if id(module) in inside:
            continue
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(device)
        module._buffers.update({k: v if v is None else v.to(device) for k, v in module._buffers.items()})
    for owner in model.modules():
        if getattr(owner, "hf_device_map", None):  # which trainers compare with their own device
            owner.hf_device_map = {"": device.index or 0 if device.type == "cuda" else "cpu"}


def _checkpoints(model: nn.Module, fit: Fit, device: str) -> Any:
    """A store with the room that was planned for each tier."""
    from ..memory import Budgets, CheckpointStore, checkpoint_layers
    from ..memory.planner.parts import BLOCK, host_parts
    from ..memory.planner.step import Step

    step, layers = Step(fit.shape, fit.options, fit.card), fit.shape.layers
    parts = [part for part in host_parts(step, fit.limits) if part.name == "checkpoints"]
    room = {part.tier: -(-part.nbytes // BLOCK) * BLOCK for part in parts}
    budgets = Budgets(
        device=(fit.options.kept(layers) - 1) * step.h,
        pinned=room.get("pinned", 0),
        host=room.get("host", 0),
        disk=room.get("disk", 0),
    )
    return checkpoint_layers(model, store=CheckpointStore(budgets, device=device))


def explanation(config: FinetuneConfig) -> str:
    """What the planner says of a run that has run out of memory: the largest parts at the peak, and what
    would make it smaller. Empty where the planner does not know the run.
    """
    try:
        return _explained(config)
    except Exception:  # of a model that cannot be read, say: the error at hand is the one to tell
        return ""


def _explained(config: FinetuneConfig) -> str:
    if not config.patch:
        return ""
    config = config.resolved()
    card = this_card()
    shape = read_shape(resolve_model(config.model), trust_remote_code=config.trust_remote_code)
    packed = config.document_boundaries or bool(config.packing)  # what the data is, is not known here
    rows = _rows(config, [config.seq_length, 1], packed, packed)
    options = run_options(config, shape, config.seq_length, rows)
    processes = local_process_count()
    limits = limits_of(card, processes=processes) if config.fit is None else _limits(config, card)
    found = plan(shape, options, limits, card)
    others = [
        change for change in changes(shape, options, limits, card) if change.device < found.device_bytes
    ]
    return _worded(found, others[:_CHANGES], card)


def _worded(found: Plan, others: list[Any], card: Card) -> str:
    peak, options = found.peak, found.options
    parts = sorted(peak.parts, key=lambda part: -part.nbytes)[:_LAYERS]
    listed = ", ".join(f"{name_of(part)} {in_bytes(part.nbytes)}" for part in parts)
    where = "host memory" if card is CPU else card.name
    text = (
        f"Planned for {options.batch} × {options.length:,} tokens: {in_bytes(peak.nbytes)} of {where} at the"
        f" peak ({peak.phase.replace('_', ' ')}), of it {listed}."
    )
    if others:
        less = ", ".join(f"{change.text} ({in_bytes(change.device)})" for change in others)
        text += f" What takes less: {less}; --fit SIZE chooses among these."
    return text
