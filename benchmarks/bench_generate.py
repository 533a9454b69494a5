"""Greedy decoding of a SmolLM2-135M-shaped Llama (random weights, LoRA left unmerged): patched on 4 bits,
stock PEFT on bitsandbytes, and PEFT on the dense base in bf16 and fp32. Tokens a second, one sequence, with a
KV cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from . import peers  # first: it switches peftkern's bitsandbytes hook off

# isort: split
import torch
from torch import Tensor, nn

from peftkern import NF4Weight, use_backend

from .bench_step import build_model
from .harness import OURS, Provider, Row, force_isa, measure, parser, write_csv
from .machine import Load, describe

__all__ = ["PROVIDERS", "Generate", "rows"]

# The row's name, bench_step's provider and the dtype of its weights and activations; None: the row's own.
PROVIDERS = {
    OURS: (OURS, None),
    "peft+bitsandbytes": ("peft+bitsandbytes", None),
    "dense bfloat16": ("peft dense", torch.bfloat16),
    "dense float32": ("peft dense", torch.float32),
}
# What our logits are compared with: the stock model with every 4-bit weight decoded. bitsandbytes' own
# evaluation rounds absmax to bf16 on CPUs that have its instructions.
DECODED = "decoded"
PROMPT = 16


class Generate:
    """`tokens` new tokens after a prompt, each the likeliest; returns them with the logits they were taken
    from."""

    def __init__(self, provider: str, dtype: torch.dtype, small: bool) -> None:
        kind, own = PROVIDERS.get(provider, ("peft+bitsandbytes", None))
        self.model: nn.Module = build_model(kind, own or dtype, small).eval()
        if provider == DECODED:
            decode(self.model)
        self.tokens = 8 if small else 64
        torch.manual_seed(2)
        self.ids = torch.randint(0, self.model.config.vocab_size, (1, PROMPT))

    @torch.inference_mode()
    def __call__(self) -> tuple[Tensor, Tensor]:
        ids, cache, chosen, scores = self.ids, None, [], []
        for _ in range(self.tokens):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            ids = logits.argmax(-1, keepdim=True)
            chosen.append(ids)
            scores.append(logits)
        return torch.cat(chosen, 1), torch.cat(scores)


def decode(model: nn.Module) -> None:
    """Every bitsandbytes linear becomes a dense one with the weight that its codes stand for."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ != "Linear4bit":
                continue
            with use_backend("reference"):
                weight = NF4Weight.from_bnb(child.weight).dequantize()
            linear = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            setattr(parent, name, linear)


def _check(
    stock: Callable[[], tuple[Tensor, Tensor]] | None, dtype: torch.dtype
) -> Callable[[tuple[Tensor, Tensor]], None]:
    """Our logits beside the decoded model's up to the first token that differs: a tie of two rounded logits
    may go either way, once."""
    allowed = {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]

    def check(got: tuple[Tensor, Tensor]) -> None:
        if not torch.isfinite(got[1]).all():
            raise AssertionError("logits are not finite")
        if stock is None:
            return
        tokens, scores = stock()
        differs = (got[0] != tokens).flatten().nonzero()
        alike = int(differs[0]) + 1 if len(differs) else tokens.shape[1]
        error = peers.relative(got[1][:alike], scores[:alike])
        if error > allowed:
            raise AssertionError(
                f"the logits of the first {alike} tokens differ from the decoded model's by "
                f"{error:.3g}, more than "
                f"{allowed}"
            )

    return check


def rows(dtype_name: str, small: bool, rounds: int, cap_s: float) -> list[Row]:
    dtype = peers.DTYPES[dtype_name]
    calls = {name: Generate(name, dtype, small) for name in PROVIDERS}
    stock = Generate(DECODED, dtype, small)
    providers = [
        Provider(name, call, _check(stock if name == OURS else None, dtype)) for name, call in calls.items()
    ]
    load = Load()
    timings = measure(providers, rounds=rounds, cap_s=cap_s)
    words, head, found = load.words(), describe(), []
    what = ("greedy, LoRA r 16 unmerged", dtype_name, "small" if small else "SmolLM2-135M", 1)
    for name, timing in timings.items():
        rates = [stock.tokens / s for s in timing.seconds]
        cuts = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else rates * 9
        ratio = statistics.median(timing.ratios) if timing.ratios else float("nan")
        note = "one call only, over the time cap" if timing.once else ""
        found.append(
            Row(
                *head, "generate", name, *what, cuts[1], cuts[4], cuts[7], ratio, "tokens/s", words, note=note
            )
        )
    return found


def main() -> int:
    p = parser(__doc__)
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the 4-bit models' activations; default: both"
    )
    args = p.parse_args()
    force_isa(args.isa)
    for dtype in (args.dtype,) if args.dtype else ("bfloat16", "float32"):
        found = rows(dtype, args.small, args.rounds or (2 if args.small else 5), 600.0)
        for row in found:
            print(
                f"{row.kernel} {row.dtype:9s} {row.provider:20s} {row.p50:10.1f} {row.unit:9s} "
                f"x{row.ratio:.3f} {row.note}"
            )
        if args.out:
            write_csv(args.out, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
