"""Checkpoints of what is trained in several processes: adapters and optimizer through
torch.distributed.checkpoint, which load in another number of processes, and PEFT's own file.

Every function is called by all processes; without a process group it works in one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from ..files import atomic_directory, clear_temporaries

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["load_state", "newest_state", "save_adapter", "save_state"]

_PREFIX = "step-"


def save_state(folder: str | Path, model: nn.Module, optimizer: Optimizer, *, step: int) -> Path:
    """Write what is trained, its optimizer's state and each process's random state to `folder`/step-N.

    Each process writes its part; the checkpoint appears under its name when all parts are on the disk, so a
    killed process leaves the one before it. The frozen base is no part of it. All processes must see the same
    file system.

    Args:
        model: under `ddp`, `shard`, or neither.
        optimizer: over this model's parameters.
        step: how many updates were made.
    Returns: the checkpoint's folder. Raises: OSError where it cannot be written.
    """
    from torch.distributed import checkpoint

    final = Path(folder) / f"{_PREFIX}{step}"
    state = _state(model, optimizer) | {"step": step, f"random_{_rank()}": _random_state()}
    with _directory(final) as temporary:
        checkpoint.save(state, checkpoint_id=temporary, no_dist=not _several())
    return final


def load_state(path: str | Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Put what `save_state` wrote into the model and the optimizer; returns its step.

    The number of processes may be another than that which wrote it, and `ddp`, `shard` or neither another
    wrapper: each process reads its part. A process that there was then goes on with its random numbers;
    others keep theirs.

    Raises: FileNotFoundError where there is no whole checkpoint; ValueError where the model trains parameters
        that the checkpoint has not.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    path = Path(path)
    if not (path / ".metadata").is_file():
        raise FileNotFoundError(f"{path} holds no whole checkpoint; give a folder that save_state returned")
    stored = checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = _state(model, optimizer) | {"step": 0}
    lacking = [name for name in state["model"] if f"model.{name}" not in stored]
    if lacking:
        raise ValueError(
            f"{path}: has no {lacking[0]} ({len(lacking)} parameters are missing); load it into a "
            "model with the"
            " adapter that it was written of"
        )
    random = f"random_{_rank()}"
    if any(name.partition(".")[0] == random for name in stored):
        state[random] = _random_state()
    checkpoint.load(state, checkpoint_id=path, no_dist=not _several())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(strict=False),
    )
    if random in state:
        _restore_random(state[random])
    return int(state["step"])


def newest_state(folder: str | Path) -> Path | None:
    """The checkpoint of the most steps in `folder`, None where there is none; what a killed run left
    incomplete is removed by process 0."""
    folder = Path(folder)
    if _rank() == 0:
        clear_temporaries(folder)
    if _several():
        distributed.barrier()
    complete = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return max(complete, key=lambda path: int(path.name.removeprefix(_PREFIX)), default=None)


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the PEFT adapter whole, as `model.save_pretrained` of one process does; process 0 gathers and
    writes.

    Args:
        model: a PEFT model under `ddp`, `shard`, or neither.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    options = _options(full_state_dict=_several(), cpu_offload=True)
    whole = get_model_state_dict(model, options=options)
    with _directory(Path(folder)) as temporary:
        if _rank() == 0:
            getattr(model, "module", model).save_pretrained(temporary, state_dict=whole)


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The trained parameters and the optimizer's state, each process's part, by the parameters' names."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    of_model, of_optimizer = get_state_dict(model, optimizer, options=_options())
    # A whole Linear4bit would add its quantization state, one in shards has none to add.
    trained = {name.removeprefix("module.") for name, p in model.named_parameters() if p.requires_grad}
    return {
        "model": {name: tensor for name, tensor in of_model.items() if name in trained},
        "optimizer": of_optimizer,
    }


def _options(**more: Any) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(ignore_frozen_params=True, **more)


@contextlib.contextmanager
def _directory(final: Path) -> Iterator[Path]:
    """As `atomic_directory`, one for all processes: process 0 makes it, and renames it when all have
    written."""
    if not _several():
        with atomic_directory(final) as temporary:
            yield temporary
        return
    place: list[str | None] = [None]
    with contextlib.ExitStack() as stack:
        if _rank() == 0:
            place = [str(stack.enter_context(atomic_directory(final)))]
        distributed.broadcast_object_list(place)
        yield Path(place[0])
        distributed.barrier()
    distributed.barrier()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _rank() -> int:
    return distributed.get_rank() if _several() else 0


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_random(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())
