"""The sizes of a model that its memory depends on, read from its modules on the meta device: no weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LinearShape", "Shape", "read_shape", "shape_of"]

# The part of a decoder layer that a linear belongs to, by the last word of its name.
_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
_OUTPUTS = ("o_proj", "out_proj", "dense", "wo")
_GATES = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc", "dense_h_to_4h")
_DOWNS = ("down_proj", "w2", "fc2", "dense_4h_to_h")


@dataclass(frozen=True)
class LinearShape:
    """A frozen linear of a decoder layer.

    name: the last word of its module's name; part: "qkv", "o", "gate_up", "down" or "other"; n, k: out and in
    features; count: how many of this size the layer has (experts).
    """

    name: str
    part: str
    n: int
    k: int
    bias: bool = False
    count: int = 1

    @property
    def weights(self) -> int:
        return self.n * self.k * self.count


@dataclass(frozen=True)
class Shape:
    """A decoder-only language model.

    name: as it was asked for. hidden, intermediate, layers, heads, kv_heads, head_dim, vocab: the usual
    sizes.
    tied: whether the head is the embedding. linears: those of one layer (of the largest kind, where layers
    differ). layer_weights: elements of all layers' linears together. other: elements of everything that is
    neither a linear of a layer nor embedding or head (norms, biases, expert tensors). query_norms: whether
    queries and keys have norms of their own. extra_norms: norms of a layer beyond two. experts,
    active_experts: of a mixture. dense_attention: whether its attention has no fused kernel (a soft cap);
    mask_kinds: how many masks its layers have between them then. window: keys that a query of some layers
    reads at the most, None where all read all before it; windowed: the share of these layers.
    notes: what of the model the formulas do not know.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    linears: tuple[LinearShape, ...]
    layer_weights: int
    other: int = 0
    query_norms: bool = False
    extra_norms: int = 0
    experts: int = 0
    active_experts: int = 0
    dense_attention: bool = False
    mask_kinds: int = 1
    window: int | None = None
    windowed: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def embedding(self) -> int:
        """Elements of the embedding; of the head too, which is the same tensor where `tied`."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layer_weights + self.other + self.embedding * (1 if self.tied else 2)

    def of(self, part: str) -> tuple[LinearShape, ...]:
        """The linears of a part."""
        return tuple(linear for linear in self.linears if linear.part == part)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_shape(model: str | Path, *, trust_remote_code: bool = False) -> Shape:
    """The shape of a hub id in the local cache (or on the hub), a folder, or a config.json; reads no weights.

    Raises: InputError saying what is missing.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(model)
    try:
        if path.is_file():
            fields = json.loads(path.read_text(encoding="utf-8"))
            if "model_type" not in fields:
                raise InputError(
                    f"{model}: no model_type in it: give the config.json of a transformers model"
                )
            if fields["model_type"] not in CONFIG_MAPPING:
                raise InputError(f"{model}: transformers knows no model_type {fields['model_type']!r}")
            config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        else:
            config = AutoConfig.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{model}: its config could not be read ({reason}): give a hub id that is in the local cache, a"
            " folder with a config.json, or a config.json"
        ) from error
    return shape_of(config, name=str(model), trust_remote_code=trust_remote_code)


