"""`peftkern arithmetic`: what it writes, and what it says where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peftkern.__main__ import main
from peftkern.adapters.arithmetic import combine, read_adapter

from .kinds import KINDS, loaded, output, saved
from .test_checkpoints import flat, read, save, tensors

pytestmark = pytest.mark.any_isa


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the adapters a and b, in which the command runs."""
    saved(KINDS["lora"], tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command that ends with status 2 and writes nothing."""
    before = sorted(Path().iterdir())
    capsys.readouterr()
    assert main(["arithmetic", *arguments]) == 2
    assert sorted(Path().iterdir()) == before
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("peftkern arithmetic: error: ")
        and "Traceback" not in captured.err
        and not captured.out
    )
    return captured.err.removeprefix("peftkern arithmetic: error: ")


def test_adapters_by_folder_and_by_name(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arithmetic", "a + 0.5*b", "--output", "out"]) == 0
    assert capsys.readouterr().out == "out: 6 modules of ranks 3 to 7; nothing was cut\n"
    (folders / "a").rename(folders / "the first")
    assert main(["arithmetic", "x + 0.5*y", "x=the first", "y=b", "--output", "named"]) == 0
    assert main(["arithmetic", "'the first' + 0.5*b", "--output", "quoted"]) == 0
    for name in ("named", "quoted"):
        assert (folders / name / "adapter_model.safetensors").read_bytes() == (
            folders / "out" / "adapter_model.safetensors"
        ).read_bytes()
    record = json.loads((folders / "named" / "arithmetic.json").read_text())
    assert record["expression"] == "x + 0.5*y" and record["adapters"] == {"x": "the first", "y": "b"}
    exact = combine("a + 0.5*b", {"a": read_adapter("the first"), "b": read_adapter("b")}).adapter
    assert torch.equal(
        read_adapter("out").modules["model.layers.0.self_attn.v_proj"].b,
        exact.modules["model.layers.0.self_attn.v_proj"].b,
    )
    output(loaded(KINDS["lora"], folders / "out"))


def test_options_reach_the_merge(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "ties", "--density", "0.4", "--space", "weights", "--rank", "3", "--scale", "0.7"]
    assert main(["arithmetic", "(-a) + b", "--output", "out", *options]) == 0
    assert "relative error at most" in capsys.readouterr().out
    record = json.loads((folders / "out" / "arithmetic.json").read_text())
    assert record["method"] == {"name": "ties", "density": 0.4, "drop": 0.9, "seed": 0, "scale": 0.7}
    assert max(module.rank for module in read_adapter("out").modules.values()) == 3


def test_an_earlier_result_is_replaced_only_when_asked(
    folders: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["arithmetic", "a", "--output", "out"]) == 0
    assert "give --overwrite" in refused(capsys, "b", "--output", "out")
    assert main(["arithmetic", "b", "--output", "out", "--overwrite"]) == 0
    assert read_adapter("out").config["r"] == 3
    assert "no earlier result" in refused(capsys, "a", "--output", "b", "--overwrite"), (
        "an input is none of ours to replace"
    )


def test_the_character_is_pointed_at(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "a + 0.5**b", "--output", "out").splitlines()
    assert lines == [
        "expression, character 9: expected an adapter's name or a number, got '*'",
        "    a + 0.5**b",
        "            ^",
    ]


def test_full_checkpoints(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tensors(0)
    tuned = tensors(1, around=base)
    save(tmp_path / "base", base)
    save(tmp_path / "a", tuned)
    assert main(["arithmetic", "0.5*a", "--base", "base", "--output", "out", "--dtype", "bf16"]) == 0
    assert torch.equal(
        flat(read(tmp_path / "out")),
        (0.5 * flat(base) + 0.5 * flat(tuned)).bfloat16().float(),
    )
    assert "--base is needed" in refused(capsys, "0.5*a", "--output", "more")
    assert "--rank is for adapters" in refused(
        capsys,
        "a",
        "--base",
        "base",
        "--rank",
        "3",
        "--output",
        "more",
    )
    assert "exists" in refused(capsys, "a", "--base", "base", "--output", "out")


def broken(folders: Path, how: str) -> None:
    config = folders / "b" / "adapter_config.json"
    values = json.loads(config.read_text())
    weights = folders / "b" / "adapter_model.safetensors"
    match how:
        case "base":
            config.write_text(json.dumps(values | {"base_model_name_or_path": "another"}))
            first = folders / "a" / "adapter_config.json"
            first.write_text(json.dumps(json.loads(first.read_text()) | {"base_model_name_or_path": "one"}))
        case "kind":
            config.write_text(json.dumps(values | {"peft_type": "PREFIX_TUNING"}))
        case "rank":
            config.write_text(json.dumps(values | {"r": 5}))
        case "json":
            config.write_text("{")
        case "weights":
            weights.write_bytes(weights.read_bytes()[:100])
        case "pissa":
            config.write_text(json.dumps(values | {"init_lora_weights": "pissa"}))
        case "unknown":
            config.write_text(json.dumps(values | {"use_qalora": True}))
        case "shape":
            from safetensors.torch import load_file, save_file

            tensors = load_file(weights)
            save_file(
                {n: t[:, :-1].contiguous() if "v_proj.lora_A" in n else t for n, t in tensors.items()},
                weights,
            )


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("base", "different bases: a of one, b of another"),
        ("kind", "of kind PREFIX_TUNING; only LoRA"),
        ("rank", "has rank 3 in the file, 5 in adapter_config.json"),
        ("json", "adapter_config.json is damaged"),
        ("weights", "adapter_model.safetensors is damaged"),
        ("pissa", "init_lora_weights='pissa' also changed the base"),
        ("unknown", "its configuration has use_qalora"),
        (
            "shape",
            (
                "they do not fit each other at model.layers.0.self_attn.v_proj: a has A (4, 32) and B (16,"
                " 4), b has A (3, 31)"
            ),
        ),
    ],
)
def test_bad_adapters(folders: Path, capsys: pytest.CaptureFixture[str], how: str, words: str) -> None:
    broken(folders, how)
    assert words in refused(capsys, "a + b", "--output", "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a + c"], "there is no folder c; say where it is with c=PATH"),
        (["a + b", "c=b"], "c=b is not in the expression, which names a, b"),
        (["a", "b"], "got 'b', expected NAME=PATH"),
        (["a", "a=b", "a=a"], "a is given two folders"),
        (["a", "--density", "2", "--method", "ties"], "density: got 2.0"),
        (["a", "--rank", "0"], "rank: got 0"),
        (["a", "--dtype", "bf16"], "--dtype is for full checkpoints"),
    ],
)
def test_bad_commands(
    folders: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    assert words in refused(capsys, *arguments, "--output", "out")


def test_a_folder_that_is_neither(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "empty").mkdir()
    assert "neither an adapter" in refused(capsys, "empty", "--output", "out")
    assert "it has no adapter_config.json" in refused(capsys, "a + empty", "--output", "out")


def test_a_missing_package_is_named(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkern.adapters.arithmetic import commands

    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "peft" else name)
    assert "it needs peft: run pip install 'peftkern[finetune]'" in refused(capsys, "a", "--output", "out")
