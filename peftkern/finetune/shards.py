"""A run whose model lies in shards over the processes (`--shard`): torch's FSDP2, by `peftkern.memory.shard`,
under transformers' Trainer. A checkpoint's files are those of an unsharded run, so that either goes on with
the other's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from ..memory.sharding import Sharded, shard
from .errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

__all__ = ["ShardedMixin"]

_Result = TypeVar("_Result")


class ShardedMixin:
    """Put before the Trainer's class, and call `into_shards` when everything is on the model that will be,
    before training: the adapter of a checkpoint to go on from, too. Without that call it does nothing."""

    sharded: Sharded | None = None

    def into_shards(self) -> Sharded:
        """Give each process its part of the model. Returns the bytes.

        Raises: InputError where this torch cannot do it, or the model has no layers to gather one at a time.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import register_fsdp_forward_method

        mesh = init_device_mesh(self.args.device.type, (self.args.world_size,))
        try:
            self.sharded = shard(self.model, mesh=mesh)
        except ValueError as error:
            raise InputError(f"--shard: {error}") from error
        self.model._peftkern_within = lambda call: call()
        register_fsdp_forward_method(self.model, "_peftkern_within")
        _leave_unwrapped(self.accelerator)
        return self.sharded

    def within(self, call: Callable[[], _Result]) -> _Result:
        """What `call` returns, which runs parts of the model without calling the model itself: what lies
        outside the layers is gathered meanwhile. All processes call it."""
        if self.sharded is None:
            return call()
        result = self.model._peftkern_within(call)
        self.model.reshard()
        return result

    def adapter_state(self) -> dict[str, Tensor] | None:
        """The trained weights whole, by the names of the model's parameters, for `save_pretrained`; None
        where they are whole already. All processes call it; the first one gets the weights."""
        if self.sharded is None:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=options)

    # ---- what the Trainer calls

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's."""
        if self.sharded is None:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        state = self.adapter_state()
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = pytree.tree_map(_whole, self.optimizer.state_dict())
        with _instead(self.optimizer, "state_dict", lambda: state):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.sharded is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, load = self.optimizer, self.optimizer.load_state_dict
        with _instead(optimizer, "load_state_dict", lambda state: load(_in_shards(optimizer, state))):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        if self.sharded is None:  # else its adapter was taken before the model was sharded
            super()._load_from_checkpoint(checkpoint, model)

    def take_adapter(self, checkpoint: Path) -> None:
        """Take a checkpoint's adapter, before `into_shards`."""
        super()._load_from_checkpoint(str(checkpoint))


def _leave_unwrapped(accelerator: Accelerator) -> None:
    """Let accelerate prepare the model but for DistributedDataParallel and for moving it, and give the
    gradients' norm whole."""
    prepare, clip = accelerator.prepare_model, accelerator.clip_grad_norm_

    def prepare_model(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        return prepare(model, device_placement=False, evaluation_mode=True)

    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
        return _whole(clip(*args, **kwargs))

    accelerator.prepare_model, accelerator.clip_grad_norm_ = prepare_model, clip_grad_norm_


@contextlib.contextmanager
def _instead(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)


def _whole(value: Any) -> Any:
    """A tensor in shards gathered, anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _in_shards(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict of whole tensors with this process's part of each, as its parameter is in shards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=True))

    def part(value: Any, parameter: Tensor) -> Any:
        if not (isinstance(value, Tensor) and isinstance(parameter, DTensor)):
            return value
        if value.shape != parameter.shape:
            return value
        there = value.to(parameter.device)
        return distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)

    return state | {
        "state": {
            number: {key: part(value, of_number[number]) for key, value in values.items()}
            for number, values in state["state"].items()
        }
    }
