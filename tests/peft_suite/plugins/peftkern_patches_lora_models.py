"""A pytest plugin: every model that gets a LoRA adapter is patched right after it got it, by whatever path of
PEFT's."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners import mixed
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner

import peftkern
from peftkern.patching.detect import is_lora

counts = {"models": 0, "modules": 0, "nothing": 0}
DENSE = {"1": True, "0": False}.get(os.environ.get("PEFTKERN_SUITE_DENSE", ""))


def patch_lora(model: torch.nn.Module) -> None:
    """`peftkern.patch`, where "nothing could be patched" is an answer like any other."""
    if not any(is_lora(module) for module in model.modules()):
        return
    try:
        report = peftkern.patch(model, dense=DENSE)
    except ValueError as error:
        if not str(error).startswith("model: "):
            raise
        counts["nothing"] += 1
        return
    counts["models"] += 1
    counts["modules"] += len(report.fused)


def wrap(owner: type, name: str) -> None:
    """`name` of `owner` patches the tuner's model after it has done its work."""
    original: Callable[..., Any] = owner.__dict__[name]

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        patch_lora(args[0] if args and isinstance(args[0], torch.nn.Module) else self.model)
        return result

    setattr(owner, name, wrapped)


def pytest_configure(config: pytest.Config) -> None:
    """All of PEFT's ways to add an adapter end in `inject_adapter`; a LoRA model's further adapters may be
    made in place."""
    wrap(BaseTuner, "inject_adapter")
    wrap(LoraModel, "add_weighted_adapter")
    if "inject_adapter" in mixed.MixedModel.__dict__:
        wrap(mixed.MixedModel, "inject_adapter")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    text = (
        f"peftkern: {counts['models']} models patched, {counts['modules']} modules fused; nothing to patch "
        f"in {counts['nothing']} models"
    )
    terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def _patched_in_this_test(record_property: Callable[[str, object], None]) -> Any:
    before = counts["modules"]
    yield
    record_property("peftkern_modules", counts["modules"] - before)