def shape_of(config: Any, *, name: str = "", trust_remote_code: bool = False) -> Shape:
    """The shape of a transformers configuration: the model is built on the meta device and its modules read.

    Raises: InputError where it is no causal language model with a stack of decoder layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = name or getattr(config, "_name_or_path", "") or type(config).__name__
    options = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{name}: no causal language model could be made of its config ({reason})"
        ) from error
    return _measured(model, config.get_text_config(), name)


def _measured(model: nn.Module, config: Any, name: str) -> Shape:
    from torch import nn

    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    stack = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=None)
    if stack is None:
        raise InputError(f"{name}: its model has no stack of decoder layers")
    layer = max(stack, key=lambda one: sum(p.numel() for p in one.parameters()))
    linears = _linears(layer)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    vocab, hidden = embedding.weight.shape
    tied = head is None or head.weight is embedding.weight or bool(config.tie_word_embeddings)
    in_layers = sum(m.weight.numel() for m in stack.modules() if isinstance(m, nn.Linear))
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    outside = vocab * hidden * (1 if head is None or head.weight is embedding.weight else 2)
    heads = getattr(config, "num_attention_heads", 1)
    sizes = _heads(config, linears, hidden, heads)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    active = getattr(config, "num_experts_per_tok", None) or 0
    gates = [linear for linear in linears if linear.part == "gate_up"]
    inner = max((one.n // (2 if "gate_up" in one.name else 1) for one in gates), default=0)
    norms = _norms(layer)
    query_norms = any(key.startswith(("q_norm", "k_norm", "query_layernorm")) for key in norms)
    kinds = list(getattr(config, "layer_types", None) or ())
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    outer = sum(not key.startswith(("q_norm", "k_norm", "query_", "key_")) for key in norms)
    return Shape(
        name=name,
        hidden=hidden,
        intermediate=inner or getattr(config, "intermediate_size", 4 * hidden) or 4 * hidden,
        layers=len(stack),
        heads=heads,
        kv_heads=sizes[0],
        head_dim=sizes[1],
        vocab=vocab,
        tied=tied,
        linears=linears,
        layer_weights=in_layers,
        other=total - in_layers - outside,
        query_norms=query_norms,
        extra_norms=max(outer - 2, 0),
        experts=experts,
        active_experts=active if experts else 0,
        dense_attention=capped and model.config._attn_implementation in ("eager", "sdpa"),  # see _cap_notes
        mask_kinds=len(set(kinds)) or 1,
        window=_window(config, kinds),
        windowed=kinds.count("sliding_attention") / len(kinds) if kinds else 1.0,
        notes=(*_notes(stack, linears, experts, outer), *_cap_notes(model, capped)),
    )


def _window(config: Any, kinds: list[str]) -> int | None:
    """Of the layers that have one; models without kinds of layers have it in all."""
    if kinds and "sliding_attention" not in kinds or not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


def _linears(layer: nn.Module) -> tuple[LinearShape, ...]:
    from torch import nn

    found: dict[tuple[str, int, int, bool], int] = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            word = name.rpartition(".")[2]
            key = word, module.out_features, module.in_features, module.bias is not None
            found[key] = found.get(key, 0) + 1
    return tuple(LinearShape(key[0], _part(key[0]), *key[1:], count) for key, count in found.items())


def _part(word: str) -> str:
    parts = (("qkv", _INPUTS), ("o", _OUTPUTS), ("gate_up", _GATES), ("down", _DOWNS))
    return next((part for part, names in parts if word in names), "other")


def _heads(config: Any, linears: tuple[LinearShape, ...], hidden: int, heads: int) -> tuple[int, int]:
    """Key/value heads and the width of a head, by the linears where they tell."""
    by_name = {linear.name: linear for linear in linears}
    dim = getattr(config, "head_dim", None) or hidden // heads
    if "q_proj" in by_name:
        dim = by_name["q_proj"].n // heads
    if "k_proj" in by_name:
        return max(by_name["k_proj"].n // dim, 1), dim
    return getattr(config, "num_key_value_heads", None) or heads, dim


def _norms(layer: nn.Module) -> list[str]:
    """The last words of the names of a layer's norms."""
    return [
        name.rpartition(".")[2]
        for name, module in layer.named_modules()
        if "norm" in type(module).__name__.lower() and not list(module.children())
    ]


def _notes(stack: nn.ModuleList, linears: tuple[LinearShape, ...], experts: int, norms: int) -> list[str]:
    notes = []
    if len({sum(p.numel() for p in layer.parameters()) for layer in stack}) > 1:
        notes.append("its layers differ in size: activations are those of the largest")
    missing = [
        part for part in ("qkv", "o", "gate_up", "down") if not any(one.part == part for one in linears)
    ]
    if missing and not experts:
        notes.append(f"no linear was recognized as {', '.join(missing)}: activations are a guess")
    if experts:
        notes.append("a mixture of experts: activations of its MLP are an estimate, not proven by count")
    if norms > 2:
        notes.append(f"{norms} norms a layer: those beyond two are counted as saving their input")
    return notes


def _cap_notes(model: nn.Module, capped: bool) -> list[str]:
    runs = model.config._attn_implementation
    if not capped or runs != "sdpa":
        return []
    return [
        f"this transformers gives {type(model).__name__} SDPA, which leaves out the soft cap on attention's"
        " scores: counted as `peftkern finetune` loads it, with attn_implementation='eager'"
    ]


def dense_linears(hidden: int, intermediate: int, q: int, kv: int) -> tuple[LinearShape, ...]:
    """The linears of a Llama layer: q and kv are the outputs' widths."""
    return (
        LinearShape("q_proj", "qkv", q, hidden),
        LinearShape("k_proj", "qkv", kv, hidden),
        LinearShape("v_proj", "qkv", kv, hidden),
        LinearShape("o_proj", "o", hidden, q),
        LinearShape("gate_proj", "gate_up", intermediate, hidden),
        LinearShape("up_proj", "gate_up", intermediate, hidden),
        LinearShape("down_proj", "down", hidden, intermediate),
    )


def llama_shape(
    name: str,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool = False,
    head_dim: int | None = None,
) -> Shape:
    """The shape of a Llama by its numbers, for tests and examples: transformers is not needed."""
    dim = head_dim or hidden // heads
    linears = dense_linears(hidden, intermediate, heads * dim, kv_heads * dim)
    weights = layers * sum(linear.weights for linear in linears)
    norms = (2 * layers + 1) * hidden
    return Shape(
        name, hidden, intermediate, layers, heads, kv_heads, dim, vocab, tied, linears, weights, norms
    )
