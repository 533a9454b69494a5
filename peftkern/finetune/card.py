"""The model card of an adapter: what was done, in words that a stranger can check."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import adapter_loader, adapter_title
from .config import SAMPLE, FinetuneConfig

if TYPE_CHECKING:
    from .recipe import FinetuneResult

__all__ = ["model_card"]

_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
_SAMPLE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Where things lay on the machine that trained, and how the run was started: of no use to whoever reads the
# card.
_PLACES = ("model", "data", "eval_data", "output", "prompt", "resume", "overwrite", "compare")
_PRIVATE = (*_PLACES, "fit", "fit_ram", "fit_disk", "longest_first")


def model_card(config: FinetuneConfig, result: FinetuneResult, record: dict[str, Any]) -> str:
    """README.md for the adapter of a run, with the front matter that model hubs read; it names files, but no
    folder of this machine."""
    base = _base(config.model)
    return "\n".join(
        [
            *_front_matter(config, base),
            "",
            f"# {adapter_title(config)} adapter for {base}",
            "",
            f"Trained with `peftkern finetune`: {result.steps} steps, {result.tokens} tokens, last "
            f"training loss {result.final_loss:.4f}.",
            "",
            *_results(result),
            "",
            *_data(config, record),
            "",
            *_options(config, record),
            "",
            *_versions(),
            "",
            "## Use",
            "",
            "```bash",
            "peftkern chat --adapter FOLDER        # or: generate, evaluate",
            "```",
            "",
            f"In Python, with the base {base}: `{adapter_loader(config)}(base_model, FOLDER)`.",
            "",
            "## Licence",
            "",
            "None is stated here. Whoever publishes the adapter chooses it, within what the licences "
            "of the base and of the data allow.",
            "",
        ]
    )


def _front_matter(config: FinetuneConfig, base: str) -> list[str]:
    kind = ["lora", "dora"] if config.dora else [adapter_title(config).lower()]
    tags = [*kind, "peftkern"]
    # A hub takes a repository's name here and refuses a path.
    known = [f"base_model: {json.dumps(base)}"] if base.count("/") == 1 else []
    return [
        "---",
        "library_name: peft",
        *known,
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]


def _base(model: str) -> str:
    if model == SAMPLE:
        return _SAMPLE_MODEL
    return Path(model).resolve().name if Path(model).exists() else model


def _results(result: FinetuneResult) -> list[str]:
    lines = ["## Perplexity", "", "| text | before | after |", "|---|---|---|"]
    lines += [
        f"| {_cell(name)} | {before:.2f} | {result.perplexity_after[name]:.2f} |"
        for name, before in result.perplexity_before.items()
    ]
    return lines


def _data(config: FinetuneConfig, record: dict[str, Any]) -> list[str]:
    lines = ["## Data", "", "| used for | name | fingerprint |", "|---|---|---|"]
    hashes = record.get("data", {})
    for purpose, sources in (("training", config.data), ("evaluation", config.eval_data)):
        for source in (sources,) if isinstance(sources, str) else sources:
            lines.append(f"| {purpose} | {_cell(Path(source).name or source)} | {hashes.get(source, '')} |")
    if not config.eval_data:
        lines.append(f"| evaluation | held out: {config.eval_fraction:g} of the training data | |")
    return lines


def _options(config: FinetuneConfig, record: dict[str, Any]) -> list[str]:
    shown = {
        key: value for key, value in config.to_dict().items() if key not in _PRIVATE and value is not None
    }
    lines = ["## Options", "", "| option | value |", "|---|---|"]
    lines += [f"| {key} | {_cell(json.dumps(value))} |" for key, value in shown.items()]
    for change in record.get("changes", []):
        changed = ", ".join(f"{key} {before} → {after}" for key, (before, after) in change["options"].items())
        lines += ["", f"Changed after step {change['after_step']}: {changed}."]
    return lines


def _versions() -> list[str]:
    from peftkern import __version__

    lines = ["## Versions", "", f"peftkern {__version__}"]
    for package in _PACKAGES:
        try:
            lines[-1] += f", {package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
