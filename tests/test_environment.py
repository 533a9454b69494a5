"""`peftkern env`: complete, honest about what is missing, and without the paths or secrets of the machine it
ran on."""

from pathlib import Path

import pytest
import torch

import peftkern
from peftkern import environment, functional
from peftkern.runtime import backends


def rows(text):
    return {line[: line.index("  ")]: line[line.index("  ") :].strip() for line in text.splitlines()}


def test_report_names_what_a_bug_report_needs():
    found = rows(environment.report())
    assert found["peftkern"] == peftkern.__version__ and found["torch"] == torch.__version__
    assert {
        "python",
        "triton",
        "bitsandbytes",
        "peft",
        "transformers",
        "system",
        "cpu",
        "threads",
        "isa",
        "cores",
        "limits of this CPU",
        "bitsandbytes hook",
    } <= found.keys()
    for name in backends.BACKENDS:
        ok, _ = backends.available(name)
        assert found[f"backend {name}"].startswith("yes: " if ok else "no: ")
    assert f"torch {torch.get_num_threads()}" in found["threads"]
    if backends.available("cpu")[0]:
        assert found["isa"].startswith(backends.native().isa()) and all(
            level in found["isa"] for level in backends.native().isas()
        )


def test_only_our_variables_and_no_paths(monkeypatch):
    monkeypatch.setenv("PEFTKERN_TEST", f"{Path.home()}/kernels")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    reason = f"cannot import name '_C' from {Path(peftkern.__file__)}"
    monkeypatch.setattr(backends, "available", lambda name: (False, reason) if name == "cpu" else (True, ""))
    text = environment.report()
    assert rows(text)["PEFTKERN_TEST"] == ("~/kernels" if len(str(Path.home())) > 1 else "//kernels")
    assert rows(text)["backend cpu"] == "no: cannot import name '_C' from peftkern/__init__.py"
    assert rows(text)["isa"] == "none, the native extension is missing"
    assert "hf_secret" not in text and str(Path(peftkern.__file__).parent) not in text


def test_smoke_check_passes_and_main_says_so(capsys):
    assert environment.smoke_check() < 1e-5
    assert environment.main(None) == 0
    assert rows(capsys.readouterr().out)["smoke check"].startswith("ok, max error ")


@pytest.mark.parametrize("broken", ["values", "exception"])
def test_a_broken_kernel_fails_the_smoke_check(broken, monkeypatch, capsys):
    original = functional.qlora_linear

    def wrong(*args, **options):
        if broken == "exception":
            raise RuntimeError("illegal instruction")
        return original(*args, **options) * 1.001

    monkeypatch.setattr(functional, "qlora_linear", wrong)
    assert environment.main() == 1
    assert rows(capsys.readouterr().out)["smoke check"].startswith("FAILED")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    assert rows(environment.report())["no-such-package"] == "not installed"
