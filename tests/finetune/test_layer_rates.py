"""The options of rates, schedules, unfreezing and the first layer in the recipe, and their resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peftkern.finetune import FinetuneConfig, InputError, finetune
from peftkern.finetune import trainer as trainer_module
from peftkern.transfer.schedules import slanted

from .conftest import save_tiny_model

STEPS = 8


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("deep-model"), layers=4))


@pytest.fixture
def options(options: dict[str, Any], deep_model: str) -> dict[str, Any]:
    """All of them together, on our kernels, with dropout and accumulation."""
    return options | {
        "model": deep_model,
        "steps": STEPS,
        "save_steps": 2,
        "dropout": 0.1,
        "grad_accumulation": 2,
        "patch": True,
        "layer_rates": 17.6,
        "lora_plus": 4.0,
        "unfreeze": "2",
        "first_layer": 1,
        "schedule": "slanted",
        "gradient_checkpointing": True,
    }


def rows_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def losses(output: str) -> list[tuple[int, float, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows_of(output)]


@pytest.mark.parametrize("step", [3])
def test_a_resumed_run_equals_the_unbroken_one(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = finetune(FinetuneConfig(**options | {"output": str(tmp_path / "whole")}), quiet=True)
    original = trainer_module.RecipeTrainer.training_step

    def breaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_module.RecipeTrainer, "training_step", breaking)
        finetune(FinetuneConfig(**options), quiet=True)
    resumed = finetune(FinetuneConfig(**options, resume=True), quiet=True)
    assert losses(resumed.output) == losses(whole.output)
    assert resumed.perplexity_after == whole.perplexity_after and resumed.sample_after == whole.sample_after
    adapters = [
        (Path(result.output) / "adapter_model.safetensors").read_bytes() for result in (whole, resumed)
    ]
    assert adapters[0] == adapters[1]
    rates = [row["lr"] for row in rows_of(whole.output)]
    assert rates == pytest.approx([options["lr"] * slanted(index, STEPS) for index in range(STEPS)])


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_equals_the_unbroken_one(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """kill -9 of the process that trains, once a checkpoint is there."""
    from peftkern.__main__ import main

    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [argument for argument in FinetuneConfig(**options).to_arguments()]
    command = [sys.executable, "-m", "peftkern", "finetune", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = Path(options["output"]) / "checkpoints"
    deadline = time.monotonic() + 120
    while (
        not (checkpoints / "checkpoint-4").exists() and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(["finetune", *arguments, "--resume"]) == 0
    whole = finetune(FinetuneConfig(**options | {"output": str(tmp_path / "whole")}), quiet=True)
    assert losses(options["output"]) == losses(whole.output)


def test_adapters_only_from_the_first_layer_up(options: dict[str, Any]) -> None:
    from safetensors import safe_open

    finetune(FinetuneConfig(**options | {"steps": 6, "first_layer": 2}), quiet=True)
    with safe_open(Path(options["output"]) / "adapter_model.safetensors", "pt") as file:
        layers = {name.split(".layers.")[1].split(".")[0] for name in file.keys()}  # noqa: SIM118
    assert layers == {"2", "3"}


def test_a_step_keeps_nothing_of_the_layers_below(
    options: dict[str, Any], deep_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trained layer saves as many tensors above three frozen ones as above one, checkpointed as trainers
    do it."""
    import torch

    two = str(save_tiny_model(tmp_path / "two", layers=2))
    original, counts = trainer_module.RecipeTrainer.training_step, {}

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            loss = original(self, *args, **kwargs)
        counts[self.model.config.num_hidden_layers] = sum(saved)
        return loss

    monkeypatch.setattr(trainer_module.RecipeTrainer, "training_step", counting)
    plain = {"unfreeze": None, "dropout": 0.0, "steps": 1, "grad_accumulation": 1}
    for model, first in ((two, 1), (deep_model, 3)):
        changes = {"model": model, "first_layer": first, "output": str(tmp_path / str(first))}
        finetune(FinetuneConfig(**options | plain | changes), quiet=True)
    assert counts[2] == counts[4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_layer": 4}, r"--first-layer 4: .* has 4 layers, 0 to 3"),
        ({"first_layer": -1}, "--first-layer must be a whole number of at least 0"),
        ({"layer_rates": 0.5}, "--layer-rates must be the rate at the top over that at the bottom"),
        ({"layer_rates": "fast"}, "--layer-rates must be greater than 0"),
        ({"lora_plus": 0.0}, "--lora-plus must be greater than 0"),
        ({"unfreeze": "soon"}, "--unfreeze must be the steps between two layers"),
        ({"unfreeze": "3:0,2:5"}, "--unfreeze: .* never trains what lies below layer 2"),
        ({"unfreeze": "4"}, r"--unfreeze 4: the last of 3 stages begins at step 8, but the run has 8 steps"),
        ({"schedule": "triangle"}, "--schedule must be one of cosine, linear, constant_with_warmup, slanted"),
        ({"targets": ("embed_tokens", "q_proj")}, "--first-layer 1: .*embed_tokens.* lies below it"),
    ],
)
def test_what_does_not_fit_is_one_message(
    options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        finetune(FinetuneConfig(**options | changes), quiet=True)


def test_the_warm_up_that_a_schedule_is_known_for() -> None:
    assert FinetuneConfig().resolved().warmup == 0.05
    assert FinetuneConfig(schedule="slanted").resolved().warmup == 0.1
    assert FinetuneConfig(schedule="slanted", warmup=0.2).resolved().warmup == 0.2
