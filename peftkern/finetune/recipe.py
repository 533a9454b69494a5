"""From a configuration to a fine-tuned adapter, resumable at every point."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..files import atomic_files, write_json
from .base import base_fingerprint
from .card import model_card
from .config import LENGTH, FinetuneConfig
from .errors import InputError, require
from .folder import RunFolder, read_record
from .forgetting import FOLDER, choose_adapter, install_forgetting, load_source
from .generation import generate
from .memory import peak_memory
from .memory_errors import memory_errors
from .processes import is_first, lost_processes, open_shared, process_count, process_group
from .resume import changed_options, check_length, check_same_run, stored_run
from .signals import StopSignals, stop_signals
from .stock import stock_kernels

if TYPE_CHECKING:
    from datasets import Dataset

    from .checkpoints import Checkpoint
    from .trainer import RecipeTrainer

__all__ = ["FinetuneResult", "calm_libraries", "finetune"]

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
    forgetting: dict[str, Any] | None = None


def finetune(config: FinetuneConfig, *, quiet: bool = False) -> FinetuneResult:
    """Fine-tune `config.model` on `config.data` with LoRA and save the PEFT adapter to `config.output`.

    Raises InputError (a ValueError) or FileNotFoundError for what the caller can mend, OSError when the
    output cannot be written, MemoryError when memory runs out, ModuleNotFoundError when the extra `finetune`
    is not installed; Interrupted (a KeyboardInterrupt) when a signal ends the run, which saves a checkpoint
    first if it is training.
    """
    require(*_EXTRA, *(() if config.quantization == "none" else ("bitsandbytes",)))
    config = config.resolved()
    # The folder comes first, before libraries that take seconds to import: whoever comes second learns it at
    # once.
    quiet = quiet or not is_first()
    with contextlib.ExitStack() as stack:
        stack.enter_context(lost_processes())
        stack.enter_context(process_group(config))
        stop, folder = stack.enter_context(stop_signals()), stack.enter_context(open_shared(config))
        for context in (warnings.catch_warnings(), memory_errors(config), stock_kernels(config)):
            stack.enter_context(context)
        calm_libraries(quiet or not sys.stderr.isatty())
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return _Run(config, folder, stop, quiet).execute()


class _Run:
    """One run's folder and the stages in order; what an earlier process finished is not done again."""

    def __init__(self, config: FinetuneConfig, folder: RunFolder, stop: StopSignals, quiet: bool) -> None:
        self.config = config
        self.folder = folder
        self.stop = stop
        self.quiet = quiet
        self.checkpoint: Checkpoint | None = None

    def execute(self) -> FinetuneResult:
        from .data import fingerprint
        from .inputs import load_rows

        stored = stored_run(self.folder)
        result = self._result(stored)
        train, named = load_rows(self.config)
        read = (*self.config.data, *self.config.eval_data, *self.config.source_data)
        contents = {source: fingerprint(source) for source in read}
        check_same_run(stored, self.config, contents, self.folder.output)
        if result and self._has_length_of(result, stored):
            self._say(
                f"{self.folder.output} holds a finished run: nothing to resume. More --steps or "
                "--epochs extend it."
            )
            return result
        source = load_source(self.config, named, train)
        self._choose_checkpoint(extends=result is not None)
        trainer = self._trainer(train, named)
        planned = trainer.planned_steps()
        if result and planned == result.steps:
            return result
        self._begin(trainer, stored, contents, planned, result)
        if source is not None:
            place = self.folder.work / FOLDER
            install_forgetting(trainer, self.config, source, folder=place, planned=planned, say=self._say)
        self._train(trainer, planned)
        return self._finish(trainer, stored_run(self.folder))

    def _result(self, stored: dict[str, Any]) -> FinetuneResult | None:
        """What result.json holds if the run is finished; a damaged one counts as missing, for it can be made
        again from the checkpoint."""
        if not stored or not self.folder.result.exists():
            return None
        try:
            result = FinetuneResult(**read_record(self.folder.result))
            return result if result.steps > stored.get("extends", 0) else None
        except (InputError, TypeError):
            self._say(f"{self.folder.result} is damaged: it is made again.")
            return None

    def _has_length_of(self, result: FinetuneResult, stored: dict[str, Any]) -> bool:
        """Whether a finished run is as long as asked for, as far as that can be told without its data."""
        if self.config.steps is not None:
            check_length(self.config, planned=self.config.steps, trained=result.steps)
        return self.config.steps == result.steps or not any(
            name in self.config.changes(stored["config"]) for name in LENGTH
        )

    def _choose_checkpoint(self, *, extends: bool) -> None:
        from .checkpoints import newest_sound

        self.checkpoint = newest_sound(self.folder.checkpoints, self._say)
        if extends and self.checkpoint is None:
            raise InputError(
                f"--resume: {self.folder.output} holds a finished run without checkpoints, and so "
                "without the optimizer's state: "
                "it cannot be extended; start again with --overwrite, or name another --output"
            )

    def _trainer(self, train: Dataset, evaluations: dict[str, Dataset]) -> RecipeTrainer:
        from .fitting import choose_fit, install_fit
        from .inputs import is_packed, is_running_text, prepare
        from .metrics import MetricsCallback, restore_metrics
        from .model import load_model, load_tokenizer, resolve_model
        from .trainer import make_trainer

        path = resolve_model(self.config.model)
        tokenizer = load_tokenizer(path, trust_remote_code=self.config.trust_remote_code)
        inputs = prepare(self.config, train, evaluations, tokenizer)
        self.prompt = inputs.prompt
        lengths = map(len, inputs.train["input_ids"])
        packed, apart = is_packed(self.config, inputs.kind), not is_running_text(self.config, inputs.kind)
        fit = choose_fit(self.config, path, lengths, packed=packed, apart=apart)
        on_host = self.config.shard or (fit is not None and fit.options.layers_on_host)
        model = load_model(path, self.config, on_host=on_host)
        config = self.config
        if fit is not None:
            self.held = install_fit(model, fit)
            config = dataclasses.replace(config, gradient_checkpointing=fit.options.checkpointing)
        earlier: list[dict[str, Any]] = []
        if self.checkpoint:
            logged = self.checkpoint.state.get("log_history", [])
            earlier, lost = restore_metrics(
                self.folder.metrics, self.checkpoint.step, logged, write=is_first()
            )
            if lost:
                self._say(
                    f"{self.folder.metrics} lacked the last {lost} steps: their tokens and times are "
                    "unknown, and written as 0."
                )
        self.metrics = MetricsCallback(self.folder.metrics, earlier, quiet=self.quiet, write=is_first())
        trainer = make_trainer(
            config, model, tokenizer, inputs, folder=self.folder.checkpoints, metrics=self.metrics
        )
        trainer.stop = self.stop
        if config.shard:
            if self.checkpoint is not None:
                trainer.take_adapter(self.checkpoint.path)
            self._say(f"Sharded: {trainer.into_shards()}.")
        return trainer

    def _begin(
        self,
        trainer: RecipeTrainer,
        stored: dict[str, Any],
        contents: dict[str, str],
        planned: int,
        result: FinetuneResult | None,
    ) -> None:
        """Write run.json: of a new run with the evaluation before it, of a resumed one with the options that
        change."""
        if not stored:
            record = {
                "config": self.config.to_dict(),
                "data": contents,
                "base": base_fingerprint(self.config.model),
            }
            record |= {"processes": process_count()} if process_count() > 1 else {}
            if self.config.source_data:
                record["files"] = [FOLDER]
            self.folder.begin(record | self._before(trainer))
            if self.folder.replaces:
                self._say(
                    f"The earlier run in {self.folder.output} stays until this one, in "
                    f"{self.folder.work}, is complete."
                )
            return
        trained = self.checkpoint.step if self.checkpoint else 0
        check_length(self.config, planned=planned, trained=trained)
        record = changed_options(stored, self.config, planned=planned, trained=trained, say=self._say)
        # The result and the adapter of an extended run stay until there are new ones; this tells that they
        # are not the new ones.
        extends = result.steps if result else stored.get("extends", 0)
        record = record | {"extends": extends if extends < planned else 0}
        if process_count() != stored.get("processes", 1):
            record = record | {"processes": process_count()}
        if record != stored:
            self.folder.begin(record)

    def _before(self, trainer: RecipeTrainer) -> dict[str, Any]:
        self._say("Evaluating before training ...")
        perplexity = {name: trainer.perplexity(name) for name in trainer.eval_dataset}
        self._say("Perplexity before: " + _listing(perplexity))
        return {
            "perplexity_before": perplexity,
            "sample_before": generate(trainer, self.prompt, self.config.sample_tokens),
        }

    def _train(self, trainer: RecipeTrainer, planned: int) -> None:
        if self.checkpoint is None:
            if self.folder.metrics.exists() and is_first():
                self._say("No checkpoint was saved: training begins again at step 1.")
                self.folder.metrics.unlink()
        else:
            self._say(f"Resuming from step {self.checkpoint.step}.")
            if trainer.budget_spent(self.checkpoint.state) or self.checkpoint.step >= planned:
                trainer.load_adapter_of(self.checkpoint.path)
                return
        if self.config.longest_first:
            from .rehearsal import rehearse

            self._say("Running the longest batch once ...")
            rehearse(trainer)
        trainer.run(self.checkpoint, seed=self.config.seed)

    def _finish(self, trainer: RecipeTrainer, stored: dict[str, Any]) -> FinetuneResult:
        """Evaluate, save the adapter and the curve, and last result.json, which marks the run as finished."""
        forgetting = choose_adapter(trainer, self._say)
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
            forgetting=forgetting,
        )
        state = trainer.adapter_state()
        if is_first():
            self._write(trainer, result, stored, state)
        return result

    def _write(
        self,
        trainer: RecipeTrainer,
        result: FinetuneResult,
        stored: dict[str, Any],
        state: dict[str, Any] | None,
    ) -> None:
        from ..transfer.forgetting.plots import plot_forgetting
        from .metrics import plot_loss

        rows = self.metrics.rows
        with atomic_files(self.folder.work) as temporary:
            trainer.model.save_pretrained(temporary, **({} if state is None else {"state_dict": state}))
            trainer.processing_class.save_pretrained(temporary)
            plot_loss(rows, temporary / "loss.png")
            if result.forgetting:
                plot_forgetting(trainer.guard, temporary / "forgetting.png", rows)
            (temporary / "README.md").write_text(model_card(self.config, result, stored), encoding="utf-8")
            kept = [FOLDER] if self.config.source_data else []
            self.folder.list_files([*kept, *(path.name for path in temporary.iterdir())])
        (self.folder.work / "compare.json").unlink(missing_ok=True)  # of the run before it was extended
        write_json(self.folder.result, dataclasses.asdict(result))
        self.folder.settle()

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _listing(perplexities: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in perplexities.items())


def calm_libraries(no_bars: bool) -> None:
    """Bars of loading and tokenizing go to terminals only; hints of the libraries to their own users go
    nowhere."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    if no_bars:
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
