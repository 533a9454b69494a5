"""The script that measures the longest sequence on a GPU, proven on the CPU with a tiny shape."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        [],
        [
            "--layers-on-host",
            "--embedding-on-host",
            "--checkpoints",
            "disk",
            "--disk-gb",
            "1",
            "--attention-groups",
        ],
    ],
)
def test_two_lengths(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.long_context", "--shape", "tiny", "--device", "cpu"]
    command += ["--tokens", "32", "64", "--out", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "long_context.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["tokens"]) for row in rows] == [32, 64]
    for row in rows:
        assert row["note"].startswith("steps of") and int(row["planned"]) > 0
        assert math.isfinite(float(row["loss"])) and float(row["gradient_norm"]) > 0


def test_the_line_through_the_two_longest_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_BNB_BACKEND", "0")  # which this import sets, for good
    from benchmarks.gpu.long_context import Row, line

    def row(tokens: int, peak: int, note: str = "steps of 1 s") -> Row:
        return Row("", "", "8b", "", tokens, peak_allocated=peak, note=note)

    rows = [row(10, 100), row(20, 1500), row(40, 2500), row(80, 9999, "does not fit: out of memory")]
    assert line(rows) == (50.0, 500.0)
    assert line(rows[:1]) is None
