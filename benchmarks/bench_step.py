"""A whole QLoRA training step of a SmolLM2-135M-shaped Llama (random weights), LoRA on every linear: stock
PEFT on bitsandbytes, the same patched by peftkern (without logits; by default with them), and PEFT LoRA on
the dense base. Tokens a second, and the peak memory of a
step in a process of its own: of all the process, and above what it held when the model was loaded
(activations, gradients, the optimizer's state, buffers of libraries)."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from . import peers  # first: it switches peftkern's bitsandbytes hook off

# isort: split
import torch
from torch import nn

from .harness import OURS, Provider, Row, force_isa, measure, parser, write_csv
from .machine import Load, describe, peak_mb, reset_peak, resident_mb

__all__ = ["PROVIDERS", "Step", "build_model", "quantize", "rows"]

LOGITS = "peftkern, with logits"
PROVIDERS = (OURS, LOGITS, "peft+bitsandbytes", "peft dense")
R = 16


def build_model(provider: str, dtype: torch.dtype, small: bool, **options: Any) -> nn.Module:
    """The model with LoRA (r 16, every linear but the head; `options` of its LoraConfig), seeded alike for
    all providers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    )
    if small:
        size |= dict(
            hidden_size=192,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            vocab_size=500,
        )
    model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True, max_position_embeddings=2048)).to(
        dtype
    )
    if provider != "peft dense":
        quantize(model, dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(1)
    plain = dict(r=R, lora_alpha=2 * R, lora_dropout=0.0, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(model, LoraConfig(**plain | options), autocast_adapter_dtype=False).train()
    if provider in (OURS, LOGITS):
        import peftkern

        report = peftkern.patch(model, fused_loss=provider == OURS)
        if (
            sum(report.counts.get(name, 0) for name in ("qlora_linear", "dora_linear"))
            != 7 * size["num_hidden_layers"]
        ):
            raise RuntimeError(f"patched {report.counts}, expected every LoRA layer:\n{report}")
    return model


def quantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Every linear but the head to bitsandbytes NF4."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(parent, name, peers.bnb_linear(child.weight.detach(), dtype))


class Step:
    """Forward, backward and optimizer on 2 sequences of 256 tokens (small: 32); the learning rate is 0, so
    that every step is the first."""

    def __init__(self, provider: str, dtype: torch.dtype, small: bool, **options: Any) -> None:
        self.model = build_model(provider, dtype, small, **options)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True)  # as the Trainer's
        torch.manual_seed(2)
        self.ids = torch.randint(0, self.model.config.vocab_size, (2, 32 if small else 256))

    def __call__(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss and gradients."""
        self.optimizer.zero_grad()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach(), [p.grad for p in self.parameters]


def _flat(found: tuple[torch.Tensor, list[torch.Tensor]]) -> tuple[float, torch.Tensor]:
    loss, gradients = found
    return loss.item(), torch.cat([gradient.flatten().float() for gradient in gradients])


def _check(stock: Step | None, dtype: torch.dtype) -> Callable[[tuple], None]:
    """Loss and gradients of the patched model beside those of the stock one: two roundings of one model."""
    allowed = {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]

    def check(got: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
        loss, gradient = _flat(got)
        if not math.isfinite(loss) or not torch.isfinite(gradient).all():
            raise AssertionError("loss or gradients are not finite")
        if stock is None:
            return
        stock_loss, expected = _flat(stock())
        if abs(loss - stock_loss) > 0.01 * abs(stock_loss):
            raise AssertionError(f"loss {loss:.5f}, stock has {stock_loss:.5f}")
        error = peers.relative(gradient, expected)
        if error > allowed:
            raise AssertionError(f"gradients differ from stock's by {error:.3f}, more than {allowed}")

    return check


def _peak(provider: str, dtype: str, small: bool, isa: str | None) -> tuple[float, float]:
    """MB at the peak of a step, and of these above the loaded model, in a process that holds this provider
    alone."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_step",
        "--peak",
        provider,
        "--dtype",
        dtype,
        *(["--small"] if small else []),
    ]
    done = subprocess.run(
        command + (["--isa", isa] if isa else []), capture_output=True, text=True, timeout=900, check=True
    )
    peak, loaded = json.loads(done.stdout.splitlines()[-1])
    return peak, peak - loaded


def _print_peak(provider: str, dtype: torch.dtype, small: bool) -> None:
    step = Step(provider, dtype, small)
    loaded = resident_mb()
    step()
    if not reset_peak():
        print(json.dumps([math.nan, math.nan]))
        return
    step()
    print(json.dumps([peak_mb(), loaded]))


def rows(dtype_name: str, small: bool, rounds: int, cap_s: float, isa: str | None) -> list[Row]:
    dtype = peers.DTYPES[dtype_name]
    steps = {name: Step(name, dtype, small) for name in PROVIDERS}
    stock = steps["peft+bitsandbytes"]
    providers = [
        Provider(name, step, _check(stock if name in (OURS, LOGITS) else None, dtype))
        for name, step in steps.items()
    ]
    load = Load()
    timings = measure(providers, rounds=rounds, cap_s=cap_s)
    words, head, found = load.words(), describe(), []
    tokens = stock.ids.numel()
    for name in PROVIDERS:
        rates = [tokens / s for s in timings[name].seconds]
        cuts = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else rates * 9
        ratio = statistics.median(timings[name].ratios) if timings[name].ratios else float("nan")
        what = ("step", name, "all linears, r 16", dtype_name, "small" if small else "SmolLM2-135M", tokens)
        note = "one step only, over the time cap" if timings[name].once else ""
        found.append(Row(*head, *what, cuts[1], cuts[4], cuts[7], ratio, "tokens/s", words, note=note))
        notes = (
            ("peak memory", "resident, whole process"),
            ("peak memory above the model", "resident, above the loaded model"),
        )
        for (mode, note), mb in zip(notes, _peak(name, dtype_name, small, isa), strict=True):
            found.append(
                Row(*head, "step", name, mode, *what[3:], mb, mb, mb, float("nan"), "MB", words, note=note)
            )
    return found


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: both")
    p.add_argument("--peak", choices=PROVIDERS, help="print the peak memory of one provider's step and stop")
    args = p.parse_args()
    force_isa(args.isa)
    if args.peak:
        _print_peak(args.peak, peers.DTYPES[args.dtype or "float32"], args.small)
        return 0
    for dtype in (args.dtype,) if args.dtype else ("bfloat16", "float32"):
        found = rows(dtype, args.small, args.rounds or (2 if args.small else 5), 600.0, args.isa)
        for row in found:
            print(
                f"{row.kernel} {row.mode:18s} {row.dtype:9s} {row.provider:20s} {row.p50:10.1f} "
                f"{row.unit:9s} x{row.ratio:.3f} {row.note}"
            )
        if args.out:
            write_csv(args.out, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
