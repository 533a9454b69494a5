"""`peftkern pretrain --masked`: an encoder learns its target's text, a killed run goes on bit for bit, and
masked bits are those of their definition.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
for _package in ("trl", "peft", "scipy", "matplotlib", "accelerate"):
    pytest.importorskip(_package)

from peftkern.__main__ import main  # noqa: E402
from peftkern.finetune import FinetuneConfig, InputError  # noqa: E402
from peftkern.transfer.masked_bits import masked_document_bits  # noqa: E402
from peftkern.transfer.pretrain import continued_pretraining  # noqa: E402
from tests.finetune.conftest import write_jsonl  # noqa: E402
from tests.transfer.test_masked import CLS, MASK, SEP, encoder, tokenizer  # noqa: E402


def save_encoder(folder: Path, kind: str = "Bert", *, head: bool = True) -> str:
    model = encoder(kind)
    (model if head else model.base_model).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def rows(first: int, count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Texts of two words in turn, so that each tells the next; `first` is where their words begin."""
    made = []
    for number in range(start, start + count):
        words = [f"w{first + number % 4}", f"w{first + 4 + number % 4}"] * (3 + number % 4)
        made.append({"text": " ".join(words)})
    return made


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": save_encoder(tmp_path / "encoder"),
        "data": write_jsonl(tmp_path / "target.jsonl", rows(10, 40)),
        "eval_data": write_jsonl(tmp_path / "held-out.jsonl", rows(10, 12, start=41)),
        "output": str(tmp_path / "out"),
        "r": 8,
        "batch_size": 4,
        "grad_accumulation": 1,
        "steps": 8,
        "save_steps": 10,
        "seq_length": 32,
        "lr": 3e-2,
        "warmup": 0.0,
        "eval_tokens": 2000,
        "dtype": "fp32",
        "quantization": "none",
        "document_boundaries": True,
    }


@pytest.fixture
def control(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "other.jsonl", rows(40, 40))


