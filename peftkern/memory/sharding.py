"""A quantized model over several processes, by torch's own means: DistributedDataParallel without the frozen
base's broadcast, and FSDP2 (`fully_shard`) with the packed weights in shards.

Every function is called by all processes of the group, after `torch.distributed.init_process_group`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from ..patching.weights import is_4bit, repacked, unpack
from .checkpoint import stacks_of
from .host_layers import is_streamed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel

__all__ = ["Sharded", "ddp", "ignore_frozen", "shard"]

_INTEGERS_FROM = (2, 12)  # the first torch whose FSDP2 shards integer parameters


@dataclass(frozen=True)
class Sharded:
    """What `shard` did: bytes of parameters whole and on this process, and what each process holds whole.

    units: how many groups of parameters are gathered at a time; largest_unit: bytes of the largest of them,
    gathered.
    """

    processes: int
    units: int
    bytes_whole: int
    bytes_here: int
    bytes_replicated: int
    largest_unit: int

    def __str__(self) -> str:
        return (
            f"{self.bytes_whole} bytes in shards over {self.processes} processes, {self.bytes_here} of "
            "them here;"
            f" {self.bytes_replicated} bytes of quantization states whole on each; {self.units} units, "
            "of which"
            f" the largest takes {self.largest_unit} bytes while it is gathered"
        )


# ---- DDP


def ignore_frozen(model: nn.Module) -> int:
    """Let a later DistributedDataParallel(model), also accelerate's, leave alone whatever is not trained.

    It would broadcast the frozen base when it is made, though every process has loaded the same files.
    Returns the bytes that are not sent: all but the trained parameters, the buffers among them.
    """
    from torch.nn.parallel import DistributedDataParallel

    frozen = {name: p for name, p in _tensors(model) if not (isinstance(p, nn.Parameter) and p.requires_grad)}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(frozen))
    return sum(_bytes(tensor) for tensor in {id(t): t for t in frozen.values()}.values())


def ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """torch's DistributedDataParallel of which the trained parameters alone are broadcast, from rank 0.

    Each process loads the same base; what is trained becomes rank 0's. Gradients share the reducer's buckets,
    and buffers are not sent. `find_unused_parameters` is not needed, with
    `peftkern.patch`, `checkpoint_layers` and `tile_mlps` neither: each trained parameter gets one gradient.

    Args:
        model: on its device already; patched before or after.
        options: of DistributedDataParallel (device_ids, say), before ours.
    Raises: ValueError where no process group is initialized or nothing in the model is trained.
    """
    from torch.nn.parallel import DistributedDataParallel

    _require_group()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model: no parameter of {type(model).__name__} requires grad; add an adapter first")
    ignore_frozen(model)
    return DistributedDataParallel(model, **{"gradient_as_bucket_view": True} | options)


# ---- FSDP2


def shard(
    model: nn.Module,
    *,
    mesh: DeviceMesh | None = None,
    layers: Sequence[nn.Module] | None = None,
    absmax: bool = True,
    **options: Any,
) -> Sharded:
    """Give each process its part of every parameter, packed 4-bit weights included, by torch's FSDP2.

    A decoder layer is one unit: its packed bytes and its adapters are gathered together before its forward
    and backward, and freed after them. An embedding of its own is one more. The rest (final norm, head) is
    gathered for the whole step, because a fused loss reads the head's weight. Gradients are averaged over the
    processes: give each the same share of the loss's tokens, or scale the losses.

    The model may lie on the host while `mesh` is of GPUs: each unit is moved when its turn comes, so that a
    GPU holds its shards and one unit. Call it after loading, the adapter and `peftkern.patch`, before the
    optimizer is made; `model` is the module that the training loop calls (PEFT's, not the one inside).
    Sharding cannot be undone.

    Args:
        mesh: one-dimensional, or two-dimensional for replicas of shards; default: all processes.
        layers: the units; default: every layer that transformers can checkpoint.
        absmax: also shard the block maxima of 4-bit weights; else each process keeps them whole.
        options: of `fully_shard` (mp_policy, offload_policy, reshard_after_forward).
    Returns: how many bytes this process holds.
    Raises: ValueError where no process group is initialized, where there are no layers, where this torch
        cannot shard the weights' storage, where trained parameters of a unit differ in dtype, or where layers
        or the embedding are on the host.
    """
    _require_group()
    _require_on_device(model)
    units = list(layers) if layers is not None else [layer for stack in stacks_of(model) for layer in stack]
    if not units:
        raise ValueError(
            f"model: {type(model).__name__} has no layers that transformers can checkpoint; pass `layers`,"
            " the modules to be gathered one at a time"
        )
    units = [*(unit for unit in units if unit is not model), *_embeddings(model, units), model]
    linears = [module for module in model.modules() if is_4bit(module) and module.quant_state is not None]
    _check_storage(linears, absmax)
    _check_dtypes(units)
    for linear in linears:
        _plain_weight(linear, absmax)
    sizes = [sum(map(_bytes, _own(unit, units))) for unit in units]
    mesh = _mesh(model) if mesh is None else mesh
    _fully_shard(units, mesh, options)
    for linear in linears:
        _states_to(linear.quant_state, _device(mesh), absmax)
    for owner in model.modules():
        if getattr(owner, "hf_device_map", None):  # which trainers compare with their own device
            owner.hf_device_map = {"": "cpu" if mesh.device_type == "cpu" else torch.cuda.current_device()}
    for unit in units if absmax else ():
        if held := [
            module for module in _modules(unit, units) if is_4bit(module) and _ABSMAX in module._parameters
        ]:
            unit.register_forward_pre_hook(_Absmax(held))
    here = sum(_bytes(parameter.to_local()) for parameter in model.parameters())
    replicated = sum(_state_bytes(linear.quant_state, absmax) for linear in linears)
    return Sharded(mesh.size(), len(units), sum(sizes), here, replicated, max(sizes))


_ABSMAX = "weight_absmax"


class _Absmax:
    """Before a unit's forward, after it was gathered: the quantization states have its block maxima."""

    def __init__(self, linears: list[nn.Module]) -> None:
        self.linears = linears

    def __call__(self, *_: Any) -> None:
        for linear in self.linears:
            linear.quant_state.absmax = linear._parameters[_ABSMAX]


def _fully_shard(units: list[nn.Module], mesh: DeviceMesh, options: dict[str, Any]) -> None:
    from torch.distributed.fsdp import fully_shard

    for unit in units:
        fully_shard(unit, mesh=mesh, **options)
    if mesh.device_type == "cpu":
        for unit in units:  # gloo has had an average that was a sum; this divides sums
            unit.set_force_sum_reduction_for_comms(True)


def _mesh(model: nn.Module) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    device = next(model.parameters()).device.type
    return init_device_mesh(device, (distributed.get_world_size(),))


def _plain_weight(linear: nn.Module, absmax: bool) -> None:
    """The packed bytes as a plain parameter, for FSDP's shards are plain; the layer keeps the state."""
    if repacked(linear):
        unpack(linear)
    state = linear.quant_state = getattr(linear.weight, "quant_state", None) or linear.quant_state
    packed = linear.weight.data.as_subclass(torch.Tensor)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.support_avx512bf16_for_cpu = False  # bitsandbytes would replace the gathered bytes by others
    if absmax:
        linear.register_parameter(_ABSMAX, nn.Parameter(state.absmax, requires_grad=False))


def _states_to(state: Any, device: torch.device, absmax_sharded: bool) -> None:
    """Move what no parameter holds of a quantization state. Sharded block maxima are set before each
    forward."""
    state.code = state.code.to(device)
    state.absmax = state.absmax.new_empty(0) if absmax_sharded else state.absmax.to(device)
    if state.nested:
        inner, state.offset = state.state2, state.offset.to(device)
        inner.code, inner.absmax = inner.code.to(device), inner.absmax.to(device)


def _device(mesh: DeviceMesh) -> torch.device:
    return torch.device(mesh.device_type, torch.cuda.current_device() if mesh.device_type == "cuda" else None)


def _check_storage(linears: list[nn.Module], absmax: bool) -> None:
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    stored = [linear.weight for linear in linears] + [
        linear.quant_state.absmax for linear in linears if absmax
    ]
    kept = {tensor.dtype for tensor in stored if not tensor.is_floating_point()}
    if kept and version < _INTEGERS_FROM:
        raise ValueError(
            f"model: its 4-bit weights are stored as {', '.join(map(str, kept))}, which FSDP2 of torch"
            f" {torch.__version__} cannot shard; use torch >= 2.12, or load the model with"
            " BitsAndBytesConfig(bnb_4bit_quant_storage=torch.bfloat16) and call shard(model, absmax=False)"
        )


def _require_on_device(model: nn.Module) -> None:
    """FSDP2 gathers a layer into memory of its own, where neither slots nor a lookup on the host reach."""
    for name, module in model.named_modules():
        looked_up = type(module) is nn.Embedding and "forward" in module.__dict__
        if looked_up or is_streamed(module):
            what = "layers_on_host" if is_streamed(module) else "embedding_on_host"
            raise ValueError(
                f"model: {name} was put on the host by {what}, and FSDP2 gathers shards on the device alone:"
                " remove() it before shard(model), or keep the model whole in each process, with ddp(model)"
            )


def _check_dtypes(units: list[nn.Module]) -> None:
    for unit in units:
        dtypes = {parameter.dtype for parameter in _own(unit, units) if parameter.requires_grad}
        if len(dtypes) > 1:
            raise ValueError(
                f"model: the trained parameters of a {type(unit).__name__} are of "
                f"{', '.join(sorted(map(str, dtypes)))};"
                " FSDP2 wants one dtype: convert them, for example to torch.float32"
            )


def _embeddings(model: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    """Embeddings outside the units whose weight no other module shares."""
    inside = {id(module) for unit in units for module in unit.modules()}
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found = (
        module for module in model.modules() if type(module) is nn.Embedding and id(module) not in inside
    )
    return [module for module in found if holders[id(module.weight)] == 1]


def _modules(unit: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    """The modules in a unit that are in no unit inside it."""
    inner = {id(module) for other in units if other is not unit for module in other.modules()}
    inner = inner if unit is units[-1] else set()
    return [module for module in unit.modules() if id(module) not in inner]


def _own(unit: nn.Module, units: list[nn.Module]) -> list[nn.Parameter]:
    modules = _modules(unit, units)
    return list(
        {id(p): p for module in modules for p in module._parameters.values() if p is not None}.values()
    )


def _state_bytes(state: Any, absmax_sharded: bool) -> int:
    """Bytes of a quantization state that every process holds."""
    inner = state.state2 if state.nested else None
    tensors = [state.code, *((inner.absmax, inner.code, state.offset) if inner is not None else ())]
    return sum(map(_bytes, tensors)) + (0 if absmax_sharded else _bytes(state.absmax))


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _require_group() -> None:
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "no process group: start with `torchrun --nproc-per-node N` and call"
            " torch.distributed.init_process_group() first"
        )
