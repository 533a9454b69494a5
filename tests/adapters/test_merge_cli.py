"""`peftkern merge`: what it writes loads and computes the same; what it refuses, leaving nothing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import peftkern
from peftkern.__main__ import main
from tests.adapters import merging
from tests.finetune.conftest import save_tiny_model
from tests.patching import models

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(2))
TOKENS = ["--seq-length", "32", "--probe-tokens", "128"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """base/: a tiny model; adapter/: a LoRA adapter on it, as PEFT saves one; text.txt."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("merge")
    base = save_tiny_model(folder / "base", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base)
    options = models.config(target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)
    model = models.peft.get_peft_model(model, options)
    merging.fill(model, size=1.0)
    model.save_pretrained(folder / "adapter")
    (folder / "text.txt").write_text("In the beginning was the word. " * 200, encoding="utf-8")
    return folder


def run(*arguments: Any) -> int:
    return main(["merge", *map(str, arguments)])


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).eval()
    if (folder / "adapter").is_dir():
        model = models.peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    return model


def adapter_logits(made: Path) -> torch.Tensor:
    """Of the adapter on its 4-bit base."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options = dict(dtype=torch.float32, device_map={"": "cpu"}, quantization_config=four_bit)
    base = AutoModelForCausalLM.from_pretrained(made / "base", **options)
    model = models.peft.PeftModel.from_pretrained(base, made / "adapter").eval()
    peftkern.patch(model)
    return merging.logits(model, IDS)


@pytest.mark.parametrize("form", ["dense", "requantize", "feedback", "residual"])
def test_what_is_written_loads_and_computes_what_was_measured(form, made, tmp_path, capsys):
    output = tmp_path / "merged"
    common = ["--adapter", made / "adapter", "--output", output, "--dtype", "fp32", *TOKENS]
    assert run(*common, "--form", form, "--probe", made / "text.txt", "--rank", "2") == 0
    told = capsys.readouterr().out
    record = json.loads((output / "merge.json").read_text())
    assert record["form"] == form and record["verdict"] in told and len(record["layers"]) == 6
    assert (output / "merge.png").stat().st_size > 1000 and (output / "tokenizer.json").is_file()
    model = loaded(output)
    linear = [module for module in model.modules() if isinstance(module, models.bnb.nn.Linear4bit)]
    assert len(linear) == (0 if form == "dense" else 14)
    if linear:
        peftkern.patch(model)
    want = adapter_logits(made)
    error = (merging.logits(model, IDS) - want).norm() / want.norm()
    assert error < {"dense": 1e-4, "requantize": 0.3, "feedback": 0.3, "residual": 0.3}[form]
    assert not list(tmp_path.glob(".incomplete*"))


def test_a_dense_model_on_the_original_weights_has_them_everywhere(made, tmp_path):
    output = tmp_path / "merged"
    options = ["--adapter", made / "adapter", "--output", output, "--dtype", "fp32"]
    assert run(*options, "--base", "original") == 0
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    model = models.peft.PeftModel.from_pretrained(model, made / "adapter").eval()
    got, want = merging.logits(loaded(output), IDS), merging.logits(model, IDS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compare_writes_nothing_and_auto_takes_the_best(made, tmp_path, capsys):
    common = ["--adapter", made / "adapter", "--probe", made / "text.txt", "--dtype", "fp32", *TOKENS]
    before = set(tmp_path.rglob("*"))
    assert run(*common, "--form", "compare") == 0
    told = capsys.readouterr().out
    assert "dense on the original weights" in told and "lost of the gain" in told
    assert set(tmp_path.rglob("*")) == before
    status, output = run(*common, "--form", "auto", "--output", tmp_path / "auto"), capsys.readouterr()
    if status == 2:
        assert "--form auto finds none to take" in output.err and not (tmp_path / "auto").exists()
    else:
        assert (tmp_path / "auto" / "config.json").is_file()


def test_an_earlier_output_is_replaced_on_request_only(made, tmp_path, capsys):
    output = tmp_path / "merged"
    common = ["--adapter", made / "adapter", "--output", output, "--dtype", "fp32"]
    assert run(*common) == 0
    first = (output / "model.safetensors").stat().st_mtime_ns
    assert run(*common) == 2 and "give --overwrite" in capsys.readouterr().err
    assert (output / "model.safetensors").stat().st_mtime_ns == first
    assert run(*common, "--overwrite") == 0
    assert (output / "model.safetensors").stat().st_mtime_ns > first
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not lose")
    assert run(*common[:2], "--output", mine, "--overwrite") == 2
    assert "no merge wrote it" in capsys.readouterr().err
    assert (mine / "thesis.txt").read_text() == "do not lose"


BAD = {
    "rank": (["--rank", "0"], "--rank must be at least 1, got 0"),
    "tokens": (["--probe-tokens", "1"], "--probe-tokens must be at least 2"),
    "auto": (["--form", "auto"], "--form auto needs --probe"),
    "feedback": (["--form", "feedback"], "--form feedback needs --probe"),
    "no adapter": (["--adapter", "nowhere"], "has no adapter_config.json"),
    "no text": (["--probe", "nowhere.txt"], "nowhere.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_message_and_leave_nothing(name, made, tmp_path, capsys):
    arguments, message = BAD[name]
    given = [] if "--adapter" in arguments else ["--adapter", made / "adapter"]
    assert run(*given, "--output", tmp_path / "merged", "--dtype", "fp32", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "merged").exists()


def test_output_is_needed_and_may_not_be_the_adapter(made, capsys):
    assert run("--adapter", made / "adapter") == 2
    assert "give --output" in capsys.readouterr().err
    assert run("--adapter", made / "adapter", "--output", made / "adapter", "--overwrite") == 2
    assert "is the folder of the adapter or of its base" in capsys.readouterr().err


def test_no_space_is_said_before_anything_is_written(made, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    assert run("--adapter", made / "adapter", "--output", tmp_path / "merged", "--dtype", "fp32") == 2
    error = capsys.readouterr().err
    assert "needs about" in error and "free some" in error and not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(made, tmp_path, capsys, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def full(self, folder, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    assert run("--adapter", made / "adapter", "--output", tmp_path / "merged", "--dtype", "fp32") == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "Nothing incomplete was left" in error
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_refused(made, tmp_path, capsys):
    other = save_tiny_model(tmp_path / "other", hidden=32, dtype=torch.bfloat16)
    assert run("--adapter", made / "adapter", "--output", tmp_path / "merged", "--model", other) == 2
    assert "could not be loaded onto this base" in capsys.readouterr().err
    run_folder = tmp_path / "run"
    shutil.copytree(made / "adapter", run_folder)
    record = {"config": {"model": str(made / "base")}, "base": {"model.safetensors": "0" * 16}}
    (run_folder / "run.json").write_text(json.dumps(record))
    assert run("--adapter", run_folder, "--output", tmp_path / "merged", "--dtype", "fp32") == 2
    error = capsys.readouterr().err
    assert "was trained on another base: model.safetensors of the base" in error and "--other-base" in error
    assert not (tmp_path / "merged").exists()
    options = ["--adapter", run_folder, "--output", tmp_path / "merged", "--dtype", "fp32", "--other-base"]
    assert run(*options) == 0


def test_nan_in_the_adapter_is_named(made, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(made / "adapter", broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    assert run("--adapter", broken, "--output", tmp_path / "merged", "--dtype", "fp32") == 2
    assert "holds NaN or inf" in capsys.readouterr().err and not (tmp_path / "merged").exists()
