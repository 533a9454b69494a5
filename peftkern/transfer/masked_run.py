"""One run of masked pretraining by the recipe's means: LoRA on an encoder with its masked head, a folder that
is whole or absent, whole checkpoints, and a resumption that equals the unbroken run bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from ..errors import InputError
from ..files import atomic_files, write_json
from ..finetune.adapters import add_lora, is_lora
from ..finetune.arguments import shared_arguments
from ..finetune.base import base_fingerprint
from ..finetune.checkpoints import Checkpoint, newest_sound
from ..finetune.config import FinetuneConfig
from ..finetune.data import fingerprint
from ..finetune.folder import RunFolder, open_run, read_record
from ..finetune.inputs import load_rows
from ..finetune.layer_rates import install_rates
from ..finetune.loading import load_errors, require_all_weights
from ..finetune.memory_errors import memory_errors
from ..finetune.metrics import MetricsCallback, plot_loss, restore_metrics
from ..finetune.model import compute_dtype, quantization_options, resolve_model
from ..finetune.recipe import calm_libraries
from ..finetune.resumable import ResumableMixin
from ..finetune.resume import changed_options, check_length, check_same_run, stored_run
from ..finetune.signals import StopSignals, stop_signals
from ..finetune.stock import prepare_stock, stock_kernels
from .masked import DocumentCollator, MaskedPretrainingMixin, Masking, pack_documents, packed_as_alone
from .trainer import RatesMixin

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MaskedResult", "check_options", "loaded_encoder", "pretrain_masked", "window_of"]

_WINDOW = 512
# Options of `finetune` that have no meaning here, with the values that leave them out.
_ABSENT: dict[str, Any] = {
    "loss_on": None,
    "forget_budget": None,
    "ewc": None,
    "l2_sp": None,
    "replay": None,
    "source_data": (),
    "prompt": None,
    "compare": False,
}
_NEEDED = {"config": dict, "data": dict, "masked": dict}


@dataclass(frozen=True, kw_only=True)
class MaskedResult:
    """What a run of masked pretraining did; `new_head`: the weights that the model's files lack."""

    output: str
    steps: int
    tokens: int
    final_loss: float
    train_seconds: float
    new_head: tuple[str, ...]


class MaskedTrainer(ResumableMixin, MaskedPretrainingMixin, RatesMixin, Trainer):
    """transformers' Trainer on masks that are drawn by the step."""

    pad_id: int

    def tokens_of(self, inputs: dict[str, Any]) -> int:
        return int((inputs["input_ids"] != self.pad_id).sum())


def check_options(config: FinetuneConfig) -> None:
    """Raise InputError for an option that masked pretraining does not have."""
    for name, unset in _ABSENT.items():
        if getattr(config, name) != unset:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} is an option of causal models: drop it, or --masked")
    if not is_lora(config):
        raise InputError(
            f"--masked trains LoRA adapters, and --adapter is {config.adapter}: drop one of them"
        )
    if not config.document_boundaries:
        raise InputError("--masked always keeps documents apart: drop --no-document-boundaries")


def window_of(config: FinetuneConfig) -> int:
    """--seq-length, checked against the model's positions; by default 512 or as many as it has."""
    from transformers import AutoConfig

    with _encoder_errors(config):
        path = resolve_model(config.model)
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        tokenizer = _tokenizer(config)
    places = getattr(found, "max_position_embeddings", None) or _WINDOW
    most = min(places, tokenizer.model_max_length)
    if config.seq_length is not None and config.seq_length > most:
        raise InputError(
            f"--seq-length {config.seq_length}: the model has {most} positions: give at most so many"
        )
    return config.seq_length or min(_WINDOW, most)


