"""`patch(model)`: put peftkern's kernels under the PEFT and bitsandbytes layers of a model, per instance and
reversibly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from ..runtime import backends
from .attention import CpuAttention, restore_surrounded, surrounded_alone
from .blocks import Norms
from .detect import Linears
from .forwards import remove
from .groups import Siblings, with_siblings
from .layers import DecoderLayers
from .loss import Loss
from .merged import Merging, release_merge
from .mlp import GatedMLPs
from .report import PatchReport, Row
from .rewrite import Finding, Rewrite, patterns_of
from .rotary import Rotary
from .samples import mixed_adapters
from .survey import survey

__all__ = ["PatchReport", "Row", "mixed_adapters", "patch", "unpatch"]

# In this order: a later one asks what its children will run.
_LINEARS: tuple[Rewrite, ...] = (Linears(), Merging(), Siblings())
_BLOCKS: tuple[Rewrite, ...] = (GatedMLPs(), Norms(), Rotary(), CpuAttention(), DecoderLayers())
_LOSS: tuple[Rewrite, ...] = (Loss(),)


def patch(
    model: nn.Module,
    *,
    exclude: Iterable[str] = (),
    dense: bool | None = None,
    blocks: bool = True,
    fused_loss: bool = False,
) -> PatchReport:
    """Let the LoRA layers and frozen 4-bit linears of a model, and the blocks around them, run peftkern's
    fused functions.

    Replaces `forward`, and of LoRA layers `merge` and `unmerge`, on module instances, nothing else: classes,
    parameters, `state_dict`, saving and loading stay as they are, and `unpatch` restores every forward
    exactly. Patching twice is patching once; call it again after adding modules. Merging by PEFT's methods
    rounds once, and unmerging restores every byte.

    Args:
        model: a PEFT LoRA model on a bitsandbytes 4-bit or a dense base, or any model with bitsandbytes
            Linear4bit layers.
        exclude: module names, or whole dotted parts of them ("lm_head", "layers.0"), to leave as they are.
        dense: also patch frozen dense nn.Linear outside LoRA layers (a tied lm_head, say). Default: where it
            pays, on CPUs whose bf16 or fp16 matrix products torch computes by naive loops.
        blocks: also patch gated MLPs, RMSNorm, rotary embeddings, and the residual additions of pre-norm
            decoder layers, each recognized by what it computes on a small probe; and compute 16-bit attention
            in fp32 on CPUs whose 16-bit products torch computes by naive loops.
        fused_loss: a causal LM that is given labels in training computes its loss without the logits, and
            returns none.
    Returns: PatchReport, naming every module looked at, what it got, and why others fall back.
    Raises: ValueError where nothing could be patched, or an entry of `exclude` names no module.

    >>> report = patch(torch.nn.Sequential(torch.nn.Linear(8, 8).requires_grad_(False)), dense=True)
    >>> report.counts
    {'linear': 1}
    """
    rewrites = _LINEARS + (_BLOCKS if blocks else ()) + (_LOSS if fused_loss else ())
    findings = survey(model, rewrites, exclude=patterns_of(model, exclude), dense=dense)
    linears = [finding for rewrite, finding in findings if isinstance(rewrite, Linears)]
    if not any(_runs_ours(finding) for finding in linears):
        raise ValueError(_nothing(model, linears))
    if fused_loss and not any(isinstance(rewrite, Loss) for rewrite, _ in findings):
        raise ValueError(_no_loss(model))
    kept = {id(finding.module) for finding in linears if finding.forward is not None}
    for module in model.modules():
        if id(module) not in kept:
            remove(module)
    for rewrite, finding in findings:
        rewrite.install(finding)
    restore_surrounded(model)
    return PatchReport(tuple(with_siblings(findings)), _kernels(linears))


def unpatch(model: nn.Module) -> int:
    """Give every module of the model the forward it had before `patch`; returns how many were patched."""
    for module in model.modules():
        release_merge(module)
    others = sum(surrounded_alone(module) for module in model.modules())
    count = sum(remove(module) for module in model.modules()) - others
    restore_surrounded(model)
    return count


def _runs_ours(finding: Finding) -> bool:
    return finding.row is not None and finding.row.reason is None


def _kernels(linears: list[Finding]) -> str:
    modules = (finding.module for finding in linears if _runs_ours(finding))
    return backends.served_by(next(tensor for module in modules for tensor in module.parameters()))[1]


def _no_loss(model: nn.Module) -> str:
    return (
        f"fused_loss: {type(model).__name__} holds no causal language model of transformers; call "
        "peftkern.patch without it"
    )


def _nothing(model: nn.Module, found: list[Finding]) -> str:
    if found:
        reasons = Counter(finding.row.reason for finding in found)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        return f"model: none of its {len(found)} LoRA layers and linears could be patched: {listed}"
    kinds = Counter(type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear))
    seen = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no linear layer"
    return (
        f"model: found no PEFT LoRA layer and no bitsandbytes Linear4bit in {type(model).__name__} (it "
        f"has {seen}). Call "
        "get_peft_model(model, LoraConfig(...)) first, load the model in 4 bit "
        "(BitsAndBytesConfig(load_in_4bit=True)), or pass dense=True "
        "for frozen nn.Linear"
    )
