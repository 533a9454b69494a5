"""From a configuration to a fine-tuned adapter, resumable at every point."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_files, write_json
from .config import FinetuneConfig
from .errors import InputError, require
from .folder import RunFolder, open_run, read_record
from .generation import generate
from .memory import out_of_memory, peak_memory
from .stock import stock_kernels

if TYPE_CHECKING:
    from datasets import Dataset

    from .trainer import RecipeTrainer

__all__ = ["FinetuneResult", "finetune"]

_EXTRA = ("transformers", "peft", "trl", "datasets", "accelerate", "tqdm", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run achieved and where it is; perplexities by name of the evaluation text."""

    output: str
    perplexity_before: dict[str, float]
    perplexity_after: dict[str, float]
    final_loss: float
    steps: int
    tokens: int
    tokens_per_second: float
    peak_memory: int
    train_seconds: float
    sample_prompt: str
    sample_before: str
    sample_after: str


def finetune(config: FinetuneConfig, *, quiet: bool = False) -> FinetuneResult:
    """Fine-tune `config.model` on `config.data` with LoRA and save the PEFT adapter to `config.output`.

    Raises InputError (a ValueError) or FileNotFoundError for what the caller can mend, OSError when the output cannot be
    written, MemoryError when memory runs out, ModuleNotFoundError when the extra `finetune` is not installed.
    """
    require(*_EXTRA, *(() if config.quantization == "none" else ("bitsandbytes",)))
    config = config.resolved()
    # The folder comes first, before libraries that take seconds to import: whoever comes second learns it at once.
    with open_run(config) as folder, warnings.catch_warnings(), _memory_errors(config), stock_kernels(config):
        _calm_libraries(quiet or not sys.stderr.isatty())
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return _Run(config, folder, quiet).execute()


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name.removeprefix("checkpoint-"))


class _Run:
    """One run's folder and the stages in order; what an earlier process finished is not done again."""

    def __init__(self, config: FinetuneConfig, folder: RunFolder, quiet: bool) -> None:
        self.config = config
        self.folder = folder
        self.quiet = quiet

    def execute(self) -> FinetuneResult:
        from .data import fingerprint
        from .inputs import load_rows

        stored = read_record(self.folder.record) if self.folder.record.exists() else {}
        if stored and self.folder.result.exists():
            self._say(f"{self.folder.output} holds a finished run: nothing to resume.")
            return FinetuneResult(**read_record(self.folder.result))
        train, named = load_rows(self.config)
        contents = {source: fingerprint(source) for source in (*self.config.data, *self.config.eval_data)}
        self._check_same_run(stored, contents)
        trainer = self._trainer(train, named)
        if not stored:
            stored = {"config": self.config.to_dict(), "data": contents} | self._before(trainer)
            self.folder.begin(stored)
            if self.folder.replaces:
                self._say(f"The earlier run in {self.folder.output} stays until this one, in {self.folder.work}, is complete.")
        self._train(trainer)
        return self._finish(trainer, stored)

    def _check_same_run(self, stored: dict[str, Any], contents: dict[str, str]) -> None:
        if not stored:
            return
        differing = self.config.differences(stored["config"])
        changed = [source for source, value in contents.items() if stored["data"].get(source, value) != value]
        differing += [f"the content of {source} has changed" for source in changed]
        if differing:
            raise InputError(
                "--resume: the run in {} was started otherwise:\n  {}\nGive the same options and data, or start again "
                "with --overwrite or another --output".format(self.folder.output, "\n  ".join(differing))
            )

    def _trainer(self, train: Dataset, evaluations: dict[str, Dataset]) -> RecipeTrainer:
        from .inputs import prepare
        from .metrics import MetricsCallback, truncate_metrics
        from .model import load_model, load_tokenizer, resolve_model
        from .trainer import make_trainer

        path = resolve_model(self.config.model)
        tokenizer = load_tokenizer(path, trust_remote_code=self.config.trust_remote_code)
        inputs = prepare(self.config, train, evaluations, tokenizer)
        self.prompt = inputs.prompt
        model = load_model(path, self.config)
        checkpoint = self._checkpoint()
        earlier = truncate_metrics(self.folder.metrics, checkpoint_step(checkpoint)) if checkpoint else []
        self.metrics = MetricsCallback(self.folder.metrics, earlier, quiet=self.quiet)
        return make_trainer(self.config, model, tokenizer, inputs, folder=self.folder.checkpoints, metrics=self.metrics)

    def _checkpoint(self) -> Path | None:
        from .trainer import checkpoints

        return next(reversed(checkpoints(self.folder.checkpoints)), None)

    def _before(self, trainer: RecipeTrainer) -> dict[str, Any]:
        self._say("Evaluating before training ...")
        perplexity = {name: trainer.perplexity(name) for name in trainer.eval_dataset}
        self._say("Perplexity before: " + _listing(perplexity))
        return {"perplexity_before": perplexity, "sample_before": generate(trainer, self.prompt, self.config.sample_tokens)}

    def _train(self, trainer: RecipeTrainer) -> None:
        from transformers import set_seed

        checkpoint = self._checkpoint()
        if checkpoint is None:
            self.folder.metrics.unlink(missing_ok=True)
        else:
            self._say(f"Resuming from step {checkpoint_step(checkpoint)}.")
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            if state["global_step"] >= state["max_steps"]:
                trainer.load_adapter_of(checkpoint)
                return
        set_seed(self.config.seed)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.metrics.close()

    def _finish(self, trainer: RecipeTrainer, stored: dict[str, Any]) -> FinetuneResult:
        """Evaluate, save the adapter and the curve, and last result.json, which marks the run as finished."""
        from .metrics import plot_loss

        self._say("Evaluating after training ...")
        rows = self.metrics.rows
        tokens = sum(row["tokens"] for row in rows)
        perplexity_after = {name: trainer.perplexity(name) for name in trainer.eval_dataset}
        result = FinetuneResult(
            output=str(self.folder.output),
            perplexity_before=stored["perplexity_before"],
            perplexity_after=perplexity_after,
            final_loss=rows[-1]["loss"],
            steps=rows[-1]["step"],
            tokens=tokens,
            tokens_per_second=tokens / sum(row["seconds"] for row in rows),
            peak_memory=max(peak_memory(), *(row["peak_memory"] for row in rows)),
            train_seconds=rows[-1]["wall"],
            sample_prompt=self.prompt,
            sample_before=stored["sample_before"],
            sample_after=generate(trainer, self.prompt, self.config.sample_tokens),
        )
        with atomic_files(self.folder.work) as temporary:
            trainer.model.save_pretrained(temporary)
            trainer.processing_class.save_pretrained(temporary)
            plot_loss(rows, temporary / "loss.png")
            self.folder.list_files(path.name for path in temporary.iterdir())
        write_json(self.folder.result, dataclasses.asdict(result))
        self.folder.settle()
        return result

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _listing(perplexities: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in perplexities.items())


def _calm_libraries(no_bars: bool) -> None:
    """Bars of loading and tokenizing go to terminals only; hints of the libraries to their own users go nowhere."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    if no_bars:
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()


@contextlib.contextmanager
def _memory_errors(config: FinetuneConfig) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}). Lower --batch-size (now "
            f"{config.batch_size}; raise --grad-accumulation to keep the tokens a step) or --seq-length (now {config.seq_length}), "
            "add --gradient-checkpointing, or use --quantization nf4; then go on with --resume if the output folder holds a checkpoint"
        ) from error
