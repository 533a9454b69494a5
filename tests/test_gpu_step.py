"""The GPU benchmark's part `step`: what --resume leaves to do, and how the time is shared. Nothing is
trained."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PEFTKERN_BNB_BACKEND", "0")
    from benchmarks.gpu import step

    monkeypatch.setattr(step, "has", lambda *packages: packages != ("liger_kernel",))
    return step


class Children:
    """Stands for the providers' processes: what each is asked for, and the records it gives."""

    def __init__(self, longest: int, cut_off: set[str]) -> None:
        self.longest, self.cut_off = longest, cut_off
        self.asked: dict[str, list[int]] = {}
        self.limits: dict[str, float] = {}

    def __call__(self, words: list[str], timeout: float, **_: object) -> SimpleNamespace:
        provider = words[words.index("--provider") + 1]
        at = words.index("--contexts") + 1
        end = next(i for i, word in enumerate(words[at:], at) if word.startswith("--"))
        contexts = list(map(int, words[at:end]))
        self.asked[provider], self.limits[provider] = contexts, timeout
        gradients = Path(words[words.index("--gradients") + 1])
        if not gradients.exists():
            torch.save(torch.ones(3), gradients)
        lines, limit = [], 1 << 60
        for length in contexts[:1] if provider in self.cut_off else contexts:
            if length >= limit:
                continue
            if length > self.longest:
                limit = length
                lines.append({"length": length, "oom": "CUDA out of memory"})
            else:
                lines.append({"length": length, "loss": 1.0, "seconds": [1.0], "peak_mb": 1.0})
        out = "\n".join(map(json.dumps, lines))
        if provider in self.cut_off:
            raise subprocess.TimeoutExpired(words, timeout, output=out)
        return SimpleNamespace(returncode=0, stdout=out, stderr="")


def _measure(step, tmp_path: Path, monkeypatch, children: Children, **options: object):
    from benchmarks.gpu.run import Run, read_rows

    stand_in = SimpleNamespace(run=children, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(step, "subprocess", stand_in)
    run = Run("step", tmp_path, device="cpu", **options)
    step.step(run)
    return run, read_rows(run.path)


def test_resume_asks_for_what_is_missing(step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = step.OURS, step.STOCK
    first = Children(longest=32768, cut_off={ours})
    run, rows = _measure(step, tmp_path, monkeypatch, first)
    assert list(first.asked) == [p for p in step.PROVIDERS if step.LIGER not in p]
    assert first.asked[stock][:3] == [2048, 8192, 32768] and sorted(first.asked[stock]) == sorted(
        step.CONTEXTS
    )
    assert step._left(run, stock) == [] and step._left(run, ours) == list(step.CONTEXTS[1:])
    assert (tmp_path / "step-gradients" / "0.pt").exists(), "ours is to be compared with it"
    again = Children(longest=32768, cut_off=set())
    run, rows = _measure(step, tmp_path, monkeypatch, again, resume=True)
    assert list(again.asked) == [ours] and again.asked[ours] == list(step.CONTEXTS[1:])
    assert not (tmp_path / "step-gradients").exists()
    lengths = [int(row["M"]) for row in rows if row["provider"] == ours and row["unit"] == "tokens/s"]
    assert sorted(lengths) == [m for m in sorted(step.CONTEXTS) if m <= 32768], "each once"
    assert all("differ from stock's by 0.0000" in row["note"] for row in rows if row["unit"] == "tokens/s")
    last = Children(longest=32768, cut_off=set())
    _measure(step, tmp_path, monkeypatch, last, resume=True)
    assert last.asked == {}


def test_the_time_is_shared_by_who_is_left(step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(longest=65536, cut_off=set())
    _measure(step, tmp_path, monkeypatch, children, budget_s=400.0)
    limits = list(children.limits.values())
    assert len(limits) == 4 and limits[0] == pytest.approx(100, abs=1) and limits[-1] == step.CHILD_S


def test_over_the_budget_a_row_says_so(step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(longest=1, cut_off=set())
    _, rows = _measure(step, tmp_path, monkeypatch, children, budget_s=-1.0)
    assert children.asked == {} and sum(row["note"].startswith("not measured: over") for row in rows) == 4
    resumed = Children(longest=1, cut_off=set())
    _measure(step, tmp_path, monkeypatch, resumed, resume=True)
    assert len(resumed.asked) == 4
