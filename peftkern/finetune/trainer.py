"""TRL's SFTTrainer with checkpoints that are whole or absent, fp32 adapters, and a token-weighted
perplexity."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ..memory.sharding import ignore_frozen
from ..transfer.forgetting.trainer import ForgettingMixin
from ..transfer.trainer import RatesMixin
from .arguments import shared_arguments
from .causality import require_causal
from .config import FinetuneConfig
from .errors import InputError
from .fit import require_fit
from .inputs import Inputs, is_packed, is_running_text, packing_strategy
from .layer_rates import install_rates
from .loss import adapter_on_head_hidden, install_model_loss, summed_nll, token_nll
from .metrics import MetricsCallback
from .packing import require_separation
from .resumable import ResumableMixin
from .row_losses import RowLossRecorder
from .shards import ShardedMixin

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["RecipeTrainer", "make_trainer", "spread"]

_MOST_NATS = 700.0  # a little less than the logarithm of the largest number


class RecipeTrainer(ResumableMixin, ShardedMixin, ForgettingMixin, RatesMixin, SFTTrainer):
    """SFTTrainer whose loss is the model's own, whose checkpoints are whole, and which goes on bit for
    bit."""

    row_losses: RowLossRecorder | None = None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {**inputs, "use_cache": False} | (
            {"output_router_logits": True} if self.aux_loss_enabled else {}
        )
        # The model's own loss: TRL's would be that of its fused head.
        recorder = self.row_losses if model.training else None
        with contextlib.nullcontext() if recorder is None else recorder.watching(self.base_model()):
            loss, outputs = super(SFTTrainer, self).compute_loss(model, inputs, True, num_items_in_batch)
        if recorder is not None:
            recorder.note(inputs, outputs, epoch=int(self.state.epoch or 0))
        router_loss = getattr(outputs, "aux_loss", None)
        if self.aux_loss_enabled and num_items_in_batch is not None and isinstance(router_loss, torch.Tensor):
            # A mean over one batch, and of such a mean a step's loss holds the mean over its batches, not
            # their sum.
            surplus = 1 - 1 / self.current_gradient_accumulation_steps
            loss = loss - surplus * self.router_aux_loss_coef * router_loss.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def base_model(self) -> Any:
        """The language model itself, out of what accelerate and PEFT wrapped it in."""
        return self.accelerator.unwrap_model(self.model).get_base_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """PEFT writes the adapter's card; TRL would write one more with every checkpoint."""

    def perplexity(self, name: str) -> float:
        """exp of the mean negative log-likelihood over every target token of the evaluation set `name`."""
        self.model.eval()
        base = self.base_model()
        total, count = 0.0, 0
        with torch.no_grad(), self.accelerator.autocast():
            for batch in self.get_eval_dataloader(name):
                batch = self._prepare_inputs(batch)
                measure = self._nll_of_all if self.args.world_size > 1 else _nll
                more = self.within(partial(measure, base, batch))
                total, count = total + more[0], count + more[1]
        if not count:
            raise InputError(
                f"the evaluation text {name!r} has no token to predict within --seq-length "
                f"{self.args.max_length}: raise "
                "--seq-length, or give other rows"
            )
        return self._exponential(total / count, name)

    def _nll_of_all(self, base: Any, batch: dict[str, Any]) -> tuple[float, int]:
        """As `_nll`, of the batches of all processes; the rows that accelerate repeats to fill the last ones
        are left out."""
        rows = torch.stack(
            [token_nll(base, batch).double().sum(1), (batch["labels"][:, 1:] != -100).sum(1).double()], dim=1
        )
        total, count = self.accelerator.gather_for_metrics(rows).sum(0).tolist()
        return total, int(count)

    def _exponential(self, mean: float, name: str) -> float:
        """exp of a loss in nats per token; a loss that is none, or of which the exponential is no number,
        ends the run."""
        if mean < _MOST_NATS:
            return math.exp(mean)
        if self.state.global_step:
            raise self.diverged(
                f"after step {self.state.global_step} the loss on the evaluation text {name!r} is {mean:g}"
            )
        raise InputError(
            f"the model's loss on the evaluation text {name!r} is {mean:g} before training: choose "
            "another --dtype or --model"
        )


def _nll(base: Any, batch: dict[str, Any]) -> tuple[float, int]:
    """The summed negative log-likelihood of a batch in nats, and the number of its targets."""
    return summed_nll(base, batch).item(), int((batch["labels"][:, 1:] != -100).sum())


def make_trainer(
    config: FinetuneConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Inputs,
    *,
    folder: Path,
    metrics: MetricsCallback,
) -> RecipeTrainer:
    """The trainer on `inputs`; `config` must be resolved, checkpoints go to `folder`."""
    require_fit(config, model, inputs)
    packing = is_packed(config, inputs.kind)
    install_model_loss(model)
    with adapter_on_head_hidden(model):
        trainer = RecipeTrainer(
            model=model,
            args=_arguments(config, folder, packing=packing, kind=inputs.kind, unused=_may_be_unused(model)),
            train_dataset=inputs.train,
            eval_dataset=inputs.evaluations,
            processing_class=tokenizer,
            callbacks=[metrics],
        )
    trainer.metrics, trainer.keep_checkpoints = metrics, config.keep_checkpoints
    trainer.remove_callback(PrinterCallback)
    # TRL turns adapters on 4-bit bases into bf16; fp32 ones do not lose small updates, and autocast rounds
    # them where it pays.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if trainer.args.world_size > 1:
        ignore_frozen(model)
    install_rates(trainer, config)
    if config.row_losses:
        trainer.row_losses = _recorder(config, inputs, metrics.path.with_name("row_losses.csv"))
        trainer.add_callback(trainer.row_losses)
    require_causal(trainer, config.model)
    if packing and not is_running_text(config, inputs.kind):
        require_separation(trainer)
    windows = max(1, config.eval_tokens // config.seq_length)
    trainer.eval_dataset = {name: spread(dataset, windows) for name, dataset in trainer.eval_dataset.items()}
    return trainer


def _recorder(config: FinetuneConfig, inputs: Inputs, path: Path) -> RowLossRecorder:
    if is_packed(config, inputs.kind) and is_running_text(config, inputs.kind):
        raise InputError(
            "--row-losses: running text is cut into windows that hold parts of several rows: give "
            "--document-boundaries as well"
        )
    return RowLossRecorder(
        path, zip(inputs.numbers, inputs.train["input_ids"], strict=True), length=config.seq_length
    )


def _arguments(config: FinetuneConfig, folder: Path, *, packing: bool, kind: str, unused: bool) -> SFTConfig:
    return SFTConfig(
        **shared_arguments(config, folder),
        max_length=config.seq_length,
        packing=packing,
        eval_packing=False,
        packing_strategy=packing_strategy(config, kind),
        per_device_eval_batch_size=config.batch_size,
        pad_to_multiple_of=config.pad_to_multiple_of,
        ddp_find_unused_parameters=unused,
        **({} if config.optimizer in (None, "adamw") else {"optim": config.optimizer}),
    )


def _may_be_unused(model: PeftModel) -> bool:
    """Whether a batch may leave trained weights without a gradient: those of experts that it does not
    reach."""
    base = model.get_base_model().config.get_text_config()
    return any(getattr(base, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def spread(dataset: Dataset, count: int) -> Dataset:
    """At most `count` rows at equal distances."""
    if len(dataset) <= count:
        return dataset
    return dataset.select([index * len(dataset) // count for index in range(count)])
