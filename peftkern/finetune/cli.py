"""The sub-command `finetune`: options in, summary out."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from typing import Any

from .allocator import grow_segments
from .compare import compare
from .config import FinetuneConfig
from .errors import exit_status
from .forgetting import forgetting_lines
from .processes import is_first
from .recipe import FinetuneResult, finetune

__all__ = ["add_arguments", "main"]

_GROUPS: dict[str, dict[str, tuple[Any, str]]] = {
    "what": {
        "model": (str, "hub id, folder, .gguf file, or `sample`"),
        "data": (
            str,
            (
                "one or more of one kind: .jsonl, .json, .csv, .tsv, .parquet, plain text, datasets folders,"
                " or `sample`"
            ),
        ),
        "eval_data": (
            str,
            "held-out text, one or more of the same kinds, or `python-reference`; default: a part of --data",
        ),
        "filter_data": (
            str,
            (
                "rows of --data to leave out: duplicates (near duplicates of others), overlap (they hold text"
                " of --eval-data)"
            ),
        ),
        "output": (str, "folder for adapter, metrics, loss curve and checkpoints"),
    },
    "adapter": {
        "adapter": (
            str,
            (
                "lora, bottleneck, AdapterHub's double_seq_bn, seq_bn, par_bn, scaled_par_bn with options:"
                " seq_bn[reduction_factor=8], or prefix[tokens=32,init=text] (init: text, random, zero, gate)"
            ),
        ),
        "r": (int, "LoRA rank; width of `bottleneck`"),
        "alpha": (float, "LoRA alpha; default: 2 r"),
        "dropout": (float, "dropout of the adapter"),
        "targets": (str, "names of the layers to adapt, or all-linear"),
        "rslora": (bool, "scale by alpha / sqrt(r)"),
        "dora": (bool, "DoRA: also learn the magnitude of each row of the weights"),
    },
    "base": {
        "quantization": (str, "nf4, fp4 or none"),
        "double_quant": (bool, "quantize the block maxima as well"),
        "dtype": (str, "auto, bf16, fp16 or fp32; auto is bf16 where the hardware has it"),
        "trust_remote_code": (
            bool,
            "run Python code that the model brings along: only for authors you trust",
        ),
        "patch": (bool, "use peftkern's kernels; --no-patch runs plain PEFT and bitsandbytes"),
    },
    "training": {
        "seq_length": (int, "tokens of a sequence; default 1024 (sample: 256)"),
        "packing": (bool, "fill sequences from several rows; default: for text rows only"),
        "document_boundaries": (bool, "text rows in a window are kept apart, in positions and attention"),
        "loss_on": (
            str,
            (
                "completions (what the assistant says) or all; default: completions of prompt rows, all of"
                " messages"
            ),
        ),
        "batch_size": (int, "sequences at a time; default 1 (sample: 2)"),
        "grad_accumulation": (int, "batches of a step; default 8 (sample: 1)"),
        "steps": (int, "optimizer steps (sample: 40)"),
        "epochs": (float, "passes over the data instead of --steps; default 1"),
        "lr": (float, "peak learning rate; default 2e-4 (sample: 1e-3)"),
        "warmup": (
            float,
            "part of the steps over which the learning rate rises; default 0.05 (slanted: 0.1)",
        ),
        "schedule": (str, "cosine, linear, constant_with_warmup or slanted (ULMFiT's triangle)"),
        "layer_rates": (
            float,
            "the rate falls from --lr at the top layer to --lr / this at the bottom (ULMFiT: 17.6)",
        ),
        "lora_plus": (float, "LoRA+: the matrices B learn this many times faster than A (about 16)"),
        "unfreeze": (
            str,
            "thaw one layer more every so many steps, from the top; or LAYER:STEP pairs: 24:0,12:40,0:80",
        ),
        "first_layer": (
            int,
            "adapt from this layer up (0: all): no backward runs and nothing is kept below it",
        ),
        "weight_decay": (float, "AdamW's weight decay"),
        "max_grad_norm": (float, "gradients are clipped to this norm"),
        "optimizer": (str, "paged_adamw_8bit (default on a GPU), adamw_8bit or adamw (default on a CPU)"),
        "gradient_checkpointing": (bool, "recompute activations: less memory, slower"),
        "seed": (int, "seed of everything random"),
    },
    "memory": {
        "fit": (
            str,
            "24GiB, say: choose checkpointing, its tiers and the tiles so that the run fits (see "
            "`peftkern plan`)",
        ),
        "fit_ram": (
            str,
            "host memory that --fit may use, of all processes of a machine; default: what is available",
        ),
        "fit_disk": (
            str,
            "room on the disk that --fit may use for checkpoints, of all processes; default: none",
        ),
        "longest_first": (
            bool,
            "before training run the longest batch once, for memory to run out then if it does",
        ),
        "pad_to_multiple_of": (
            int,
            "round the lengths of batches up (to 64, say): a GPU's memory is then used again",
        ),
        "shard": (
            bool,
            "under torchrun: each process holds its part of the model (FSDP2), not the whole of it",
        ),
    },
    "forgetting": {
        "source_data": (
            str,
            (
                "text of what must not be forgotten, of the kinds of --data, or `python-reference`: a quarter"
                " is measured on"
            ),
        ),
        "forget_budget": (
            float,
            (
                "the most nats per token that its loss may rise, as 0.02: sets the penalty's weight, ends"
                " training"
            ),
        ),
        "ewc": (float, "fixed weight of the penalty on forgetting, in nats a nat, instead of a budget"),
        "l2_sp": (float, "weight of half the squared distance from the base's weights"),
        "replay": (float, "source rows to train on for each training row, as 0.05"),
        "fisher": (
            str,
            (
                "labels that the Fisher information is measured with: true (the model's own) or empirical"
                " (the text's)"
            ),
        ),
        "source_steps": (int, "steps between measurements of the source loss; default: --save-steps"),
    },
    "evaluation": {
        "eval_fraction": (float, "part of --data to hold out without --eval-data"),
        "eval_tokens": (int, "most tokens to evaluate on; default 32768 (sample: 4096)"),
        "prompt": (str, "text to continue before and after; default: how a held-out row begins"),
        "sample_tokens": (int, "tokens of that continuation"),
    },
    "run": {
        "row_losses": (
            bool,
            "write the loss of each training row in each epoch to row_losses.csv, for `peftkern data`",
        ),
        "save_steps": (int, "steps between checkpoints; default 25 (sample: 10)"),
        "keep_checkpoints": (int, "checkpoints to keep"),
        "resume": (bool, "go on from the last checkpoint in --output"),
        "overwrite": (bool, "start again in a folder that holds a run"),
        "compare": (bool, "run the same steps on plain PEFT and bitsandbytes too, and print both"),
    },
}


_STATUSES = (
    "Exit status: 0 the run is complete; 2 something to mend, told in one message (a diverged run is one);"
    " 128 + number of the signal that ended it (130 Ctrl-C, 143 SIGTERM): in training a checkpoint is saved"
    " first, and --resume goes on from it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of FinetuneConfig."""
    parser.epilog = _STATUSES
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneConfig)}
    for title, options in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name, (kind, text) in options.items():
            default = defaults[name]
            shown = (
                text
                if default in (None, ()) or isinstance(default, bool)
                else f"{text} (default: {_shown(default)})"
            )
            options_of: dict[str, Any] = {"help": shown.replace("%", "%%"), "default": default}
            if kind is bool:
                options_of["action"] = argparse.BooleanOptionalAction
            else:
                options_of["type"] = kind
                if isinstance(default, tuple):
                    options_of["nargs"] = "+"
            group.add_argument("--" + name.replace("_", "-"), **options_of)


