"""Modules that are trained whole beside a bottleneck adapter and saved with it, such as a new classification
head: PEFT's `modules_to_save`, and PEFT's wrapper for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.utils import ModulesToSaveWrapper

__all__ = ["HEADS", "activate", "find", "saved_state", "take_away", "trained_copies", "wrap", "wrappers"]

# Heads that PEFT trains whole for a task, where the model has them (peft.PeftModelForSequenceClassification
# and its siblings).
HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_OPTION = "modules_to_save"
_OWN = "_peftkern_bottleneck"  # marks a wrapper of ours: LoRA of the same model may have others


def find(model: nn.Module, names: Sequence[str], adapted: Iterable[str]) -> tuple[str, ...]:
    """Paths of the modules that the names mean: the whole path, or the end of it after a dot.

    Args:
        adapted: paths of the modules on which adapters stand.
    Raises: ValueError where a name means no module, one that holds an adapter's place, or one whose weights
        cannot be trained.
    """
    if not names:
        return ()
    wrapped = set(wrappers(model))
    paths = [path for path, _ in model.named_modules() if path]
    found: list[str] = []
    for name in names:
        matches = [path for path in paths if f".{path}".endswith(f".{name}") and not _within(path, wrapped)]
        if not matches:
            raise ValueError(
                f"{_OPTION}: the model has no module {name!r}; give names as model.named_modules() lists them"
            )
        found += [path for path in matches if path not in found and not _within(path, found)]
    for path in found:
        held = next((place for place in adapted if _within(place, [path]) or place == path), None)
        if held is not None:
            raise ValueError(
                f"{_OPTION}: {path!r} holds the adapter's place {held!r}; name modules without adapters, or"
                " leave its layer out by leave_out"
            )
        if hasattr(model.get_submodule(path), _OPTION) and path not in wrapped:
            raise ValueError(f"{_OPTION}: {path!r} is trained whole by another adapter of the model already")
        whole = list(model.get_submodule(path).parameters())
        if not whole or not all(parameter.is_floating_point() for parameter in whole):
            why = "is quantized; load it in 16 bits (llm_int8_skip_modules)" if whole else "has no parameters"
            raise ValueError(f"{_OPTION}: {path!r} cannot be trained: it {why}")
    return tuple(found)


def wrap(model: nn.Module, paths: Iterable[str], adapter: str) -> None:
    """Give the adapter its own copy of each module, not active yet.

    Raises: ModuleNotFoundError without PEFT.
    """
    for path in paths:
        parent, _, part = path.rpartition(".")
        owner = model.get_submodule(parent)
        module = owner._modules[part]
        if path in wrappers(model):
            module.update(adapter)
        else:
            owner._modules[part] = _wrapper()(module, adapter).train(module.training)
            setattr(owner._modules[part], _OWN, True)
        owner._modules[part].modules_to_save[adapter].requires_grad_(False)  # `activate` decides


def activate(model: nn.Module, names: Sequence[str], *, off: bool, trainable: bool | None) -> None:
    """Let the copies of these adapters act in place of the modules, or none where `off`.

    trainable: of the active copies, all others are frozen; None leaves every parameter as it is.
    Raises: ValueError, before anything is changed, where two of the adapters have a copy of one module.
    """
    found = wrappers(model)
    for path, wrapper in found.items():
        several = [name for name in names if name in wrapper.modules_to_save]
        if len(several) > 1:
            raise ValueError(
                f"names: {' and '.join(map(repr, several))} both have their own {path!r} ({_OPTION}), of"
                " which one can act; set one of them"
            )
    for wrapper in found.values():
        before = {parameter: parameter.requires_grad for parameter in wrapper.parameters()}
        here = [name for name in names if name in wrapper.modules_to_save]
        wrapper.enable_adapters(True)
        wrapper.set_adapter(here)
        if off:
            wrapper.enable_adapters(False)
        for parameter, value in before.items():
            parameter.requires_grad_(value)
        if trainable is not None:
            for name, copy in wrapper.modules_to_save.items():
                copy.requires_grad_(trainable and name in here)


def take_away(model: nn.Module, adapter: str) -> None:
    """Remove the adapter's copies; a module that has no other copy stands where it stood."""
    for path, wrapper in wrappers(model).items():
        if adapter not in wrapper.modules_to_save:
            continue
        wrapper.delete_adapter(adapter, [name for name in wrapper.active_adapters if name != adapter])
        if not wrapper.modules_to_save:
            parent, _, part = path.rpartition(".")
            model.get_submodule(parent)._modules[part] = wrapper.original_module


def wrappers(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Bottlenecks' wrappers on the model, by the path of the module that each stands for."""
    return {path: module for path, module in model.named_modules() if _OWN in module.__dict__}


def trained_copies(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """(path of the module, the adapter's copy of it)."""
    for path, wrapper in wrappers(model).items():
        if adapter in wrapper.modules_to_save:
            yield path, wrapper.modules_to_save[adapter]


def saved_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Parameters and buffers of the adapter's copies, by the names that PEFT saves them under."""
    return {
        f"{path}.{key}": value
        for path, copy in trained_copies(model, adapter)
        for key, value in copy.state_dict(keep_vars=True).items()
    }


def _within(path: str, parents: Iterable[str]) -> bool:
    return any(path.startswith(f"{parent}.") for parent in parents)


def _wrapper() -> Any:
    try:
        from peft.utils import ModulesToSaveWrapper
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{_OPTION} needs peft, which is not installed: run pip install 'peftkern[peft]'"
        ) from error
    return ModulesToSaveWrapper
