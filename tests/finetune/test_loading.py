"""Models that are cut, garbled, incomplete or something else: one message each, before anything is
trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkern.finetune import FinetuneConfig, InputError, finetune
from peftkern.finetune.conversion import dense_folder
from peftkern.finetune.model import load_model, load_tokenizer, resolve_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_model: str, tmp_path: Path) -> Path:
    """A model that may be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def load(folder: Path, **options: object) -> object:
    path = resolve_model(str(folder))
    load_tokenizer(path)
    return load_model(
        path, FinetuneConfig(model=str(folder), dtype="fp32", patch=False, **options).resolved()
    )


def cut(folder: Path, share: float, name: str = WEIGHTS) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def change(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def without(folder: Path, part: str) -> None:
    weights = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if part not in name}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder, 0.6), r"model\.safetensors: cut or padded"),
        (lambda folder: cut(folder, 0), r"model\.safetensors: empty"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 99),
            r"model\.safetensors: cut, or no safetensors file",
        ),
        (
            lambda folder: (folder / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b"{" * 9),
            r"model\.safetensors: its header is garbled",
        ),
        (lambda folder: cut(folder, 0.5, "config.json"), r"config\.json:\d+: not JSON"),
        (lambda folder: cut(folder, 0.5, "tokenizer.json"), r"tokenizer\.json:\d+: not JSON"),
        (
            lambda folder: change(folder, "config.json", intermediate_size=96),
            "other shapes than config.json says: 6 weights",
        ),
        (lambda folder: change(folder, "config.json", hidden_size="wide"), "could not be loaded"),
        (lambda folder: change(folder, "config.json", model_type="nothing-known"), "nothing-known"),
        (lambda folder: change(folder, "config.json", model_type="t5"), "no causal language model"),
        (
            lambda folder: (folder / "tokenizer.json").write_text(
                '{"version": "1.0", "model": {"type": "none"}}'
            ),
            r"could not be loaded: .*(tokenizer files|tokenizer)",
        ),
        (pickled, "could not be loaded"),
        (
            lambda folder: without(folder, "layers.1.mlp"),
            r"lack 3 weights \(model\.layers\.1\.mlp\.down_proj\.weight",
        ),
        (lambda folder: without(folder, "embed_tokens"), r"lack .*embed_tokens"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds a LoRA adapter"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
    ],
)
def test_one_message_names_the_fault(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(InputError, match=message) as error:
        load(copy)
    assert len(str(error.value)) < 1200


def test_output_of_a_run_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(InputError, match="give its base model .--model some/base."):
        resolve_model(str(tmp_path))


def test_weights_that_are_not_used_are_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(
        load_file(copy / WEIGHTS) | {"model.layers.2.mlp.up_proj.weight": torch.zeros(1)},
        copy / WEIGHTS,
        metadata={"format": "pt"},
    )
    load(copy)
    assert "not used from its files: 1 weight (model.layers.2.mlp.up_proj.weight)" in capsys.readouterr().err


def test_code_of_the_model_runs_on_request_only(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = (
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nfrom transformers import "
        "LlamaConfig\n\n\nclass Own(LlamaConfig):\n"
    )
    (copy / "own.py").write_text(code + "    model_type = 'own'\n")
    change(copy, "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_tokenizer(str(copy))
        load(copy)
    assert not mark.exists()
    with pytest.raises(
        InputError, match="could not be loaded"
    ):  # the configuration is there now, but no model class
        load(copy, trust_remote_code=True)
    assert mark.exists()


@pytest.mark.parametrize("targets", [("q_proj", "nonsense"), ("nonsense",), ("roj",)])
def test_every_target_must_be_there(tiny_model: str, targets: tuple[str, ...]) -> None:
    with pytest.raises(
        InputError,
        match=rf"--targets {targets[-1]}: .* has no layer of that name; it has down_proj, gate_proj, k_proj",
    ):
        load(Path(tiny_model), targets=targets)


def test_all_linear_stands_alone() -> None:
    with pytest.raises(InputError, match="give it alone, or drop it and keep q_proj"):
        FinetuneConfig(targets=("all-linear", "q_proj"))


def test_dora_learns_magnitudes(tiny_model: str) -> None:
    names = [
        name
        for name, parameter in load(Path(tiny_model), dora=True, r=2).named_parameters()
        if parameter.requires_grad
    ]
    assert sum("lora_magnitude_vector" in name for name in names) == 14


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.gguf", b"", "is empty"),
        ("page.gguf", b"<html>not found</html>", "is no GGUF file .it begins with b'<htm'"),
        ("garbled.gguf", b"GGUF" + b"\xff" * 400, "could not be loaded"),
        ("cut.GGUF", b"GGUF\x03\x00\x00\x00", "could not be loaded"),
        ("big-00001-of-00003.gguf", b"GGUF", "one of 3 parts: join them"),
    ],
)
def test_gguf_that_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        resolve_model(str(path))
    with pytest.raises(InputError, match=message):
        dense_folder(path)
    assert not list((tmp_path / "cache").glob("models/*"))


def test_other_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a file, but no .gguf file: give the folder"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_weights_that_are_no_numbers(copy: Path, tmp_path: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    save_file(
        weights | {"model.norm.weight": weights["model.norm.weight"] * torch.nan},
        copy / WEIGHTS,
        metadata={"format": "pt"},
    )
    data = tmp_path / "rows.txt"
    data.write_text("some lines of text\n" * 40)
    options = {
        "model": str(copy),
        "data": str(data),
        "output": str(tmp_path / "out"),
        "quantization": "none",
        "steps": 1,
    }
    with pytest.raises(InputError, match="its logits are NaN or infinite before training"):
        finetune(FinetuneConfig(**options, seq_length=32, dtype="fp32"), quiet=True)
