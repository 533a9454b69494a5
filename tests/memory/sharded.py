"""What the processes of the sharding tests compute; numbers go back as numpy arrays or plain values."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict  # here, once for all processes
from torch import Tensor, distributed, nn

import peftkern
from peftkern.memory import (
    Budgets,
    CheckpointStore,
    adamw,
    checkpoint_layers,
    ddp,
    load_state,
    newest_state,
    save_adapter,
    save_state,
    shard,
    tile_mlps,
)

from ..patching import models

ROWS = torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(5))
LAYERS = 2
# Adam divides by the gradient's size: with its usual 1e-8 an element whose gradient is rounding moves as
# others.
EPS = 1e-3


def adapted(pieces: str = "patched", lora_dropout: float = 0.0, **options: Any) -> nn.Module:
    """A tiny QLoRA model in training, with the named pieces of the library on it, always with the same
    weights."""
    model = models.lora(models.llama(layers=LAYERS, **options), lora_dropout=lora_dropout).train()
    if "patched" in pieces:
        peftkern.patch(model, fused_loss="loss" in pieces)
    if "tiles" in pieces:
        tile_mlps(model, tile=8)
    if "checkpoints" in pieces:
        store = CheckpointStore(
            Budgets(host=1 << 20), device="cpu", block_bytes=1024, min_tokens=1, min_elements=1
        )
        checkpoint_layers(model, store=store)
    return model


def rows_of(rank: int) -> Tensor:
    """This process's part of the global batch."""
    return ROWS.chunk(distributed.get_world_size())[rank]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, Any]:
    """The gathered gradients by the parameter's name without wrappers' prefixes, as arrays."""
    return {
        name.removeprefix("module."): whole(parameter.grad).numpy(force=True)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def step(model: nn.Module, rows: Tensor) -> dict[str, Any]:
    """The gradients after one forward and backward on `rows`."""
    model.zero_grad(set_to_none=True)
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    return gradients(model)


def furthest(got: dict[str, Any], expected: dict[str, Any]) -> float:
    """The greatest relative error of a gradient, in its norm; infinite where one is missing."""
    if got.keys() != expected.keys():
        return float("inf")
    distances = {name: ((got[name] - expected[name]) ** 2).sum() ** 0.5 for name in got}
    return max(float(distance / (expected[name] ** 2).sum() ** 0.5) for name, distance in distances.items())


def expected_gradients() -> dict[str, Any]:
    """Those of one process on the global batch, without any piece of the library."""
    return step(adapted(""), ROWS)


def ddp_errors(rank: int, pieces: tuple[str, ...]) -> dict[str, float]:
    """How far the gradients under DDP are from those of one process, by the pieces on the model; and where
    the adapters begin otherwise on each process."""
    expected = expected_gradients()
    errors = {}
    for names in pieces:
        model = adapted(names)
        if rank:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_()
        wrapped = ddp(model)
        errors[names] = max(furthest(step(wrapped, rows_of(rank)), expected) for _ in range(2))
    return errors


def packed_bytes(model: nn.Module) -> list[Any]:
    """The packed weights gathered, and their block maxima where those are in shards."""
    names = ("base_layer.weight", "base_layer.weight_absmax")
    return [
        whole(p).contiguous().view(torch.uint8).numpy(force=True)
        for n, p in model.named_parameters()
        if n.endswith(names)
    ]


def fsdp_errors(
    rank: int, pieces: tuple[str, ...], options: dict[str, Any], absmax: bool = True
) -> dict[str, Any]:
    """The same under FSDP2, with `options` of the model; whether the packed bytes are what they were; and
    bytes whole, here and on each process."""
    expected = step(adapted("", **options), ROWS)
    errors: dict[str, Any] = {}
    for names in pieces:
        model = adapted(names, **options)
        linears = [
            m.base_layer for m in model.modules() if hasattr(getattr(m, "base_layer", None), "quant_state")
        ]
        before = [
            tensor.contiguous().view(torch.uint8).clone().numpy()
            for linear in linears
            for tensor in (linear.weight.data, linear.quant_state.absmax)[: 1 + absmax]
        ]
        report = shard(model, absmax=absmax)
        errors[names] = max(furthest(step(model, rows_of(rank)), expected) for _ in range(2))
        after = packed_bytes(model)
        same = len(after) == len(before) and all((a == b).all() for a, b in zip(after, before, strict=True))
        errors[f"{names}: bytes"] = same
        errors[f"{names}: report"] = (report.bytes_whole, report.bytes_here, report.bytes_replicated)
    return errors


def bytes_here(rank: int, sizes: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    """Bytes that this process holds of a patched QLoRA Llama of rank 4; and of a decoder layer and of what is
    in no unit inside the root, gathered."""
    from ..memory.build import build, config

    model = build(config(**sizes), r=4)
    report = shard(model)
    layers = list(model.get_base_model().model.layers)
    gathered = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    embedding = model.get_base_model().get_input_embeddings().weight
    head = model.get_base_model().get_output_embeddings().weight
    outside = {id(p): p for p in model.parameters() if id(p) not in inside}
    if embedding is not head:
        del outside[id(embedding)]
    return (
        report.bytes_here + report.bytes_replicated,
        (max(gathered), sum(p.nbytes for p in outside.values())),
    )


def averages(rank: int) -> dict[str, Any]:
    """What gloo gives for ReduceOp.AVG in the collective that FSDP2 uses; and the gradient FSDP2 itself
    gives."""
    count = distributed.get_world_size()
    given = torch.full((count * 2,), float(rank + 1))
    out = torch.empty(2)
    try:
        distributed.reduce_scatter_tensor(out, given, op=distributed.ReduceOp.AVG)
        average = out.tolist()
    except (RuntimeError, ValueError) as error:
        average = str(error)
    layer = nn.Linear(1, 4, bias=False)
    shard(layer, layers=[layer])
    layer(torch.full((1, 1), float(rank + 1))).sum().backward()
    return {"gloo": average, "shard": whole(layer.weight.grad).flatten().tolist()}


def trained_model(way: str, dropout: float) -> nn.Module:
    """The model in training as `way` says (ddp, shard or alone), with an fp32 adapter."""
    model = adapted("patched", lora_dropout=dropout)
    if way == "shard":
        shard(model)
    return ddp(model) if way == "ddp" else model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int) -> None:
    """Updates on this process's part of the global batch."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=rows_of(rank), labels=rows_of(rank), use_cache=False).loss.backward()
        optimizer.step()


def adapter_of(model: nn.Module) -> dict[str, Any]:
    """The trained parameters gathered, as arrays."""
    named = model.named_parameters()
    return {
        n.removeprefix("module."): whole(p.detach()).clone().numpy(force=True)
        for n, p in named
        if p.requires_grad
    }


def save_and_go_on(rank: int, folder: str, way: str, dropout: float) -> dict[str, Any]:
    """Two updates, a checkpoint and the adapter's file, three more updates; the adapter then."""
    torch.manual_seed(rank)
    model = trained_model(way, dropout)
    optimizer = adamw(model, lr=1e-2, kind="adamw", eps=EPS)
    train(model, optimizer, rank, 2)
    save_state(folder, model, optimizer, step=2)
    save_adapter(model, f"{folder}/adapter")
    if not rank:
        files = sorted(path.name for path in Path(folder).iterdir())
        assert files == ["adapter", "step-2"], files
    saved = adapter_of(model)
    train(model, optimizer, rank, 3)
    return {"saved": saved, "end": adapter_of(model)}


def load_and_go_on(rank: int, folder: str, way: str, dropout: float) -> dict[str, Any]:
    """Another start, the checkpoint, three updates; the adapter then."""
    torch.manual_seed(99)
    model = trained_model(way, dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    optimizer = adamw(model, lr=1e-2, kind="adamw", eps=EPS)
    assert load_state(newest_state(folder), model, optimizer) == 2
    loaded = adapter_of(model)
    train(model, optimizer, rank, 3)
    return {"saved": loaded, "end": adapter_of(model)}


def optimizer_in_shards(rank: int) -> tuple[str, str, bool]:
    """The optimizer that a sharded model gets in the place of the paged 8-bit one, what was printed, and
    whether it trains."""
    model = trained_model("shard", 0.0)
    before = adapter_of(model)
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        optimizer = adamw(model, lr=1e-2)
    train(model, optimizer, rank, 2)
    moved = all((value != before[name]).any() for name, value in adapter_of(model).items())
    return type(optimizer).__name__, told.getvalue(), moved


def after_ddp(rank: int) -> list[float]:
    """A frozen weight, a trained one and a buffer, each the process's rank before, after `ddp` and a
    forward."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].requires_grad_(False)
    model.register_buffer("held", torch.tensor(float(rank)))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(rank)
    ddp(model)(torch.ones(1, 1))
    return [model[0].weight.item(), model[1].weight.item(), model.held.item()]
