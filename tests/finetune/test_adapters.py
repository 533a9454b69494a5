"""Kinds of adapter beside LoRA in whole runs: trained, resumed, put to use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from peftkern.__main__ import main
from peftkern.finetune import FinetuneConfig, FinetuneResult, InputError, finetune

from ..cases import nightly
from .test_resume import break_at, losses


@pytest.fixture
def options(options: dict[str, Any]) -> dict[str, Any]:
    """With --r at its default."""
    return {key: value for key, value in options.items() if key != "r"} | {"patch": True}


def run(options: dict[str, Any], **changes: Any) -> FinetuneResult:
    return finetune(FinetuneConfig(**(options | changes)), quiet=True)


def command(*arguments: str) -> int:
    return main(list(arguments))


@pytest.mark.parametrize(
    "adapter", ["bottleneck", pytest.param("par_bn[reduction_factor=8]", marks=pytest.mark.slow)]
)
def test_a_bottleneck_run_breaks_resumes_and_is_put_to_use(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter: str,
) -> None:
    options = options | {"adapter": adapter, "dropout": 0.1, "prompt": "The statement"}
    whole = run(options, output=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 5)
        run(options)
    result = run(options, resume=True)
    assert losses(options["output"]) == losses(whole.output)
    assert (result.perplexity_after, result.sample_after) == (whole.perplexity_after, whole.sample_after)
    before, after = result.perplexity_before, result.perplexity_after
    assert all(after[name] < before[name] for name in before)
    output = Path(options["output"])
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
    assert all(".bottleneck." in key for key in load_file(output / "adapter_model.safetensors"))
    card = (output / "README.md").read_text()
    assert (
        "# Bottleneck adapter for" in card
        and "peftkern.adapters.bottleneck.BottleneckModel.from_pretrained" in card
    )
    capsys.readouterr()
    assert (
        command(
            "evaluate", "--adapter", str(output), "--data", options["data"], "--eval-tokens", "512", "--base"
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "(base: " in shown
    assert (
        command("generate", "--adapter", str(output), "--prompt", result.sample_prompt, "--tokens", "4") == 0
    )
    assert capsys.readouterr().out.strip() == result.sample_after.strip()


@pytest.mark.parametrize(
    "adapter", nightly(["seq_bn", "scaled_par_bn", "bottleneck[size=5]"], quick=["scaled_par_bn"])
)
def test_every_named_bottleneck_trains(options: dict[str, Any], adapter: str) -> None:
    result = run(options, adapter=adapter, steps=2, gradient_checkpointing=True)
    assert result.steps == 2 and result.final_loss < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapter": "adapterhub"},
            "--adapter must be one of lora, bottleneck, double_seq_bn, seq_bn, par_bn, scaled_par_bn",
        ),
        (
            {"adapter": "seq_bn[reduction=3]"},
            r"--adapter seq_bn\[reduction=3\]: configuration: unknown keys reduction",
        ),
        (
            {"adapter": "bottleneck", "dora": True},
            "--dora is an option of LoRA, and --adapter is bottleneck: drop one of them",
        ),
        ({"adapter": "bottleneck", "targets": "q_proj"}, "--targets is an option of LoRA"),
        (
            {"adapter": "par_bn", "r": 8},
            r"--r 8 is the width of --adapter bottleneck; .* write par_bn\[size=8\]",
        ),
    ],
)
def test_options_that_do_not_go_together_are_told(
    options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**(options | changes))


def test_a_layer_that_is_not_there_is_told_before_training(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"does not fit .*: leave_out: got \[9\], the layers are 0 to 1"):
        run(options, adapter="bottleneck[leave_out=[9]]")
    assert not Path(options["output"]).exists()


@pytest.mark.parametrize(
    "adapter",
    [
        "prefix[tokens=6]",
        *(
            pytest.param(f"prefix[tokens=6,init={init}]", marks=pytest.mark.slow)
            for init in ("gate", "random")
        ),
    ],
)
def test_a_prefix_run_breaks_resumes_and_is_put_to_use(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter: str,
) -> None:
    options = options | {
        "adapter": adapter,
        "prompt": "The statement",
        "lr": 2e-2,
        "gradient_checkpointing": True,
    }
    whole = run(options, output=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, 5)
        run(options)
    result = run(options, resume=True)
    assert losses(options["output"]) == losses(whole.output)
    assert (result.perplexity_after, result.sample_after) == (whole.perplexity_after, whole.sample_after)
    before, after = result.perplexity_before, result.perplexity_after
    assert all(after[name] < before[name] for name in before)
    output = Path(options["output"])
    tensors = load_file(output / "adapter_model.safetensors")
    gated = {"gated_prompt_embeddings", "prompt_gate"}
    assert set(tensors) == (gated if "gate" in adapter else {"prompt_embeddings"})
    card = (output / "README.md").read_text()
    assert "# Prefix adapter for" in card and "peftkern.adapters.prefix.load_prefix" in card
    capsys.readouterr()
    assert (
        command(
            "evaluate", "--adapter", str(output), "--data", options["data"], "--eval-tokens", "512", "--base"
        )
        == 0
    )
    assert "(base: " in capsys.readouterr().out
    assert (
        command("generate", "--adapter", str(output), "--prompt", result.sample_prompt, "--tokens", "4") == 0
    )
    assert capsys.readouterr().out.strip() == result.sample_after.strip()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"adapter": "prefix[tokens=0]"}, "'tokens=0' is no option of a prefix"),
        ({"adapter": "prefix[init=best]"}, "init=text, random, zero, gate"),
        ({"adapter": "prefix[tokens=3"}, "bracket is not closed"),
        ({"adapter": "prefix", "r": 8}, "--r is no option of --adapter prefix"),
        ({"adapter": "prefix", "rslora": True}, "--rslora is an option of LoRA"),
        ({"adapter": "prefix", "layer_rates": 2.0}, "--layer-rates treats layers apart"),
    ],
)
def test_options_that_a_prefix_does_not_have(
    options: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words.replace("[", r"\[")):
        FinetuneConfig(**(options | changes))


def test_a_prefix_longer_than_the_data_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one\ntwo\n")
    with pytest.raises(InputError, match="the first 1000 rows of --data have 8 tokens, the prefix 32"):
        run(options, adapter="prefix", data=str(short), eval_data=options["data"])
