"""For any Trainer of transformers: checkpoints that are whole or absent, runs that stop between two batches
and go on bit for bit, and losses that are numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..files import atomic_directory, remove_directory
from .checkpoints import Checkpoint, checkpoints, write_checksums
from .errors import InputError
from .metrics import MetricsCallback
from .signals import Interrupted, StopSignals

__all__ = ["ResumableMixin"]


@contextlib.contextmanager
def shared_directory(final: Path, processes: int, *, first: bool) -> Iterator[Path]:
    """As `atomic_directory`, one for all processes, which see the same file system: the first one makes and
    renames it, and all leave when it stands there."""
    if processes == 1:
        with atomic_directory(final) as temporary:
            yield temporary
        return
    place: list[str | None] = [None]
    if first:
        with atomic_directory(final) as temporary:
            place = [str(temporary)]
            torch.distributed.broadcast_object_list(place)
            yield temporary
    else:
        torch.distributed.broadcast_object_list(place)
        yield Path(place[0])
    torch.distributed.barrier()


class TrainingStopped(Exception):
    """Training ended between two batches because `ResumableMixin.stop` has a signal."""


class ResumableMixin:
    """Put before the Trainer's class; set `metrics` and `keep_checkpoints` before training, and `stop` where
    signals are to end it.

    It counts tokens for `metrics` and renames each checkpoint into place once it is complete.
    """

    metrics: MetricsCallback
    keep_checkpoints: int
    stop: StopSignals | None = None
    _writing_to: Path | None = None

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer's; raises TrainingStopped after a signal, InputError for a loss that is no
        number."""
        if self.stop is not None and self._stop_number() is not None:
            raise TrainingStopped
        self.metrics.tokens += self.tokens_of(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss became {loss.item()} at step {self.state.global_step + 1}")
        return loss

    def _stop_number(self) -> int | None:
        """The signal that asks to stop, in whichever process it came: all stop before the same batch."""
        if self.args.world_size > 1:
            seen = torch.tensor(self.stop.number or 0, device=self.args.device)
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            self.stop.number = int(seen) or None
        return self.stop.number

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; the tokens are those of all processes."""
        if self.args.world_size > 1 and "loss" in logs:
            tokens = torch.tensor(self.metrics.tokens, device=self.args.device)
            torch.distributed.all_reduce(tokens)
            self.metrics.tokens = int(tokens)
        super().log(logs, *args, **kwargs)

    def tokens_of(self, inputs: dict[str, Any]) -> int:
        """How many tokens a batch has, without padding."""
        mask = inputs.get("attention_mask")
        return inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def run(self, checkpoint: Checkpoint | None, *, seed: int) -> None:
        """Train from the beginning or from a checkpoint to the end; after a signal, save the last step and
        raise Interrupted."""
        from transformers import set_seed

        set_seed(seed)
        try:
            with self.stop.deferred() if self.stop is not None else contextlib.nullcontext():
                self.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        except TrainingStopped:
            pass
        finally:
            self.metrics.close()
        if self.stop is not None and self.stop.number is not None:
            saved = self.save_last_step()
            place = f"{saved} is saved, and" if saved else "no step was complete;"
            raise Interrupted(self.stop.number, f"{place} the same command with --resume goes on from there")

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to) if self._writing_to else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.require_finite_weights()
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        first = self.args.process_index == 0
        with shared_directory(folder / name, self.args.world_size, first=first) as temporary:
            self._writing_to = temporary
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing_to = None
            if self.args.world_size > 1:
                torch.distributed.barrier()  # every process has written its random state
            if first:
                for path in list((temporary / name).iterdir()):
                    path.rename(temporary / path.name)
                (temporary / name).rmdir()
                write_checksums(temporary)
        for old in checkpoints(folder)[: -self.keep_checkpoints] if first else ():
            remove_directory(old)

    def save_last_step(self) -> Path | None:
        """Save what the last complete step left, also where training was stopped in the middle of the next;
        None before the first."""
        if not self.state.global_step:
            return None
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not path.exists():
            self.metrics.random_state.restore()
            self._save_checkpoint(self.model, None)
        return path

    def planned_steps(self) -> int:
        """The step at which training ends."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        batches = len(self.get_train_dataloader())
        updates = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        return math.ceil(self.args.num_train_epochs * updates)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also set the rate of the next step by the schedule of this run, which may be longer than the one
        the checkpoint is of."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is not None and isinstance(schedule, LambdaLR):
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates

    def require_finite_weights(self) -> None:
        """Raise InputError where the last update left a trained weight that is no number."""
        trained = (parameter.detach() for parameter in self.model.parameters() if parameter.requires_grad)
        parts = [getattr(parameter, "to_local", lambda whole=parameter: whole)() for parameter in trained]
        broken = torch.tensor(any(not torch.isfinite(part).all() for part in parts), device=self.args.device)
        if self.args.world_size > 1:  # each may hold a part only, and all end together
            broken = broken.int()
            torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
        if broken:
            raise self.diverged(
                f"the adapter's weights became NaN or infinite at step {self.state.global_step}"
            )

    def diverged(self, what: str) -> InputError:
        """The error to raise of a run that diverged, with what to do about it."""
        good = next(reversed(checkpoints(Path(self.args.output_dir))), None)
        kept = (
            f"The checkpoint before it is kept: {good} (an adapter to load as it is)"
            if good
            else "There was no checkpoint before it"
        )
        return InputError(
            f"{what}: the run diverged. Start again with a lower --lr (now {self.args.learning_rate:g}), a"
            f" longer --warmup or another --dtype, in another --output or with --overwrite. {kept}"
        )

    def load_adapter_of(self, checkpoint: Path) -> None:
        """Take the adapter of a checkpoint without training on."""
        self._load_from_checkpoint(str(checkpoint))
