"""Where a model's residual additions are, and at which module an adapter of each kind acts on what is added.

No family is named: a sublayer is what one residual addition adds. It is attention where tokens were mixed,
cross-attention where one of its linears read something else than the stream, an MLP otherwise. The adapter
acts on the output of the outermost module that gave what is added, so that it lies before a post-norm
layer's norm, and after a norm that a layer puts on its sublayer's output.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .trace import Call, LinearCall, Node, ResidualSum, Trace, trace

__all__ = ["Place", "Reader", "find_places"]


@dataclass(frozen=True)
class Reader:
    """Where the sublayer's input is seen: at the argument `name` (position `index`) of the module `path`;
    and the path of the module onto whose output a branch from there is added, the same one where that gives
    what the residual addition adds."""

    path: str
    name: str
    index: int
    added_at: str


@dataclass(frozen=True)
class Place:
    """A sublayer of layer number `layer`, of a `kind` of `config.PLACES`, on activations of `width` channels.

    output: the path of the module whose output (the first of its tuple, where it gives one) is what is
    added; input: where the sublayer's input is seen, None where no module is given it; sum: the path of the
    module whose output is the stream after the addition or, with `normed`, of the norm that takes it at
    once; None where there is none.
    """

    layer: int
    kind: str
    width: int
    output: str
    input: Reader | None
    sum: str | None
    normed: bool


def find_places(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> tuple[Place, ...]:
    """The sublayers of a model, in the order in which they run.

    Args:
        model: any module whose layers add what they compute onto their input; its weights are not used.
        example_inputs: keyword arguments of a forward pass, best of a few tokens. Default: token ids or an
            image, as the configuration of a transformers model says.
    Raises: ValueError where no example is known, the forward fails on it, or nothing is added to a stream.
    """
    inputs = dict(example_inputs) if example_inputs is not None else _example(model)
    try:
        seen = trace(model, inputs)
    except Exception as error:  # a model may raise anything
        raise ValueError(
            f"model: {type(model).__name__} could not be run on {_described(inputs)} to see where its"
            f" residual additions are: {type(error).__name__}: {error}. Give example_inputs, keyword"
            " arguments of a small forward pass"
        ) from error
    places = tuple(_places(model, seen))
    if not places:
        raise ValueError(
            f"model: {type(model).__name__} has no residual addition of what a module computes, so no place"
            " for a bottleneck"
        )
    return places


def _example(model: nn.Module) -> dict[str, Any]:
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    if name == "input_ids":
        ids = torch.full((1, 4), 2, dtype=torch.long, device=device)
        encoder_decoder = getattr(config, "is_encoder_decoder", False)
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if encoder_decoder else {})
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if name == "pixel_values" and size is not None and channels is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return {
            "pixel_values": torch.zeros(
                1, channels, height, width, dtype=getattr(model, "dtype", None), device=device
            )
        }
    why = f"its main input is {name}" if name else "it has no main_input_name"
    raise ValueError(
        f"example_inputs: what {type(model).__name__} takes is not known ({why}): give keyword arguments of a"
        " small forward pass"
    )


def _described(inputs: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {tuple(value.shape)}" if isinstance(value, Tensor) else key for key, value in inputs.items()
    )


def _places(model: nn.Module, seen: Trace) -> list[Place]:
    added = [(one, leaf, _kind(seen, one, leaf)) for one in seen.sums for leaf in _summands(one.added)]
    uses: dict[str, list[str]] = {}
    for _, leaf, kind in added:
        for call in _calls(leaf):
            uses.setdefault(call.path, []).append(kind)
    counts: dict[str, int] = {}
    for call in seen.calls:
        counts[call.path] = counts.get(call.path, 0) + 1
    own = {path for path, kinds in uses.items() if len(set(kinds)) == 1 and len(kinds) == counts[path]}
    stacks, places, taken = _Stacks(model), [], set()
    for one, leaf, kind in added:
        candidates = [call for call in reversed(_calls(leaf)) if call.path in own]
        if not candidates or candidates[0].path in taken:  # a module that many layers share has one adapter
            continue
        place = _place(seen, stacks, one, leaf, kind, candidates)
        taken.add(place.output)
        places.append(place)
    return places


def _place(
    seen: Trace, stacks: _Stacks, one: ResidualSum, leaf: Node, kind: str, candidates: list[Call]
) -> Place:
    first, output, reader = _input(seen, one, leaf), candidates[0], None
    if first is not None:
        whole = next(
            (found for found in candidates if _argument(found, first.before, found.path) is not None), None
        )
        reader = _argument(whole, first.before, whole.path) if whole else _reader(seen, first, output)
    path, normed = _sum_module(seen, one)
    return Place(stacks.number(output.path), kind, leaf.shape[-1], output.path, reader, path, normed)


def _summands(node: Node) -> list[Node]:
    """What is added, as modules give it: the whole where a module gave it, else the parts of a sum
    (attention and MLP side by side)."""
    if _calls(node) or len(node.leaves) == 1:
        return [node]
    return [leaf for part in node.leaves for leaf in _summands(part)]


def _calls(node: Node) -> list[Call]:
    """The calls that gave the activation, or the one it is a scaled copy of: innermost first."""
    while not node.calls and node.source is not None:
        node = node.source
    return node.calls


def _kind(seen: Trace, one: ResidualSum, leaf: Node) -> str:
    if not leaf.mixes:
        return "mlp"
    read = [linear.before for linear in seen.linears if linear.after.uid in leaf.ancestors]
    own = sum(_of_stream(before, one) for before in read)
    foreign = sum(
        before.depth == 0 and not one.stream.bases & (before.ancestors | before.bases) for before in read
    )
    return "cross_attention" if own == 1 and foreign else "attention"  # queries alone are of the stream


def _of_stream(before: Node, one: ResidualSum) -> bool:
    """Whether an activation is the stream, or its norm."""
    return before.depth == one.stream.depth and bool(one.stream.bases & (before.ancestors | before.bases))


def _input(seen: Trace, one: ResidualSum, leaf: Node) -> LinearCall | None:
    """The sublayer's first linear, which reads what the sublayer reads of the stream."""
    for linear in seen.linears:
        into = linear.after.uid in leaf.ancestors or linear.after is leaf
        if into and _of_stream(linear.before, one) and linear.before.shape.numel() == leaf.shape.numel():
            return linear
    return None


