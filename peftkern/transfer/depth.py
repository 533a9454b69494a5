"""The depth of each parameter of a model, read from where its module stands: embeddings 0, layers 1 to L,
what follows them L + 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["LayerStack", "below", "layer_stacks", "parameter_depths"]

# Beginnings of names that come after the layers even where they are registered before them (OPT's
# final_layer_norm).
_LATE = ("final", "post", "project_out", "proj_out")


@dataclass(frozen=True)
class LayerStack:
    """Layers that run one after the other.

    names   the layers' names in `model.named_modules()`, in order
    layers  the layers
    owner   the module whose forward runs them
    first   the index of its first layer among all layers of the model
    """

    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    owner: nn.Module
    first: int

    @property
    def path(self) -> str:
        """The name of the container of the layers."""
        return self.names[0].rpartition(".")[0]


def layer_stacks(model: nn.Module, layers: str | Sequence[str] | None = None) -> tuple[LayerStack, ...]:
    """The stacks of layers of a model, in the order in which they are registered (an encoder before its
    decoder).

    A stack is an outermost nn.ModuleList of blocks, that is, of modules with children; in a model without
    any, an outermost nn.Sequential of two or more modules; in one without these, an outermost nn.ModuleList
    of single layers.

    Args:
        model: any module, also one wrapped by PEFT.
        layers: names of the containers (as in `named_modules`, or their ends: "encoder.layer"), instead of
            looking for them.
    Raises: ValueError where there is none, or a name is the end of no container's name.

    >>> layer_stacks(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))[0].names
    ('0', '1')
    """
    kinds = (_is_list, _is_sequence, _is_plain_list)
    found = (_named(model, layers),) if layers is not None else (_outermost(model, kind) for kind in kinds)
    paths = next((each for each in found if each), [])
    if not paths:
        raise ValueError(
            f"model: {type(model).__name__} has no nn.ModuleList and no nn.Sequential, "
            "so its layers have no order: name the "
            "container of its layers by layers="
        )
    stacks: list[LayerStack] = []
    for path in paths:
        children = dict(model.get_submodule(path).named_children())
        names = tuple(f"{path}.{name}" if path else name for name in children)
        owner = model.get_submodule(path.rpartition(".")[0])
        stacks.append(
            LayerStack(names, tuple(children.values()), owner, sum(len(stack.layers) for stack in stacks)),
        )
    return tuple(stacks)


def parameter_depths(model: nn.Module, *, layers: str | Sequence[str] | None = None) -> dict[str, int]:
    """The depth of every parameter, by its name in `model.named_parameters()`.

    The parameters of layer i (from 0) have depth i + 1, those of adapters on it as well. Outside the layers:
    0 for embeddings and what is registered before the first layer, L + 1 for the head and what is registered
    after the last, and between two stacks the number of the layers before. A tensor that several modules
    share (a tied head) is named once and has the smallest of its depths.

    Args: as `layer_stacks`.
    Raises: ValueError as `layer_stacks`.

    >>> parameter_depths(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False)))
    {'0.weight': 1, '0.bias': 1, '1.weight': 2}
    """
    stacks = layer_stacks(model, layers)
    within = {name: stack.first + index + 1 for stack in stacks for index, name in enumerate(stack.names)}
    total, passed, head = len(within), 0, _head_name(model)
    depths: dict[int, int] = {}
    # Modules under every one of their names: a head tied as a module would otherwise be seen once.
    for path, module in model.named_modules(remove_duplicate=False):
        passed = max(passed, _layers_up_to(path, stacks))
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{leaf}" if path else leaf
            depth = next((within[start] for start in _starts(name) if start in within), None)
            if depth is None:
                of_head = head is not None and f"{path}.".startswith(f"{head}.")
                depth = total + 1 if of_head else _outside(name, module, passed, total)
            depths[id(parameter)] = min(depth, depths.get(id(parameter), depth))
    return {name: depths[id(parameter)] for name, parameter in model.named_parameters()}


def below(
    model: nn.Module, first: int, *, layers: str | Sequence[str] | None = None
) -> list[tuple[str, nn.Parameter]]:
    """The parameters below a cut at layer `first` (from 0; the number of layers: the head), in order: of the
    layers before it and, from 1 on, of the embeddings and what else comes before the layers.

    A head that is tied to the embeddings lies below with them.

    Args: as `layer_stacks`.
    Raises: ValueError for a cut that the model does not have, and as `layer_stacks`.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> [name for name, _ in below(model, 1)]
    ['0.weight', '0.bias']
    """
    count = sum(len(stack.layers) for stack in layer_stacks(model, layers))
    if not 0 <= first <= count:
        raise ValueError(f"first: got {first}, expected 0 ... {count}")
    depths = parameter_depths(model, layers=layers)
    return [(name, p) for name, p in model.named_parameters() if first and depths[name] <= first]


def _starts(name: str) -> list[str]:
    """The names of the modules around a parameter."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _layers_up_to(path: str, stacks: Sequence[LayerStack]) -> int:
    """How many layers are registered once this module is."""
    return max(
        (stack.first + len(stack.layers) for stack in stacks if f"{path}.".startswith(f"{stack.path}.")),
        default=0,
    )


def _outside(name: str, module: nn.Module, passed: int, total: int) -> int:
    parts = name.split(".")
    if isinstance(module, nn.Embedding) or any("embed" in part for part in parts):
        return 0
    if passed == total or (passed == 0 and any(part.startswith(_LATE) for part in parts)):
        return total + 1
    return passed


def _head_name(model: nn.Module) -> str | None:
    """The name of the module that makes a language model's logits."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def _is_list(module: nn.Module) -> bool:
    """Whether it is a list of blocks; lists of single layers (heads, kernels) are none."""
    blocks = list(module) if isinstance(module, nn.ModuleList) else []
    return bool(blocks) and all(any(True for _ in block.children()) for block in blocks)


def _is_plain_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 0


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) > 1


def _outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    paths: list[str] = []
    for path, module in model.named_modules():
        if wanted(module) and not any(outer == "" or path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    return paths


def _named(model: nn.Module, layers: str | Sequence[str]) -> list[str]:
    names, paths = [layers] if isinstance(layers, str) else list(layers), []
    for name in names:
        parents = [path for path, module in model.named_modules() if any(True for _ in module.children())]
        matching = [path for path in parents if f".{path}".endswith(f".{name}")]
        if not matching:
            raise ValueError(
                f"layers: {name!r} ends no name of a module with children in {type(model).__name__}: see"
                " named_modules()"
            )
        paths.append(min(matching, key=len))
    return paths
