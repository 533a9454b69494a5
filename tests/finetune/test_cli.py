"""The command line: options, refusals before any heavy work, summary."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftkern import errors as errors_module
from peftkern.__main__ import main
from peftkern.finetune import FinetuneConfig, InputError
from peftkern.finetune import recipe as recipe_module
from peftkern.finetune.recipe import FinetuneResult

from .conftest import write_jsonl

pytestmark = pytest.mark.any_isa


def arguments(options: dict[str, Any], **changes: Any) -> list[str]:
    return ["finetune", *FinetuneConfig(**(options | changes)).to_arguments()]


def test_arguments_and_configuration_are_one_and_the_same(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {"eval_data": ("sample", "x.txt"), "targets": ("q_proj", "v_proj")}
    config = FinetuneConfig(**options, **lists, rslora=True, packing=False, prompt="a b")
    seen = []
    monkeypatch.setattr("peftkern.finetune.cli.finetune", lambda given: seen.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["finetune", *config.to_arguments()])
    assert seen == [config]


def test_a_run_stored_before_the_kinds_of_adapter_is_one_of_lora() -> None:
    config = FinetuneConfig(data="x.txt").resolved()
    stored = {key: value for key, value in config.to_dict().items() if key != "adapter"}
    assert config.differences(stored) == []


def test_defaults_are_the_sample_within_minutes() -> None:
    config = FinetuneConfig().resolved()
    assert (config.model, config.data, config.eval_data) == ("sample", ("sample",), ("sample",))
    assert config.steps * config.batch_size * config.grad_accumulation * config.seq_length <= 60 * 512
    assert FinetuneConfig(data="other.txt").resolved().epochs == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "--r must be a whole number of at least 1, got 0"),
        ({"lr": -1.0}, "--lr must be greater than 0"),
        ({"seed": -1}, "--seed must be a whole number of at least 0, got -1"),
        ({"seed": 2**40}, r"--seed must be less than 2\^31"),
        ({"sample_tokens": -1}, "--sample-tokens must be a whole number of at least 0"),
        ({"epochs": math.inf}, "--epochs must be greater than 0 and finite, got inf"),
        ({"lr": math.nan}, "--lr must be greater than 0 and finite, got nan"),
        ({"weight_decay": math.nan}, "--weight-decay must be at least 0 and finite, got nan"),
        ({"dropout": math.nan}, "--dropout must be at least 0"),
        ({"prompt": "half \ud83d"}, "--prompt must be valid Unicode"),
        ({"model": ""}, "--model must not be empty"),
        ({"data": ()}, "--data needs at least one value"),
        ({"adapter": "adapterhub"}, "--adapter must be one of lora"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and less than 1"),
        ({"quantization": "int3"}, "--quantization must be one of nf4, fp4, none"),
        ({"steps": 3, "epochs": 1.0}, "--steps or --epochs, not both"),
        ({"resume": True, "overwrite": True}, "not both"),
        ({"seq_length": 1}, "--seq-length must be a whole number of at least 2"),
        ({"data": "x.txt", "eval_fraction": 0.0}, "--eval-data"),
        ({"compare": True, "patch": False}, "drop --no-patch"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**changes)


def test_run_prints_a_summary(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(options)) == 0
    printed = capsys.readouterr()
    for expected in (
        "before:",
        "after:",
        "Perplexity (held-out):",
        " -> ",
        "tokens/s",
        "Peak memory:",
        options["output"],
    ):
        assert expected in printed.out
    assert "6/6" in printed.err and "loss" in printed.err and "tok/s" in printed.err


@pytest.mark.parametrize(("after", "status"), [((60.0, 90.0), 2), ((60.0, 50.0), 0), ((15.0, 90.0), 0)])
def test_a_run_that_ends_far_worse_than_it_began_is_an_error(
    after: tuple[float, float],
    status: int,
    options: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The tiny model's logits are too flat for real steps to get there.
    texts = {"sample_prompt": "", "sample_before": "", "sample_after": "", "output": "here"}
    numbers = dict.fromkeys(
        ("final_loss", "steps", "tokens", "tokens_per_second", "peak_memory", "train_seconds"), 1
    )
    before, after = {"held-out": 20.0, "source": 30.0}, dict(zip(("held-out", "source"), after, strict=True))
    result = FinetuneResult(perplexity_before=before, perplexity_after=after, **texts, **numbers)
    monkeypatch.setattr("peftkern.finetune.cli.finetune", lambda config: result)
    assert main(arguments(options)) == status
    printed = capsys.readouterr()
    assert "Perplexity (held-out):" in printed.out
    if status:
        assert (
            "the run diverged" in printed.err
            and "held-out 20.00 -> 60.00" in printed.err
            and "lower --lr" in printed.err
        )
    else:
        assert not printed.err


def test_full_output_folder_is_refused_before_the_model_is_touched(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(options["output"])
    output.mkdir()
    (output / "thesis.doc").write_text("years of work")
    monkeypatch.setattr(recipe_module._Run, "_trainer", lambda *_: pytest.fail("heavy work was begun"))
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        assert main(arguments(options, **flags)) == 2
        assert "exists and is not empty: empty it, or name another folder" in capsys.readouterr().err
    assert (output / "thesis.doc").read_text() == "years of work"


def test_finished_run_is_overwritten_on_request_only(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(options)) == 0
    assert main(arguments(options)) == 2
    assert "go on with --resume, start again with --overwrite" in capsys.readouterr().err
    assert main(arguments(options, overwrite=True, steps=2)) == 0
    assert len((Path(options["output"]) / "metrics.jsonl").read_text().splitlines()) == 2


def test_missing_package_names_the_extra(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = errors_module.find_spec
    monkeypatch.setattr(errors_module, "find_spec", lambda name: None if name == "trl" else original(name))
    assert main(arguments(options)) == 2
    assert (
        "needs trl, which is not installed: run pip install 'peftkern[finetune]'" in capsys.readouterr().err
    )


# a process of its own, whose files are limited; in test_folder.py this process finds the disk full
@pytest.mark.slow
def test_full_disk_leaves_nothing_half_written(options: dict[str, Any], tmp_path: Path) -> None:
    # Files over the limit cannot be written, as on a full disk; the adapter and the optimizer's state are
    # larger.
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    data = write_jsonl(tmp_path / "few.jsonl", [{"text": f"row {i} of a few"} for i in range(40)])
    command = [sys.executable, "-m", "peftkern", *arguments(options, data=data)]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert (
        "could not write" in done.stderr
        and "free disk space" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list(Path(options["output"]).rglob(".incomplete-*"))
    assert not list(Path(options["output"]).glob("checkpoints/checkpoint-*"))


def test_import_of_the_command_needs_no_extra_package() -> None:
    code = (
        "import sys, peftkern.__main__; from peftkern.finetune import FinetuneConfig; print([m for m in "
        "sys.modules if m in "
    )
    code += "('transformers', 'peft', 'trl', 'datasets', 'bitsandbytes', 'matplotlib')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