def main(args: argparse.Namespace) -> int:
    """Run the command; errors the user can mend are one message, all others a traceback."""
    grow_segments()
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(FinetuneConfig)}

    def run() -> int:
        config = FinetuneConfig(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )
        result = finetune(config)
        if not is_first():
            return 0
        print(summary(result))
        worse = worsened(result)
        if worse:
            print(f"\npeftkern finetune: error: {worse}", file=sys.stderr)
            return 2
        if config.compare:
            print("\nThe same steps on plain PEFT and bitsandbytes ...", file=sys.stderr)
            print("\n" + compare(config, result))
        return 0

    return exit_status(
        "finetune",
        run,
        interrupted="Interrupted: the same command with --resume goes on from the last checkpoint.",
    )


def worsened(result: FinetuneResult) -> str | None:
    """What to do about a run after which every evaluation text is worse by more than a nat per token; None of
    any other."""
    before, after = result.perplexity_before, result.perplexity_after
    if any(after[name] <= math.e * value for name, value in before.items()):
        return None
    listed = ", ".join(f"{name} {value:.2f} -> {after[name]:.2f}" for name, value in before.items())
    return (
        "the run diverged: the perplexity of every evaluation text rose by more than a factor of e"
        f" ({listed}). The adapter is in {result.output} as it is; start again with a lower --lr or a longer"
        " --warmup, in another --output or with --overwrite"
    )


def summary(result: FinetuneResult) -> str:
    """The closing lines of a run."""
    lines = [
        "",
        f"Prompt:  {result.sample_prompt!r}",
        f"  before: {result.sample_before!r}",
        f"  after:  {result.sample_after!r}",
        "",
    ]
    for name, before in result.perplexity_before.items():
        lines.append(f"Perplexity ({name}):  {before:.2f} -> {result.perplexity_after[name]:.2f}")
    lines += forgetting_lines(result.forgetting)
    lines += [
        (
            f"Trained:  {result.steps} steps, {result.tokens} tokens in {result.train_seconds:.0f} s, last"
            f" loss {result.final_loss:.4f}"
        ),
        f"Speed:  {result.tokens_per_second:.0f} tokens/s",
        f"Peak memory:  {result.peak_memory / 2**30:.2f} GiB",
        f"Adapter:  {result.output} (load with `peftkern generate`, or as its README.md says)",
        f"Loss curve:  {result.output}/loss.png    Metrics:  {result.output}/metrics.jsonl",
    ]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    return " ".join(default) if isinstance(default, tuple) else str(default)
