"""Where the native extension is missing or of another version: the reason in words, and one warning when the
slow reference runs."""

from __future__ import annotations

import importlib
import types
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import peftkern
from peftkern import functional
from peftkern.runtime import backends

FIX = "pip install -e ."


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """What importing the extension gives: the first item, raised where it is an error."""
    gives: list = [ImportError("No module named 'peftkern._C'")]

    def load(name: str, package: str | None = None) -> types.ModuleType:
        if name != ".._C":
            return original(name, package)
        if isinstance(gives[0], Exception):
            raise gives[0]
        return gives[0]

    original = importlib.import_module
    caches = (backends._load_native, backends._warn_of_reference)
    monkeypatch.setattr(importlib, "import_module", load)
    for cached in caches:
        cached.cache_clear()
    yield gives
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def _call() -> torch.Tensor:
    return functional.linear_4bit(torch.ones(2, 8), torch.ones(3, 8))


def test_one_warning_names_the_fix(extension: list) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert all(torch.equal(_call(), torch.full((2, 3), 8.0)) for _ in range(3))
    ours = [w for w in caught if "peftkern" in str(w.message)]
    assert len(ours) == 1 and ours[0].category is RuntimeWarning
    assert "the slow reference runs" in str(ours[0].message) and FIX in str(ours[0].message)


def test_the_standard_filter_decides(extension: list) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeWarning, match="the slow reference runs"):
                _call()
        warnings.filterwarnings("ignore", message="peftkern: the slow reference")
        _call()


def test_asking_for_the_reference_is_no_surprise(extension: list) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with backends.use_backend("reference"):
            _call()


@pytest.mark.filterwarnings("ignore:peftkern. the slow reference")
def test_explain_and_patch_say_what_is_missing(extension: list) -> None:
    text = peftkern.explain(torch.ones(4, 64), 64, 64)
    assert text.startswith("reference: ") and "the native extension is not built" in text and FIX in text
    model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False))
    assert "the native extension is not built" in peftkern.patch(model, dense=True).summary


def test_an_extension_of_another_version_is_named_and_not_called(extension: list) -> None:
    extension[0] = types.SimpleNamespace(abi_version=backends.ABI_VERSION - 1)
    ok, reason = backends.available("cpu")
    assert not ok and f"another version ({backends.ABI_VERSION - 1}, not {backends.ABI_VERSION})" in reason
    assert reason.endswith("run pip install -e . again")
    with pytest.raises(RuntimeError, match="of another version"):
        backends.native()


def test_with_the_extension_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _call()
    assert peftkern.explain(torch.ones(4, 64), 64, 64).startswith("cpu: native kernels")
