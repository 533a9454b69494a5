"""DDP and FSDP2 with 4-bit weights: gradients are those of one process on the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.memory import ddp, shard

from ..processes import run_processes
from . import sharded

# fp32 gradients of another order of sums; measured 1.1e-6.
NEAR = 1e-5


def test_ddp(tmp_path: Path) -> None:
    pieces = ("", "patched", "patched loss tiles checkpoints")
    for errors in run_processes(sharded.ddp_errors, 2, tmp_path, pieces):
        assert errors.keys() == set(pieces) and all(error < NEAR for error in errors.values()), errors


def test_fsdp(tmp_path: Path) -> None:
    pieces = ("", "patched", "patched loss tiles checkpoints")
    for errors in run_processes(sharded.fsdp_errors, 2, tmp_path, pieces, {}):
        print(errors)
        assert all(errors[names] < NEAR and errors[f"{names}: bytes"] for names in pieces), errors


def test_averages(tmp_path: Path) -> None:
    for found in run_processes(sharded.averages, 2, tmp_path):
        print(found)
