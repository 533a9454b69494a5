"""Frozen layers on the host: their weights, packed to 4 bits or dense, are streamed through two slots on the
device in the direction that the computation goes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.nf4 import NF4Weight
from .checkpoint import stacks_of
from .host import host_available, pinned_limit
from .pinning import pin, unpin, whole_pages
from .streams import Streams, streams_for

__all__ = ["HostLayers", "is_streamed", "layers_on_host"]

_ALIGN = 256
MIN_BYTES = 64 << 10
_PACKED = ("packed", "absmax", "absmax_8bit", "nested_absmax")  # of NF4Weight, what is large


@dataclass
class _Place:
    """A frozen tensor of a layer that is streamed. write: puts a tensor there. key: its name in the layer's
    state_dict, None where it is not in it. original: the device it came from; at: where in the layer's bytes
    it begins."""

    key: str | None
    tensor: Tensor | None
    write: Callable[[Tensor], None]
    original: torch.device
    shape: torch.Size
    dtype: torch.dtype
    at: int = 0

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def within(self, data: Tensor) -> Tensor:
        """Its part of uint8 [layer's bytes]. `.data`: what is written to the slot later is no change that
        autograd must forbid, as the same bytes are there again when backward reads them."""
        return data[self.at : self.at + self.nbytes].view(self.dtype).view(self.shape).data


def layers_on_host(
    model: nn.Module,
    *,
    device: torch.device | str = "cuda",
    layers: Sequence[nn.Module] | None = None,
    host: int | None = None,
    pinned: int | None = None,
    min_bytes: int = MIN_BYTES,
    streams: Streams | None = None,
) -> HostLayers:
    """Keep the frozen weights of decoder layers on the host, and on the device those of the layer that runs
    and of the next.

    A layer's weights are copied on a side stream while its neighbour computes: in forward the following
    layer's, in backward the preceding one's. It works with and without checkpointing, and changes no number.
    Trainable parameters, buffers and small tensors (norms) are moved to the device and stay. What is
    streamed is right while its layer runs, and in `state_dict`; to merge, to quantize or to read weights
    elsewhere, `remove` first.

    Args:
        model: bitsandbytes 4-bit, NF4Weight or dense layers, on the host or on the device, with or without
            PEFT and `peftkern.patch`.
        device: where it computes.
        layers: which modules, in the order in which they run; default: the longest stack that transformers
            knows.
        host: bytes of host memory it may take; default: what the machine and the cgroup have available.
        pinned: bytes of these that may be pinned (exactly the layers' size is); default: what is sensible
            here. A layer that is not pinned is copied while the host waits.
        min_bytes: smaller tensors stay on the device.
        streams: how copies and the computation wait for each other; the device's own where it is not given.
    Returns: a handle with `remove` and `report`; also a context manager.
    Raises: ValueError where nothing is frozen, or `host` is smaller than the layers, with their size.
    """
    if layers is None:
        stacks = sorted(stacks_of(model), key=len)
        layers = stacks[-1] if stacks else []
    if len(layers) < 2:
        raise ValueError(
            f"layers: got {len(layers)} of {type(model).__name__}, expected at least two that run one"
            " after the other; pass `layers`"
        )
    return HostLayers(list(layers), torch.device(device), host, pinned, min_bytes, streams)


class HostLayers:
    """What `layers_on_host` did to a model; `remove`, or the end of a `with` block, undoes it.

    Two slots: layer i is always in slot i % 2, so that its parameters have one address for good, which
    nothing that was kept (a view, a tensor saved for backward) can miss.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        device: torch.device,
        host: int | None,
        pinned: int | None,
        min_bytes: int,
        streams: Streams | None,
    ) -> None:
        self.layers, self.device = layers, device
        self.streams = streams or streams_for(device)
        self._places = _survey(layers, min_bytes)
        sizes = [_lay_out(places) for places in self._places]
        self._check(sizes, host)
        self._data = [self._to_host(places, size) for places, size in zip(self._places, sizes, strict=True)]
        self.pinned_bytes = self._pin(pinned)
        self._slots = [torch.empty(max(sizes[n::2]), dtype=torch.uint8, device=device) for n in range(2)]
        self._loaded, self._filled = [-1, -1], [None, None]
        for index, places in enumerate(self._places):
            for place in places:
                place.write(place.within(self._slots[index % 2]))
        for layer in layers:
            _rest_to(layer, device)
            _look_again(layer)
        self._hooks = [hook for index in range(len(layers)) for hook in self._watch(index)]

    def _check(self, sizes: list[int], host: int | None) -> None:
        if not sum(sizes):
            raise ValueError("model: its layers have no frozen weight that is large enough to be streamed")
        on_host = all(place.original.type == "cpu" for places in self._places for place in places)
        least, room = sum(sizes), host_available() + (sum(sizes) if on_host else 0)
        if least > (room if host is None else host):
            where = f"{room} bytes are available" if host is None else f"got a budget of {host} bytes"
            raise ValueError(
                f"host: {where}, but the frozen weights of {len(sizes)} layers take {least} bytes"
            )

    def _to_host(self, places: list[_Place], nbytes: int) -> Tensor:
        """A layer's bytes, uint8 on the host, behind each other; what held them lets go of them."""
        data = whole_pages(nbytes)
        for place in places:
            target = place.within(data)
            target.copy_(place.tensor)
            place.write(target)
            place.tensor = None
        return data

    def _pin(self, budget: int | None) -> int:
        """Pin layers while the budget lasts; how many bytes are."""
        if self.device.type != "cuda":
            return 0
        budget = (
            pinned_limit(host_available() + sum(data.nbytes for data in self._data))
            if budget is None
            else budget
        )
        done = 0
        for data in self._data:
            if done + data.nbytes > budget or not pin(data, self.device):
                break
            done += data.nbytes
        return done

    def _watch(self, index: int) -> Iterator[Any]:
        layer = self.layers[index]
        yield layer.register_forward_pre_hook(_Hook(self, "enter", index))
        yield layer.register_forward_hook(_Hook(self, "leave", index))
        yield layer.register_state_dict_post_hook(_Hook(self, "save", index))

    # ---- the stream of layers

    def enter(self, index: int, *_: Any) -> None:
        """A layer's forward begins."""
        self._load(index)
        if _in_backward():
            return  # it is computed again: what comes next is the layer before
        if index + 1 < len(self.layers):
            self._fill(index + 1)
        elif index % 2 and not torch.is_grad_enabled():  # with gradients the last layer's backward follows
            self._fill(0)

    def leave(self, index: int, _module: Any, _args: Any, output: Any) -> None:
        """A layer's forward has ended: its backward begins where a gradient reaches what it gave."""
        if _in_backward():
            return
        outputs = output if isinstance(output, (tuple, list)) else [output]
        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(functools.partial(self._return, index))

    def _return(self, index: int, _gradient: Tensor) -> None:
        self._load(index)
        if index:
            self._fill(index - 1)

    def _fill(self, index: int) -> None:
        """Begin to copy a layer into its slot, once all that was computed so far is done: the layer before
        in it is among that."""
        slot, streams = index % 2, self.streams
        if self._loaded[slot] == index:
            return
        streams.wait(streams.copy, streams.record(streams.current()))
        data = self._data[index]
        streams.move(self._slots[slot][: data.nbytes], data)
        self._filled[slot] = (streams.record(streams.copy),)
        self._loaded[slot] = index

    def _load(self, index: int) -> None:
        """Let the computing stream wait until the layer is in its slot."""
        self._fill(index)
        slot = index % 2
        if self._filled[slot] is not None:
            self.streams.wait(self.streams.current(), self._filled[slot][0])
            self._filled[slot] = None

    # ---- from outside

    def save(self, index: int, _module: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Into a state_dict goes what is on the host, not what happens to be in the slot."""
        for place in self._places[index]:
            if place.key is not None and f"{prefix}{place.key}" in state_dict:
                state_dict[f"{prefix}{place.key}"] = place.within(self._data[index])

    def report(self) -> dict[str, int]:
        """Bytes: on the host, of these pinned, and of the device's two slots."""
        return {
            "host": sum(data.nbytes for data in self._data),
            "pinned": self.pinned_bytes,
            "device": sum(slot.nbytes for slot in self._slots),
        }

    def remove(self) -> None:
        """Give every layer its weights back, on the device where they were."""
        for hook in self._hooks:
            hook.remove()
        for places, data in zip(self._places, self._data, strict=True):
            for place in places:
                held = place.within(data)
                place.write(held.clone() if place.original.type == "cpu" else held.to(place.original))
            unpin(data, self.device)
        for layer in self.layers:
            _look_again(layer)
        self._hooks, self._places, self._data, self._slots, self.pinned_bytes = [], [], [], [], 0

    def __enter__(self) -> HostLayers:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Hook:
    """A method of a HostLayers as a layer's hook. It is neither copied nor pickled: a copy's slots would be
    others."""

    def __init__(self, owner: HostLayers, name: str, index: int) -> None:
        self.call = functools.partial(getattr(owner, name), index)

    def __call__(self, *args: Any) -> None:
        self.call(*args)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model whose layers are on the host is neither copied nor pickled; call remove() first"
        )


def is_streamed(layer: nn.Module) -> bool:
    """Whether a HostLayers streams the layer's weights."""
    return any(isinstance(hook, _Hook) for hook in layer._forward_pre_hooks.values())


def _in_backward() -> bool:
    """Whether autograd is running in this thread. Checkpointing that calls layers as modules (transformers'
    up to 5.17) runs their hooks again there."""
    return torch._C._current_graph_task_id() != -1


# ---- what a layer has


def _survey(layers: list[nn.Module], min_bytes: int) -> list[list[_Place]]:
    """The frozen large tensors of each layer, but those that two layers share."""
    found = [[place for place in _frozen(layer) if place.nbytes >= min_bytes] for layer in layers]
    seen: dict[int, int] = {}
    for index, places in enumerate(found):
        for place in places:
            if seen.setdefault(place.tensor.data_ptr(), index) != index:
                seen[place.tensor.data_ptr()] = -1
    return [
        [place for place in places if seen[place.tensor.data_ptr()] == index and place.tensor.is_contiguous()]
        for index, places in enumerate(found)
    ]


def _frozen(layer: nn.Module) -> Iterator[_Place]:
    for prefix, module in layer.named_modules():
        at = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.requires_grad:
                continue
            yield _place(f"{at}{name}", parameter.data, functools.partial(_set_data, parameter))
            for state in _states(module, parameter):
                yield from _of_state(f"{at}{name}", state)
        for name, value in list(module.__dict__.items()):
            if isinstance(value, NF4Weight):
                yield from _of_packed(module, name, value)


def _place(key: str | None, tensor: Tensor, write: Callable[[Tensor], None]) -> _Place:
    return _Place(key, tensor, write, tensor.device, tensor.shape, tensor.dtype)


def _set_data(parameter: nn.Parameter, tensor: Tensor) -> None:
    parameter.data = tensor


def _states(module: nn.Module, parameter: nn.Parameter) -> list[Any]:
    """bitsandbytes' quantization states of a parameter: its own, and the module's where that is another."""
    held = [getattr(parameter, "quant_state", None)]
    if parameter is module._parameters.get("weight"):
        held.append(getattr(module, "quant_state", None))
    return list({id(state): state for state in held if state is not None}.values())


def _of_state(key: str, state: Any) -> Iterator[_Place]:
    inner = getattr(state, "state2", None)
    yield _place(f"{key}.absmax", state.absmax, functools.partial(setattr, state, "absmax"))
    if inner is not None:
        yield _place(f"{key}.nested_absmax", inner.absmax, functools.partial(setattr, inner, "absmax"))


def _of_packed(module: nn.Module, name: str, weight: NF4Weight) -> Iterator[_Place]:
    for field in _PACKED:
        tensor = getattr(weight, field)
        if tensor is not None:
            yield _place(None, tensor, functools.partial(_set_field, module, name, field))


def _set_field(module: nn.Module, name: str, field: str, tensor: Tensor) -> None:
    """A new NF4Weight without a check: between two calls its tensors may be on two devices."""
    old = getattr(module, name)
    new = object.__new__(NF4Weight)
    for item in dataclasses.fields(NF4Weight):
        object.__setattr__(new, item.name, tensor if item.name == field else getattr(old, item.name))
    setattr(module, name, new)


def _lay_out(places: list[_Place]) -> int:
    """Give each its offset; the bytes of all."""
    end = 0
    for place in places:
        place.at = end
        end += -(-place.nbytes // _ALIGN) * _ALIGN
    return end


def _rest_to(layer: nn.Module, device: torch.device) -> None:
    """Move what is not streamed to the device: the rest of the parameters and of their states, and the
    buffers."""
    for module in layer.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if parameter.device.type != device.type:
                parameter.data = parameter.data.to(device)
            for state in _states(module, parameter):
                _state_to(state, device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
        for name, value in list(module.__dict__.items()):
            if isinstance(value, NF4Weight):
                setattr(module, name, value.to(device))


def _look_again(layer: nn.Module) -> None:
    """Let what `peftkern.patch` put there see the weights where they are now: it holds the last ones that it
    saw."""
    from ..patching.forwards import find
    from ..patching.weights import WeightCache, is_4bit

    for module in layer.modules():
        held, base = find(module), getattr(module, "base_layer", module)
        if held is None:
            continue
        if isinstance(held[1].cache, WeightCache) and is_4bit(base):
            held[1].cache.view(base)
        held[1].let_go()


def _state_to(state: Any, device: torch.device) -> None:
    inner = getattr(state, "state2", None)
    for owner, names in ((state, ("absmax", "code", "offset")), (inner, ("absmax", "code"))):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, Tensor):
                setattr(owner, name, value.to(device))
