"""`patch(model)`: put peftkern's kernels under the PEFT and bitsandbytes layers of a model, per instance and
reversibly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from ..runtime import backends
from .attention import (
    install_attention,
    restore_surrounded,
    rope_candidates,
    surrounded_alone,
    wide_candidates,
)
from .blocks import install_norms, norm_candidates
from .detect import Candidate, candidates, excluded, patterns_of
from .dora import drops
from .forwards import install, remove
from .groups import form_groups
from .layers import install_layers
from .loss import install_loss, loss_candidate
from .merged import install_merge, release_merge
from .mlp import install_mlps
from .report import PatchReport, Row
from .samples import mixed_adapters
from .weights import WeightCache

__all__ = ["PatchReport", "Row", "mixed_adapters", "patch", "unpatch"]


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
    patterns = patterns_of(model, exclude)
    found = candidates(model, patterns, dense)
    if not any(item.row.reason is None for item in found):
        raise ValueError(_nothing(model, found))
    kept = {id(item.module) for item in found if item.static}
    for module in model.modules():
        if id(module) not in kept:
            remove(module)
    _install(found)
    _install_merges(found, patterns)
    groups = form_groups(model)
    extra = _install_blocks(model, patterns) if blocks else []
    extra += _install_loss(model, patterns) if fused_loss else []
    restore_surrounded(model)
    fused = {
        f"{item.row.name}.base_layer" for item in found if item.row.got in ("qlora_linear", "dora_linear")
    }
    rows = tuple(_grouped(item, groups) for item in found if item.row.name not in fused)
    return PatchReport((*rows, *extra), _kernels(found))


def _install_blocks(model: nn.Module, exclude: tuple[str, ...]) -> list[Row]:
    """Gated MLPs, norms, attention and the layers around them; a row for each module looked at."""
    norms, attention = norm_candidates(model), [*rope_candidates(model), *wide_candidates(model)]
    norms, attention = (
        [item for item in found if excluded(item.name, exclude) is None] for found in (norms, attention)
    )
    install_norms(norms)
    install_attention(attention)
    kinds = {"rms_norm": "norm", "rope": "attention", "fp32_attention": "attention"}
    found = [*norms, *attention]
    rows = [
        Row(item.name, kinds[item.got], "", "stock" if item.reason else item.got, None, (), item.reason)
        for item in found
    ]
    mlps = [Row(name, "mlp", "", got, None, (), why) for name, got, why in install_mlps(model, exclude)]
    return (
        mlps
        + rows
        + [Row(name, "layer", "", got, None, (), why) for name, got, why in install_layers(model, exclude)]
    )


def _install_loss(model: nn.Module, exclude: tuple[str, ...]) -> list[Row]:
    found = loss_candidate(model, exclude)
    if found is None:
        raise ValueError(
            f"fused_loss: {type(model).__name__} holds no causal language model of transformers; call "
            "peftkern.patch without it"
        )
    install_loss(found)
    return [found.row]


def _grouped(item: Candidate, groups: dict[str, str]) -> Row:
    """Its row, with the note which siblings it is computed with."""
    row = item.row
    if row.reason is not None or row.name not in groups or (row.got == "dora_linear" and drops(item.module)):
        return row
    note = f"one call for {groups[row.name]}"
    return replace(row, note=f"{row.note}; {note}" if row.note else note)


def unpatch(model: nn.Module) -> int:
    """Give every module of the model the forward it had before `patch`; returns how many were patched."""
    for module in model.modules():
        release_merge(module)
    others = sum(surrounded_alone(module) for module in model.modules())
    count = sum(remove(module) for module in model.modules()) - others
    restore_surrounded(model)
    return count


def _install_merges(found: list[Candidate], exclude: tuple[str, ...]) -> None:
    for item in found:
        if item.row.kind != "lora":
            continue
        if excluded(item.row.name, exclude) is None:
            install_merge(item.module)
        else:
            release_merge(item.module)


def _install(found: list[Candidate]) -> None:
    caches: dict[int, WeightCache] = {}
    for item in found:
        if not item.static:
            continue
        base = item.module.base_layer if item.row.kind == "lora" else item.module
        cache = caches.setdefault(id(base), WeightCache())
        install(item.module, item.forward, cache)


def _kernels(found: list[Candidate]) -> str:
    weight = next(tensor for item in found if item.row.reason is None for tensor in item.module.parameters())
    return backends.served_by(weight)[1]


def _nothing(model: nn.Module, found: list[Candidate]) -> str:
    if found:
        reasons = Counter(item.row.reason for item in found)
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