def pretrain_masked(config: FinetuneConfig, *, rate: float = 0.15, quiet: bool = False) -> MaskedResult:
    """Train LoRA on masked tokens of `config.data` and save the adapter to `config.output`.

    `config` is resolved. Weights of the masked head that the model's files lack are made anew and trained in
    full. Raises: as `finetune`.
    """
    with (
        stop_signals() as stop,
        open_run(config) as folder,
        warnings.catch_warnings(),
        memory_errors(config),
        stock_kernels(config),
    ):
        calm_libraries(quiet or not sys.stderr.isatty())
        return _Run(config, folder, stop, rate, quiet).execute()


class _Run:
    """One run's folder and its stages in order."""

    def __init__(
        self, config: FinetuneConfig, folder: RunFolder, stop: StopSignals, rate: float, quiet: bool
    ) -> None:
        self.config, self.folder, self.stop, self.rate, self.quiet = config, folder, stop, rate, quiet
        self.checkpoint: Checkpoint | None = None

    def execute(self) -> MaskedResult:
        stored = stored_run(self.folder, _NEEDED)
        contents = {source: fingerprint(source) for source in self.config.data}
        check_same_run(stored, self.config, contents, self.folder.output)
        masked = {"rate": self.rate}
        if stored and stored["masked"] != masked:
            raise InputError(
                f"--resume: the run masks {stored['masked']['rate']} of the tokens: give the same rate"
            )
        if stored and self.folder.result.exists():
            values = read_record(self.folder.result)
            if values["steps"] == self.config.steps or self.config.steps is None:
                return MaskedResult(**values | {"new_head": tuple(values["new_head"])})
        self.checkpoint = newest_sound(self.folder.checkpoints, self._say)
        trainer, new = self._trainer()
        planned = trainer.planned_steps()
        trained = self.checkpoint.step if self.checkpoint else 0
        check_length(self.config, planned=planned, trained=trained)
        record = {"config": self.config.to_dict(), "data": contents, "masked": masked}
        if stored:
            record = changed_options(stored, self.config, planned=planned, trained=trained, say=self._say)
        self.folder.begin(record | {"base": base_fingerprint(self.config.model)})
        if self.checkpoint and trained >= planned:
            trainer.load_adapter_of(self.checkpoint.path)
        else:
            if self.checkpoint is None:
                self.folder.metrics.unlink(missing_ok=True)
            trainer.run(self.checkpoint, seed=self.config.seed)
        return self._finish(trainer, new)

    def _trainer(self) -> tuple[MaskedTrainer, tuple[str, ...]]:
        base, tokenizer, new = _base(self.config)
        model = _adapted(base, self.config, new)
        masking = Masking.of(tokenizer, rate=self.rate, seed=self.config.seed)
        collator = DocumentCollator(tokenizer.pad_token_id, model.config._attn_implementation)
        packed = _packs(base, collator, self.config, self._say)
        rows, _ = load_rows(self.config)
        data = pack_documents(list(rows["text"]), tokenizer, self.config.seq_length, packed=packed)
        earlier: list[dict[str, Any]] = []
        if self.checkpoint:
            self._say(f"Resuming from step {self.checkpoint.step}.")
            logged = self.checkpoint.state.get("log_history", [])
            earlier, _ = restore_metrics(self.folder.metrics, self.checkpoint.step, logged)
        metrics = MetricsCallback(self.folder.metrics, earlier, quiet=self.quiet)
        trainer = MaskedTrainer(
            model=model,
            args=_arguments(self.config, self.folder.checkpoints),
            train_dataset=data,
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=[metrics],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.masking, trainer.metrics, trainer.stop = masking, metrics, self.stop
        trainer.keep_checkpoints, trainer.pad_id = self.config.keep_checkpoints, tokenizer.pad_token_id
        install_rates(trainer, self.config)
        return trainer, new

    def _finish(self, trainer: MaskedTrainer, new: tuple[str, ...]) -> MaskedResult:
        rows = trainer.metrics.rows
        result = MaskedResult(
            output=str(self.folder.output),
            steps=rows[-1]["step"],
            tokens=sum(row["tokens"] for row in rows),
            final_loss=rows[-1]["loss"],
            train_seconds=rows[-1]["wall"],
            new_head=new,
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


def _packs(base: PreTrainedModel, collator: DocumentCollator, config: FinetuneConfig, say: Any) -> bool:
    """Whether several documents share a window: by default where the model keeps them apart."""
    if config.packing is False or packed_as_alone(base, collator, min(64, config.seq_length)):
        return config.packing is not False
    if config.packing:
        raise InputError("--packing: this model does not keep the documents of a window apart: drop it")
    say("This model does not keep the documents of a window apart: each has a window of its own.")
    return False


def _adapted(base: PreTrainedModel, config: FinetuneConfig, new: tuple[str, ...]) -> PeftModel:
    """The base with a new LoRA adapter in fp32, patched; the modules of weights that are `new` in full."""
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in new if name.endswith(".weight")))
    if modules and config.quantization != "none":
        raise InputError(
            f"--model {config.model} lacks the weights of its masked head: give --quantization none"
        )
    set_seed(config.seed)
    model = add_lora(base, config, task_type=None, trained=modules)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return _patched(model, config)


