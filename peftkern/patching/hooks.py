"""Whether calling a module does nothing but run its class's forward. Where it does more, a fused block has to
call it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _torch

__all__ = ["EVERYWHERE", "Ours", "against", "direct", "has_hooks", "running"]

# torch's hooks for every module, which fire beside a module's own: dicts that torch writes to and never
# replaces.
_FORWARD, _FORWARD_PRE = _torch._global_forward_hooks, _torch._global_forward_pre_hooks
_BACKWARD, _BACKWARD_PRE = _torch._global_backward_hooks, _torch._global_backward_pre_hooks
EVERYWHERE = _FORWARD, _FORWARD_PRE, _BACKWARD, _BACKWARD_PRE


class Ours:
    """What `patch` puts in place of a forward."""

    __slots__ = ()


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches or changes what this module sees: then it must really be called."""
    held = module.__dict__
    return bool(
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or _FORWARD
        or _FORWARD_PRE
        or _BACKWARD
        or _BACKWARD_PRE
    )


def direct(module: nn.Module) -> bool:
    """Whether no hook is registered and no forward but ours stands on the instance."""
    held = module.__dict__
    if "forward" in held and not isinstance(held["forward"], Ours) and _beneath(held) is None:
        return False
    return not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or _FORWARD
        or _FORWARD_PRE
        or _BACKWARD
        or _BACKWARD_PRE
    )


def running(module: nn.Module) -> Ours | None:
    """The forward of ours that calling the module runs and nothing else; None where there is more to it."""
    if not direct(module):
        return None
    held = module.__dict__
    forward = held.get("forward")
    if forward is not None and not isinstance(forward, Ours):
        forward = _beneath(held)
    return forward if isinstance(forward, Ours) else None


def against(name: str, module: nn.Module) -> str | None:
    """Why a module, which is called `name` in the sentence, must really be called; None where it need not."""
    if direct(module):
        return None
    if has_hooks(module):
        return f"a hook is registered on {name}"
    forward = module.__dict__["forward"]
    return (
        f"the forward of {name} was replaced on the instance by "
        f"{getattr(forward, '__qualname__', type(forward).__name__)}"
    )


def _beneath(held: dict[str, Any]) -> Any:
    """What an instance's forward that is not ours amounts to: ours or the class's, None where it does more.

    It may be ours bound anew, or accelerate's hook for models over several devices, with nothing offloaded:
    that one moves what is on another device, which no kernel takes.
    """
    forward, own = held["forward"], held.get("_peftkern_forward")
    if own is not None and getattr(forward, "__func__", None) is own.__func__:
        return own
    hook, old, call = held.get("_hf_hook"), held.get("_old_forward"), getattr(forward, "func", None)
    if (
        getattr(call, "__module__", None) != "accelerate.hooks"
        or type(hook).__name__ != "AlignDevicesHook"
        or hook.offload
    ):
        return None
    return old if isinstance(old, Ours) or getattr(old, "__name__", None) == "forward" else None