def state(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_target_text_does_more_than_other_text(options: dict[str, Any], control: str) -> None:
    options |= {"steps": 30}
    report = continued_pretraining(FinetuneConfig(**options), (control,), mask_rate=0.15, quiet=True)
    assert list(report.arms) == ["before", "adapted", "control"] and report.steps == 30
    assert (
        report.gain("adapted").low > 0
        and report.gain("adapted").mean > 0.3
        and "it is the target's text" in report.verdict
    )
    assert "masked bits per byte" in report.table() and "masked bits per byte" in report.verdict
    folder = Path(options["output"])
    assert report.verdict in (folder / "report.md").read_text(encoding="utf-8")
    metrics = (folder / "adapted" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(metrics) == 30 and json.loads(metrics[-1])["loss"] < json.loads(metrics[0])["loss"]


def test_the_adapter_loads_by_peft_alone(options: dict[str, Any]) -> None:
    from peft import PeftModel

    report = continued_pretraining(FinetuneConfig(**options), mask_rate=0.15, quiet=True)
    base = transformers.AutoModelForMaskedLM.from_pretrained(options["model"])
    model = PeftModel.from_pretrained(base, Path(options["output"]) / "adapted")
    texts = [row["text"] for row in map(json.loads, Path(options["eval_data"]).read_text().splitlines())]
    again = masked_document_bits(model, tokenizer(), texts, window=32)
    assert again.bits == pytest.approx(report.arms["adapted"].bits, rel=1e-4)


COMMAND = """
import sys
from peftkern.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_killed_with_kill_9_goes_on_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"steps": 60, "save_steps": 5}
    arguments = ["pretrain", "--masked"]
    for name, value in options.items():
        if name not in ("document_boundaries", "output"):
            arguments += ["--" + name.replace("_", "-"), str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def begin(output: str, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", COMMAND, *arguments, "--output", str(tmp_path / output), *more]
        return subprocess.Popen(
            command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    assert begin("whole").wait() == 0
    killed = begin("killed")
    record = tmp_path / "killed" / "adapted" / "metrics.jsonl"
    while killed.poll() is None and not (record.exists() and len(record.read_text().splitlines()) >= 23):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.md").exists()
    assert begin("killed", "--resume").wait() == 0
    whole, again = (state(tmp_path / name / "adapted") for name in ("whole", "killed"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "adapted" / "metrics.jsonl").open()]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 60


def test_a_head_that_the_files_lack_is_trained_in_full_and_said(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"model": save_encoder(tmp_path / "headless", head=False), "steps": 10}
    report = continued_pretraining(FinetuneConfig(**options), mask_rate=0.15, quiet=True)
    assert report.new_head and "the masked head is new" in report.verdict
    names = state(Path(options["output"]) / "adapted")
    assert any(name.endswith("transform.dense.weight") for name in names)
    assert not any("transform" in name and "lora" in name for name in names)
    with pytest.raises(InputError, match="lacks the weights of its masked head: give --quantization none"):
        continued_pretraining(
            FinetuneConfig(**options | {"quantization": "nf4", "output": str(tmp_path / "4")}), mask_rate=0.15
        )


@pytest.mark.slow
def test_recomputed_activations_train_the_same_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"steps": 3, "layer_rates": 2.0}
    for name, recompute in (("kept", False), ("recomputed", True)):
        config = FinetuneConfig(
            **options | {"gradient_checkpointing": recompute, "output": str(tmp_path / name)}
        )
        continued_pretraining(config, mask_rate=0.15, quiet=True)
    kept, recomputed = (state(tmp_path / name / "adapted") for name in ("kept", "recomputed"))
    moved = [name for name, value in kept.items() if "lora_B" in name and value.abs().max() > 1e-3]
    assert len(moved) == sum("lora_B" in name for name in kept) == 13
    for name, value in kept.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-4, atol=1e-6)


def test_roberta_gets_a_window_for_each_document(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options |= {"model": save_encoder(tmp_path / "roberta", "Roberta"), "steps": 2, "seq_length": 16}
    continued_pretraining(FinetuneConfig(**options), mask_rate=0.15)
    assert "each has a window of its own" in capsys.readouterr().err


def definition(model: nn.Module, ids: list[int]) -> float:
    """Bits of the words of ids, each masked alone."""
    total = 0.0
    for place in range(1, len(ids) - 1):
        hidden = torch.tensor([[*ids[:place], MASK, *ids[place + 1 :]]])
        total -= model(input_ids=hidden).logits[0, place].log_softmax(0)[ids[place]].item()
    return total / math.log(2)


def test_one_mask_at_a_time_is_the_pseudo_log_likelihood() -> None:
    model, words = encoder(dropout=0.0).double().eval(), [list(range(5, 17)), [9, 8, 7]]
    texts = [" ".join(f"w{i}" for i in each) for each in words]
    with torch.no_grad():
        expected = [definition(model, [CLS, *each, SEP]) for each in words]
        # A window of 8 holds 6 words between the tokens that begin and end a text.
        cut = sum(definition(model, [CLS, *words[0][i : i + 6], SEP]) for i in (0, 6))
    model.train()
    found = masked_document_bits(model, tokenizer(), texts, rate=None)
    assert model.training and found.bits == pytest.approx(expected, rel=1e-12)
    assert found.sizes == tuple(len(text) for text in texts)
    assert masked_document_bits(model, tokenizer(), texts[:1], rate=None, window=8).bits[0] == pytest.approx(
        cut
    )


def test_groups_predict_every_token_once_by_a_pure_division() -> None:
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        """Predicts the word that stands at a place, if it is not hidden, with a share of 1/2."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            seen.append(input_ids)
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 60)})

    text = " ".join(f"w{i}" for i in range(5, 45))
    found = masked_document_bits(Recorder(), tokenizer(), [text], rate=0.15, batch_size=3)
    hidden = torch.cat([ids == MASK for ids in seen])
    assert hidden.sum(0).tolist() == [0] + [1] * 40 + [0]
    assert hidden.sum(1).tolist() == [6] * 6 + [4]
    assert found.bits[0] == pytest.approx(40 * math.log2(60))
    again, seen[:] = list(seen), []
    torch.manual_seed(5)
    masked_document_bits(Recorder(), tokenizer(), [text], rate=0.15, batch_size=3)
    assert all(map(torch.equal, again, seen))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"forget_budget": "0.1"}, "--forget-budget is an option of causal models"),
        ({"loss_on": "all"}, "--loss-on is an option of causal models"),
        ({"adapter": "bottleneck"}, "--masked trains LoRA adapters"),
        ({"no_document_boundaries": ""}, "--masked always keeps documents apart"),
        ({"seq_length": "64"}, "--seq-length 64: the model has 40 positions"),
        ({"mask_rate": "1.5"}, "the part of the tokens to mask must be between 0 and 1, got 1.5"),
        ({"packing": "", "model": "Roberta"}, "--packing: this model does not keep the documents"),
    ],
)
def test_bad_input_is_one_message(
    options: dict[str, Any],
    tmp_path: Path,
    changed: dict[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = {name: options[name] for name in ("model", "data", "eval_data", "output")} | changed
    if values["model"] == "Roberta":
        values |= {"model": save_encoder(tmp_path / "roberta", "Roberta"), "seq_length": "32"}
    if "forget_budget" in changed:
        values["source_data"] = options["data"]
    arguments = ["pretrain", "--masked", "--steps", "2", "--quantization", "none"]
    for name, value in values.items():
        arguments += ["--" + name.replace("_", "-"), *([value] if value else [])]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.search("peftkern pretrain: error: .*" + re.escape(message), lines[-1]), lines
    assert not (Path(options["output"]) / "adapted" / "run.json").exists()


def test_models_that_cannot_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    from tests.finetune.conftest import save_tiny_model

    causal = str(save_tiny_model(tmp_path / "causal"))
    with pytest.raises(InputError, match="has no mask token: give an encoder"):
        continued_pretraining(FinetuneConfig(**options | {"model": causal}), mask_rate=0.15)
    whole = continued_pretraining(FinetuneConfig(**options | {"steps": 2}), mask_rate=0.15, quiet=True)
    assert whole.steps == 2
    with pytest.raises(InputError, match="is masked, and you go on without --masked"):
        continued_pretraining(FinetuneConfig(**options | {"steps": 2, "resume": True}))
    with pytest.raises(InputError, match="masks 0.15 of the tokens: give the same rate"):
        continued_pretraining(FinetuneConfig(**options | {"steps": 2, "resume": True}), mask_rate=0.3)