def _patched(model: PeftModel, config: FinetuneConfig) -> PeftModel:
    if not config.patch:
        prepare_stock(model)
        return model
    import peftkern

    print(peftkern.patch(model).summary, file=sys.stderr)
    return model


def _tokenizer(config: FinetuneConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    options = {"trust_remote_code": config.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(config.model), **options)
    if tokenizer.mask_token_id is None:
        raise InputError(f"--masked: the tokenizer of {config.model} has no mask token: give an encoder")
    return tokenizer


def _base(config: FinetuneConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, tuple[str, ...]]:
    """The encoder with its masked head, its tokenizer, and the head's weights that its files lack."""
    from transformers import AutoModelForMaskedLM

    path, dtype = resolve_model(config.model), compute_dtype(config.dtype)
    set_seed(config.seed)
    with _encoder_errors(config):
        tokenizer = _tokenizer(config)
        base, report = AutoModelForMaskedLM.from_pretrained(
            path,
            dtype=dtype,
            device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **quantization_options(config, dtype),
        )
    inner = f"{base.base_model_prefix}."
    lacking = {name for name in report["missing_keys"] if name.startswith(inner)}
    new = tuple(sorted(set(report["missing_keys"]) - lacking))
    require_all_weights(config.model, base, report | {"missing_keys": lacking})
    return base, tokenizer, new


@contextlib.contextmanager
def _encoder_errors(config: FinetuneConfig) -> Iterator[None]:
    """As `load_errors`, with what to do about a model that is no encoder."""
    try:
        with load_errors(config.model, config.model, files="config.json, tokenizer and weights"):
            yield
    except InputError as error:
        cause = str(error.__cause__ or "")
        if "Unrecognized configuration class" not in cause:
            raise
        raise InputError(
            f"--masked: {config.model} has no masked head that transformers knows: give an encoder, or "
            "drop it"
        ) from error


@contextlib.contextmanager
def loaded_encoder(
    folder: Path, config: FinetuneConfig
) -> Iterator[tuple[PeftModel, PreTrainedTokenizerBase, Any]]:
    """The encoder with the adapter that a run left in `folder`, its tokenizer, and the autocast to use."""
    from peft import PeftModel

    dtype = compute_dtype(config.dtype)
    with stock_kernels(config):
        base, tokenizer, _ = _base(config)
        model = _patched(PeftModel.from_pretrained(base, folder), config)
        device = next(model.parameters()).device.type

        def autocast() -> torch.autocast:
            return torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32)

        yield model.eval(), tokenizer, autocast


def _arguments(config: FinetuneConfig, folder: Path) -> TrainingArguments:
    return TrainingArguments(**shared_arguments(config, folder), remove_unused_columns=False)
