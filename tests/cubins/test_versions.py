"""`python -m tests.cubins --triton VERSION`: which Triton is asked, and what is said of variants that fail.
pip and the compiler are stand-ins."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

from . import __main__ as command  # noqa: E402
from . import harness, kernels  # noqa: E402


class Processes:
    """Stands for `subprocess.run`: pip fills the folder unless the version is unknown."""

    def __init__(self) -> None:
        self.pip: list[list[str]] = []
        self.inner: list[tuple[list[str], dict[str, str]]] = []

    def __call__(self, words: list[str], **options: object) -> SimpleNamespace:
        if "pip" in words:
            self.pip.append(words)
            if words[-1] == "triton==0.0.1":
                return SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found\n")
            (Path(words[words.index("--target") + 1]) / "triton").mkdir(parents=True)
            return SimpleNamespace(returncode=0, stderr="")
        self.inner.append((words, options["env"]))
        return SimpleNamespace(returncode=0)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    found = Processes()
    monkeypatch.setattr(command, "subprocess", SimpleNamespace(run=found))
    return found


def test_each_version_is_fetched_once_and_found_first(processes: Processes, tmp_path: Path) -> None:
    words = ["--triton", "3.6.0", "3.7.1", "--folder", str(tmp_path), "--arch", "80", "--kernel", "rope"]
    assert command.main(words) == command.main(words) == 0
    assert [call[-1] for call in processes.pip] == ["triton==3.6.0", "triton==3.7.1"]
    assert len(processes.inner) == 4
    for version, (inner, environment) in zip(("3.6.0", "3.7.1") * 2, processes.inner, strict=True):
        assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / version)
        assert "--triton" not in inner, "the process compiles with what it finds"
        assert inner[inner.index("--arch") + 1 :][:3] == ["80", "--kernel", "rope"]


def test_a_version_that_pip_lacks_is_one_message(processes: Processes, tmp_path: Path, capsys) -> None:
    assert command.main(["--triton", "0.0.1", "3.6.0", "--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["--triton: pip cannot install 0.0.1 (ERROR: No matching distribution found)"]
    assert len(processes.inner) == 1, "the others are tried"


def test_what_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Compiler:
        def __init__(self, processes: int) -> None: ...
        def __enter__(self) -> Compiler:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, jobs: object) -> None: ...
        def facts(self, job: harness.Job) -> None:
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(harness, "Compiler", Compiler)
    monkeypatch.setattr(harness, "modules", lambda: [kernels])
    assert command.main(["--arch", "86", "--kernel", "product"]) == 1
    said = capsys.readouterr().out
    assert "1 variants for sm_86" in said and "not compiled: no such instruction" in said
    assert said.rstrip().endswith("0 of 1 are as promised")
    assert command.main(["--arch", "86", "--kernel", "none has this name"]) == 1
