"""The part that measures a whole training step: an 8B-shaped Llama of random weights, quantized layer by
layer, QLoRA on every linear, gradient checkpointing, under the memory of a 24 GB card. Each provider has a
process of its own."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..harness import OURS
from ..peers import has, relative
from .layers import bnb_linear
from .run import Case, Run, read_rows

__all__ = ["PROVIDERS", "build_model", "step"]

STOCK = "PEFT + bitsandbytes"
LIGER = ", Liger"
SLICED = ", sliced head"
# The full logits of a 128,256-word vocabulary fill 24 GB long before the linears' activations do, hence the
# variants without them.
PROVIDERS = (STOCK, OURS, STOCK + LIGER, OURS + LIGER, STOCK + SLICED, OURS + SLICED)
CAP_GIB = 23.0  # what a 24 GB card leaves after its CUDA context
# What a step costs at three lengths first, then the lengths between and beyond: a run may be cut off.
CONTEXTS = (2048, 8192, 32768, 4096, 16384, 65536, 49152, 24576, 40960)
CHILD_S = 240.0  # a provider's process may take this long, and no more than its share of what is left
SMALL = (16, 32)  # contexts of --small
LENGTH_S = 10.0  # after which a context's steps are enough, two at least: one to warm up and one to time
R = 16
LLAMA_8B = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=300,
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WHOLE = "all linears, r 16, batch 1"
GRADIENT_BOUND = 0.1  # of two bf16 roundings of one model, as in the CPU benchmark of a step


def build_model(provider: str, device: str, small: bool) -> nn.Module:
    """Random weights, alike for every provider, made and quantized one linear at a time: a dense 8B never
    exists."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if LIGER in provider:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    size = TINY if small else LLAMA_8B
    config = LlamaConfig(
        **size,
        tie_word_embeddings=False,
        max_position_embeddings=1 << 17,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    _materialize(model, device, generator)
    torch.manual_seed(1)
    lora = LoraConfig(
        r=R, lora_alpha=2 * R, lora_dropout=0.0, target_modules=TARGETS, init_lora_weights=False
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).to(device).train()
    if provider.startswith(OURS):
        import peftkern

        report = peftkern.patch(model)
        if report.counts.get("qlora_linear", 0) != 7 * size["num_hidden_layers"]:
            raise RuntimeError(f"patched {report.counts}, expected every LoRA layer")
    return model


def _materialize(model: nn.Module, device: str, generator: torch.Generator) -> None:
    """Meta parameters to random ones on the device; every linear but the head to NF4."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                dense = torch.empty(child.weight.shape, dtype=torch.bfloat16, device=device).normal_(
                    0, 0.02, generator=generator
                )
                setattr(parent, name, bnb_linear(dense) if name != "lm_head" else _head(dense))
        for name, parameter in list(parent.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
                value = value if parameter.dim() == 1 else value.normal_(0, 0.02, generator=generator)
                setattr(parent, name, nn.Parameter(value, requires_grad=False))


def _head(dense: Tensor) -> nn.Linear:
    head = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(dense, requires_grad=False)
    return head


def _loss(model: nn.Module, provider: str, ids: Tensor) -> Tensor:
    if SLICED not in provider:
        return model(input_ids=ids, labels=ids).loss
    from peftkern import functional

    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids).last_hidden_state
    return functional.linear_cross_entropy(hidden[:, :-1], causal.lm_head.weight, ids[:, 1:])


def child(
    provider: str, device: str, small: bool, rounds: int, gradients: Path, contexts: Sequence[int]
) -> Iterator[dict]:
    """In a process of its own: a record of each context length; none above one that does not fit."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            CAP_GIB * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )
    model = build_model(provider, device, small)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    limit = math.inf
    for length in contexts:
        if length >= limit:
            continue
        torch.manual_seed(2)
        ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)
        seconds, loss_value, too_long = [], float("nan"), ""
        try:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            while len(seconds) < 2 or (len(seconds) <= rounds and time.perf_counter() - begun < LENGTH_S):
                start = time.perf_counter()
                optimizer.zero_grad()
                with torch.autocast(
                    device, torch.bfloat16
                ):  # as trainers run QLoRA: fp32 adapters on a bf16 base
                    loss = _loss(model, provider, ids)
                loss.backward()
                optimizer.step()
                loss_value = loss.item()  # waits for the device
                seconds.append(time.perf_counter() - start)
        except torch.cuda.OutOfMemoryError as error:
            too_long = str(error).split(".")[0]
        if too_long:  # here the error is gone, whose frames held the step's tensors
            limit, loss = length, None
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            yield {"length": length, "oom": too_long}
            continue
        if not gradients.exists():
            torch.save(torch.cat([p.grad.flatten().float().cpu() for p in parameters]), gradients)
        peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else float("nan")
        yield {"length": length, "loss": loss_value, "seconds": seconds[1:], "peak_mb": peak}