def _argument(call: Call, source: Node, added_at: str) -> Reader | None:
    """The argument by which the module is given the activation."""
    key = next((key for key, node in call.inputs.items() if node.uid == source.uid), None)
    if key is None:
        return None
    try:
        names = list(inspect.signature(type(call.module).forward).parameters)[1:]
    except (TypeError, ValueError):
        names = []
    if isinstance(key, int):
        return Reader(call.path, names[key] if key < len(names) else "", key, added_at)
    return Reader(call.path, key, names.index(key) if key in names else -1, added_at)


def _reader(seen: Trace, first: LinearCall, output: Call) -> Reader | None:
    """The outermost module around the sublayer's first linear, and beside the one of the output, that is
    given the sublayer's input."""
    around = [call for call in seen.calls if f"{first.path}.".startswith(f"{call.path}.") and call.path]
    for call in sorted(around, key=lambda call: len(call.path)):
        apart = not f"{output.path}.".startswith(f"{call.path}.")
        reader = _argument(call, first.before, output.path) if apart else None
        if reader is not None:
            return reader
    return None


def _sum_module(seen: Trace, one: ResidualSum) -> tuple[str | None, bool]:
    """The innermost module whose output the stream is after the addition, or else the norm that alone takes
    it and begins the stream anew, and whether it is that."""
    if one.result.calls:
        return one.result.calls[0].path, False
    if any(one.result is later.stream for later in seen.sums):
        return None, False
    takers = [call for call in seen.calls if any(node.uid == one.result.uid for node in call.inputs.values())]
    leaves = [call for call in takers if not call.module._modules and not call.as_tuple]
    return (leaves[0].path, True) if len(leaves) == 1 else (None, False)


class _Stacks:
    """Numbers of layers: elements of the outermost lists on the modules' paths, counted in the order in
    which they come."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.numbers = model, {}

    def number(self, path: str) -> int:
        """The number of the layer that holds the module."""
        parent, parts = self.model, path.split(".")
        prefix = path
        for depth, part in enumerate(parts):
            if part.isdigit() and isinstance(parent, (nn.ModuleList, nn.Sequential)):
                prefix = ".".join(parts[: depth + 1])
                break
            parent = parent._modules.get(part) or getattr(parent, part)
        return self.numbers.setdefault(prefix, len(self.numbers))
