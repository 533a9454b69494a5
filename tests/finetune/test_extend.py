"""--resume of another run than the stored one: what is refused, what may change, and how a finished run grows
longer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from peftkern.finetune import FinetuneConfig, InputError, finetune
from peftkern.finetune import base as base_module
from peftkern.finetune import trainer as trainer_module
from peftkern.finetune.base import base_changes, base_fingerprint

from ..cases import each_choice

pytestmark = pytest.mark.any_isa


@pytest.fixture
def options(options: dict[str, Any]) -> dict[str, Any]:
    """On our own kernels; 4 sequences a step."""
    return options | {"patch": True, "grad_accumulation": 2, "steps": 4}


def run(options: dict[str, Any], **changes: Any) -> Any:
    return finetune(FinetuneConfig(**(options | changes)), quiet=True)


def rows(output: str | Path, *keys: str) -> list[tuple[Any, ...]]:
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [tuple(row[key] for key in keys) for row in map(json.loads, lines)]


def test_extended_run_equals_one_of_that_length_from_the_start(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """With a rate that does not depend on the length; the data go on where they were, over the end of an
    epoch."""
    constant = options | {"schedule": "constant_with_warmup", "warmup": 0.0, "dropout": 0.1}
    whole = run(constant, steps=9, output=str(tmp_path / "whole"))
    first = run(constant, steps=4)
    extended = run(constant, steps=9, resume=True)
    keys = ("step", "loss", "grad_norm", "lr", "tokens")
    assert rows(extended.output, *keys) == rows(whole.output, *keys)
    assert extended.perplexity_after == whole.perplexity_after != first.perplexity_after
    assert extended.perplexity_before == first.perplexity_before


@pytest.mark.slow
def test_extension_follows_the_schedule_of_the_new_length(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(options, steps=8, output=str(tmp_path / "whole"))
    run(options, steps=4)
    finetune(FinetuneConfig(**(options | {"steps": 8, "resume": True})))
    assert rows(options["output"], "lr")[4:] == rows(whole.output, "lr")[4:]
    assert rows(options["output"], "lr")[:4] != rows(whole.output, "lr")[:4]
    said = capsys.readouterr().err
    assert (
        "--steps 8 (was 4)" in said
        and "follows the cosine schedule of a run of 8 steps from step 5 on" in said
    )
    record = json.loads((Path(options["output"]) / "run.json").read_text())
    assert record["config"]["steps"] == 8 and record["changes"] == [
        {"after_step": 4, "options": {"steps": [4, 8]}}
    ]
    assert run(options, steps=8, resume=True).steps == 8


@pytest.mark.slow
def test_extension_by_epochs(options: dict[str, Any]) -> None:
    first = run(options, steps=4)
    with pytest.raises(InputError, match=r"has trained 4 steps already, more than --epochs 0\.01"):
        run(options, steps=None, epochs=0.01, resume=True)
    assert json.loads((Path(options["output"]) / "result.json").read_text())["steps"] == first.steps == 4
    longer = run(options, steps=None, epochs=0.1, resume=True)
    assert longer.steps > 4


def test_finished_run_refuses_what_it_cannot_become(options: dict[str, Any], tmp_path: Path) -> None:
    run(options)
    for changes, message in (
        ({"lr": 0.1}, r"--lr: 0\.005 in the stored run, 0\.1 now"),
        ({"r": 8, "steps": 8}, r"--r: 4 in the stored run, 8 now"),
        ({"steps": 2}, "has trained 4 steps already, more than --steps 2"),
        ({"prompt": "Once"}, "--prompt"),
        ({"batch_size": 4}, "2 x 2 in the stored run, 4 x 2 now"),
    ):
        with pytest.raises(InputError, match=message):
            run(options, resume=True, **changes)
    assert run(options, resume=True).steps == 4
    shutil.rmtree(Path(options["output"]) / "checkpoints")
    with pytest.raises(
        InputError, match="finished run without checkpoints, and so without the optimizer's state"
    ):
        run(options, steps=8, resume=True)
    assert run(options, resume=True).steps == 4


def test_what_the_memory_advice_names_is_accepted(options: dict[str, Any], tmp_path: Path) -> None:
    whole = run(options, steps=8, output=str(tmp_path / "whole"))
    run(options, steps=4)
    saved = {"batch_size": 1, "grad_accumulation": 4, "gradient_checkpointing": True}
    resumed = run(options, steps=8, resume=True, **saved)
    after = [row[0] for row in rows(resumed.output, "loss")[4:]]
    # The same rows in the same order, at the rates of 8 steps; only the rates of the first four differ.
    assert [row[0] for row in rows(resumed.output, "tokens")] == [
        row[0] for row in rows(whole.output, "tokens")
    ]
    assert after == pytest.approx([row[0] for row in rows(whole.output, "loss")[4:]], rel=0.02)


def test_smaller_batches_take_the_same_rows(options: dict[str, Any], tmp_path: Path) -> None:
    constant = options | {"schedule": "constant_with_warmup", "warmup": 0.0}
    whole = run(constant, steps=8, output=str(tmp_path / "whole"))
    run(constant, steps=4)
    resumed = run(constant, steps=8, resume=True, batch_size=4, grad_accumulation=1)
    assert [row[0] for row in rows(resumed.output, "loss")] == pytest.approx(
        [row[0] for row in rows(whole.output, "loss")], rel=1e-4
    )


CHANGES = {"model.safetensors": b"\x00\x01", "tokenizer_config.json": b" "}


@pytest.mark.parametrize(("steps", "name"), each_choice([4, 8], CHANGES))
def test_changed_base_is_refused(options: dict[str, Any], tmp_path: Path, steps: int, name: str) -> None:
    change = CHANGES[name]
    model = tmp_path / "base"
    shutil.copytree(options["model"], model)
    changed = options | {"model": str(model)}
    run(changed)
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: -len(change)] + change)
    with pytest.raises(
        InputError, match=rf"{name} of the base .* has changed\nGive the same options, data and base model"
    ):
        run(changed, resume=True, steps=steps)
    (model / name).write_bytes(content)
    assert run(changed, resume=True).steps == 4


def test_fingerprint_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"hidden_size": 64, "rope_theta": 1e4, "transformers_version": "5.17.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "README.md").write_text("words")
    stored = base_fingerprint(str(tmp_path))
    assert set(stored) == {"config.json", "model.safetensors"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "5.24.0"}))
    assert base_changes(stored, str(tmp_path)) == []
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    assert base_changes(stored, str(tmp_path)) == [f"config.json of the base {tmp_path} has changed"]
    (tmp_path / "model.safetensors").unlink()
    assert f"model.safetensors of the base {tmp_path} is gone" in base_changes(stored, str(tmp_path))
    assert (
        base_fingerprint("nobody/no-such-model") == {} and base_changes(stored, "nobody/no-such-model") == []
    )
    monkeypatch.setattr(base_module, "_WHOLE", 1024)
    large = tmp_path / "large.gguf"
    large.write_bytes(bytes(8 << 20))
    before = base_fingerprint(str(large))
    large.write_bytes(bytes((8 << 20) - 1) + b"\x01")
    assert base_changes(before, str(large)) == [f"large.gguf of the base {large} has changed"]
    part = tmp_path / "m-00001-of-00002.gguf"
    for path in (part, tmp_path / "m-00002-of-00002.gguf"):
        path.write_bytes(b"GGUF")
    assert set(base_fingerprint(str(part))) == {"m-00001-of-00002.gguf", "m-00002-of-00002.gguf"}


def test_interrupted_extension_is_gone_on_with(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the longer run is complete, the adapter and the result in the folder are those of the shorter
    one."""
    first = run(options, steps=4)
    adapter = (Path(options["output"]) / "adapter_model.safetensors").read_bytes()
    original = trainer_module.RecipeTrainer.training_step

    def breaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_module.RecipeTrainer, "training_step", breaking)
        run(options, steps=8, resume=True)
    assert json.loads((Path(options["output"]) / "result.json").read_text())["steps"] == first.steps
    assert (Path(options["output"]) / "adapter_model.safetensors").read_bytes() == adapter
    assert run(options, steps=8, resume=True).steps == 8
    assert (Path(options["output"]) / "adapter_model.safetensors").read_bytes() != adapter
    assert run(options, steps=8, resume=True).steps == 8


@pytest.mark.slow
def test_extension_given_up_before_its_first_checkpoint(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(options, steps=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            trainer_module.RecipeTrainer,
            "training_step",
            lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()),
        )
        run(options, steps=8, resume=True)
    again = run(options, steps=4, resume=True)
    assert again.steps == 4 and again.perplexity_after == first.perplexity_after
    assert run(options, steps=4, resume=True) == again