def step(run: Run) -> None:
    """Every provider in turn, stock first: the others' loss and gradients are judged by its. With --resume a
    provider goes on with the contexts that it lacks; stock's gradients are kept until nothing is left."""
    folder = run.out / "step-gradients"
    folder.mkdir(parents=True, exist_ok=True)
    waiting: list[str] = []
    for provider in PROVIDERS:
        absent = [package for package in _packages(provider) if not has(package)]
        if absent:
            note = f"skipped: {', '.join(absent)} not installed"
            run.add(Case("step", WHOLE, timed=""), provider, note=note)
        elif _left(run, provider):
            waiting.append(provider)
    for done, provider in enumerate(waiting):
        if run.left_s() < 0:
            note = f"not measured: over the part's {run.budget_s:.0f} s; run again with --resume"
            run.add(Case("step", WHOLE, timed=""), provider, note=note)
            continue
        share = run.left_s() / (len(waiting) - done)
        number = PROVIDERS.index(provider)
        _provider(run, provider, folder / f"{number}.pt", folder / "0.pt", share)
    if not any(_left(run, provider) for provider in waiting):
        shutil.rmtree(folder)


def _left(run: Run, provider: str) -> list[int]:
    """The contexts that a provider has no row of yet, below the shortest that did not fit; none of a provider
    whose results were refused."""
    mine = [row for row in read_rows(run.path) if row["what"] == "step" and row["provider"] == provider]
    if any(row["note"].startswith("error: gradients") for row in mine):
        return []
    measured = {int(row["M"]) for row in mine if row["p50"]}
    too_long = [int(row["M"]) for row in mine if row["note"].startswith("does not fit")]
    limit = min(too_long, default=math.inf)
    return [
        length for length in (SMALL if run.small else CONTEXTS) if length not in measured and length < limit
    ]


def _packages(provider: str) -> tuple[str, ...]:
    return ("transformers", "peft", "bitsandbytes") + ("liger_kernel",) * (LIGER in provider)


def _provider(run: Run, provider: str, gradients: Path, stock: Path, share_s: float) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.step",
        "--provider",
        provider,
        "--device",
        run.device,
        "--gradients",
        str(gradients),
        "--contexts",
        *map(str, _left(run, provider)),
    ]
    command += ["--rounds", str(2 if run.small else 3), *(["--small"] if run.small else [])]
    limit = CHILD_S if run.small else max(30.0, min(CHILD_S, share_s))
    whole = Case("step", WHOLE, timed="")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        out, error = done.stdout, done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired as late:
        out = (
            late.stdout if isinstance(late.stdout, str) else (late.stdout or b"").decode()
        )  # bytes, even of a text stream
        error = [f"over {limit:.0f} s, later contexts are not measured"]
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    note = "not compared, stock has no gradients"
    if gradients.exists() and stock.exists():
        difference = relative(torch.load(gradients), torch.load(stock))
        note = f"gradients differ from stock's by {difference:.4f}"
        if not difference <= GRADIENT_BOUND:  # NaN is refused too
            run.add(whole, provider, note=f"error: {note}, more than {GRADIENT_BOUND}")
            return
    for record in records:
        _record(run, provider, record, note)
    if error:
        run.add(whole, provider, note=f"error: {error[0]}"[:300])


def _record(run: Run, provider: str, record: dict, note: str) -> None:
    case = Case("step", WHOLE, m=record["length"], timed="eager")
    if "oom" in record:
        run.add(case, provider, note=f"does not fit into {CAP_GIB:g} GiB: {record['oom']}")
        return
    rates = sorted(record["length"] / s for s in record["seconds"])
    run.add(
        case,
        provider,
        p20=rates[0],
        p50=statistics.median(rates),
        p80=rates[-1],
        unit="tokens/s",
        note=f"loss {record['loss']:.4f}; {note}",
    )
    peak = record["peak_mb"]
    run.add(
        Case("step", "peak memory", m=record["length"], timed=""),
        provider,
        p20=peak,
        p50=peak,
        p80=peak,
        unit="MB",
        note="tensors, no context",
    )


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--provider", choices=PROVIDERS, required=True)
    p.add_argument("--device", required=True)
    p.add_argument("--small", action="store_true")
    p.add_argument("--rounds", type=int, required=True)
    p.add_argument("--gradients", type=Path, required=True)
    p.add_argument("--contexts", type=int, nargs="+", metavar="TOKENS")
    args = p.parse_args()
    contexts = args.contexts or (SMALL if args.small else CONTEXTS)
    for record in child(args.provider, args.device, args.small, args.rounds, args.gradients, contexts):
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
