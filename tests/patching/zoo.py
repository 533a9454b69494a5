"""A tiny random configuration of each supported architecture, its training steps, and the same steps in
fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import models

WIDTH, HEADS, WORDS = 64, 4, 96
TOKENS = dict(bos_token_id=1, eos_token_id=2)
DECODER = dict(
    vocab_size=WORDS,
    hidden_size=WIDTH,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
GEMMA = DECODER | dict(
    head_dim=16,
    query_pre_attn_scalar=16,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
)
EXPERTS = dict(num_experts_per_tok=2, router_aux_loss_coef=0.0)
IMAGES = dict(
    hidden_size=WIDTH,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
ENCODER = IMAGES | dict(vocab_size=WORDS, max_position_embeddings=64, pad_token_id=0)
TEXT = torch.randint(1, WORDS, (2, 12), generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Case(NamedTuple):
    """An architecture: the classes, the configuration, and how many LoRA layers that "all-linear" makes must
    be fused."""

    model: str
    config: str
    options: dict[str, Any]
    fused: int
    dense: str = "qlora_linear"  # what a layer on the dense base runs
    four_bit: bool = True  # whether its linears can be quantized
    experts: int = (
        0  # 3-D parameters of experts and routers, which PEFT wraps (since 0.20) and which keep its forward
    )


CASES = {
    "llama": Case("LlamaForCausalLM", "LlamaConfig", DECODER, 14),
    "smollm": Case("LlamaForCausalLM", "LlamaConfig", DECODER | dict(tie_word_embeddings=True), 14),
    "mistral": Case("MistralForCausalLM", "MistralConfig", DECODER | dict(sliding_window=8), 14),
    "qwen2": Case("Qwen2ForCausalLM", "Qwen2Config", DECODER, 14),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", DECODER | dict(head_dim=16), 14),
    "gemma2": Case("Gemma2ForCausalLM", "Gemma2Config", GEMMA, 14),
    "gemma3": Case("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, 14),
    "phi3": Case("Phi3ForCausalLM", "Phi3Config", DECODER, 8),
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(
            vocab_size=WORDS,
            n_embd=WIDTH,
            n_layer=2,
            n_head=HEADS,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        8,
        "lora_add",
        False,
    ),
    "gpt-neox": Case("GPTNeoXForCausalLM", "GPTNeoXConfig", DECODER, 8),
    "falcon": Case(
        "FalconForCausalLM",
        "FalconConfig",
        dict(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            bias=True,
            alibi=False,
        ),
        8,
        "lora_add",
    ),
    "mixtral": Case(
        "MixtralForCausalLM", "MixtralConfig", DECODER | EXPERTS | dict(num_local_experts=4), 8, experts=6
    ),
    "qwen3-moe": Case(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        DECODER | EXPERTS | dict(num_experts=4, moe_intermediate_size=48, head_dim=16),
        8,
        experts=6,
    ),
    "bert": Case("BertForMaskedLM", "BertConfig", ENCODER, 13),
    "roberta": Case("RobertaForMaskedLM", "RobertaConfig", ENCODER, 13),
    "minilm": Case("BertModel", "BertConfig", ENCODER | dict(num_attention_heads=8), 13),
    "vit": Case("ViTModel", "ViTConfig", IMAGES | dict(image_size=16, patch_size=8), 13),
    "t5": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        dict(
            vocab_size=WORDS,
            d_model=WIDTH,
            d_kv=16,
            d_ff=80,
            num_layers=2,
            num_heads=HEADS,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
        36,
    ),
}


def build(
    name: str, *, four_bit: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **lora: Any
) -> nn.Module:
    """The PEFT LoRA model of an architecture in training mode, its lora_B not zero."""
    case = CASES[name]
    torch.manual_seed(seed)
    # Grouped products of experts take no fp64, which the exact steps need; "eager" is a linear an expert.
    config = getattr(transformers, case.config)(**TOKENS | case.options, experts_implementation="eager")
    model = getattr(transformers, case.model)(config)
    _spread(model)
    model = model.to(dtype).train()
    if four_bit:
        _quantize(model, dtype)
    adapted = models.peft.get_peft_model(
        model, models.peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora)
    )
    models.randomize(adapted)
    return adapted


def _spread(model: nn.Module) -> None:
    """transformers' 0.02 leaves a model this small all but linear; biases and norms are not left at 0 and
    1."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "embed" not in name and "wte" not in name and "shared" not in name:
            nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)


def _quantize(model: nn.Module, dtype: torch.dtype) -> None:
    """As transformers does on loading: neither the head nor what a model asks to keep in fp32 (T5's wo)."""
    head, kept = model.get_output_embeddings(), tuple(model._keep_in_fp32_modules or ())
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.Linear) and old is not head and not name.endswith(kept):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, models.linear_4bit(old, dtype))
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)


def output(model: nn.Module) -> Tensor:
    """Logits, or an encoder's last hidden state with what its pooler makes of it."""
    kind = model.config.model_type
    if kind == "t5":
        return model(input_ids=TEXT, decoder_input_ids=TEXT, use_cache=False).logits
    result = model(pixel_values=IMAGE.to(model.dtype)) if kind == "vit" else model(input_ids=TEXT)
    return (
        result.logits
        if hasattr(result, "logits")
        else result.last_hidden_state + result.pooler_output[:, None]
    )


def losses(result: Tensor) -> Tensor:
    """One loss a position, in fp64: cross-entropy of logits, the logarithm of a distance for hidden
    states."""
    if result.shape[-1] == WORDS:
        return F.cross_entropy(result[:, :-1].flatten(0, 1).double(), TEXT[:, 1:].flatten(), reduction="none")
    goal = torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (result.double() - goal).square().sum(-1).log()


def train(model: nn.Module, steps: int = 2, lr: float = 0.05) -> dict[str, Tensor]:
    """Output, loss of each position and every gradient of each step of plain SGD, by "step/name"."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    seen = {}
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        result = output(model)
        each = losses(result)
        each.mean().backward()
        found = {"output": result.detach(), "losses": each.detach()} | models.grads(model)
        seen |= {f"{step}/{name}": value.clone() for name, value in found.items()}
        optimizer.step()
    return seen


def train_exactly(model: nn.Module, *, gaps: list[float] | None = None, **options: Any) -> dict[str, Tensor]:
    """What `train` gives in fp64, on the exact values of 4-bit weights; the model is left as it is. `gaps`
    gets, for each router's call, how far the last expert chosen is from the first left out."""
    double = copy.deepcopy(model)
    for name, old in list(double.named_modules()):
        if isinstance(old, models.bnb.nn.Linear4bit):
            parent, _, child = name.rpartition(".")
            setattr(double.get_submodule(parent), child, models._dense(old))
    with NoRounding([] if gaps is None else gaps):
        return train(double.double(), **options)


class NoRounding(TorchFunctionMode):
    """Norms, routers, softmaxes and positions that ask for fp32 get fp64."""

    def __init__(self, gaps: list[float]) -> None:
        super().__init__()
        self.gaps = gaps

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float and (args[0].dtype == torch.float64 or not args[0].is_floating_point()):
            return args[0].double()
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.to:
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        if func in (torch.topk, Tensor.topk):
            ordered, count = (
                args[0].detach().sort(dim=-1, descending=True).values,
                args[1] if len(args) > 1 else kwargs["k"],
            )
            self.gaps.append((ordered[..., count - 1] - ordered[..., count]).min().item())
        return func(*args, **kwargs)
