"""What is distributed: a source distribution that builds with either compiler, and one message where there is
none.

The builds take a minute each and run nightly: pytest -m slow tests/native/test_distribution.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from .compiled import CSRC

ROOT = CSRC.parent
SHIPPED = (
    "csrc",
    "peftkern",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)
# What an installed copy has to say of itself, in a process that knows no source tree: its folder is the
# argument.
SMOKE = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, peftkern
from peftkern import backends, environment
assert peftkern.__file__.startswith(sys.argv[1]), peftkern.__file__
native, error = backends.native(), environment.smoke_check()
assert error < 1e-5, error
sizes = []
for threads in (2, 1):
    torch.set_num_threads(threads)
    sizes.append(native.scratch_bytes(512, 4096, 4096, 16))
assert sizes[0] > sizes[1], "torch's number of threads is not taken"
print(native.isa())
"""


def _run(
    command: list[str], folder: Path, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    env = (
        {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH", "PEFTKERN_CPU")}
        | {"PEFTKERN_CUDA": "0"}
        | variables
    )
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy of the source tree, as it writes there; no compiler is needed for it."""
    folder = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        source, ignored = ROOT / name, shutil.ignore_patterns("*.so", "__pycache__")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    done = _run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder / "dist")],
        folder,
        CXX="/nowhere/c++",
    )
    assert done.returncode == 0, done.stderr
    return next((folder / "dist").glob("*.tar.gz"))


def test_the_source_distribution_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.is_file()}
    assert len(sources) > 30 and sources <= names, sorted(sources - names)
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def _build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return _run([sys.executable, "setup.py", "build_ext", *places], ROOT, **variables)


def _assert_one_message(done: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert done.returncode != 0 and len(lines) == 1, lines
    for word in (*words, "install g++", "set CXX", "PEFTKERN_CPU=0"):
        assert word in lines[0], (word, lines[0])


def test_without_a_compiler_one_message_names_the_ways_out(tmp_path: Path) -> None:
    _assert_one_message(
        _build(tmp_path, CXX="no-such-compiler -O2"),
        "no C++ compiler",
        "'no-such-compiler -O2' was not found",
    )


def test_a_compiler_without_openmp_is_named_with_its_own_words(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\necho "probe.cpp:1:10: fatal error: omp.h: No such file or directory" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    _assert_one_message(_build(tmp_path, CXX=str(compiler)), "omp.h: No such file", "OpenMP", "libomp-dev")


def test_those_who_only_use_gpus_need_no_compiler(tmp_path: Path) -> None:
    done = _build(tmp_path, CXX="no-such-compiler", PEFTKERN_CPU="0")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
    wrong = _build(tmp_path, PEFTKERN_CPU="no")
    assert wrong.returncode != 0 and "PEFTKERN_CPU: got 'no', expected 0, 1 or nothing" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("compiler, package", [("g++", "g++"), ("clang++", "clang libomp-dev")])
def test_the_wheel_of_the_source_distribution_works(
    sdist: Path, tmp_path: Path, compiler: str, package: str
) -> None:
    """pip builds it, warns of nothing and installs it; what is installed computes, with torch's number of
    threads."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed (Debian and Ubuntu: apt install {package})")
    pip = [sys.executable, "-m", "pip"]
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir"]
    built = _run(
        [*pip, "wheel", "-v", *options, "-w", str(tmp_path), str(sdist)], tmp_path, timeout=900, CXX=compiler
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    warned = [
        line for line in (built.stdout + built.stderr).splitlines() if "warning: " in line and "csrc/" in line
    ]
    assert not warned, warned[:5]
    (wheel,) = tmp_path.glob("peftkern-*.whl")
    installed = _run(
        [*pip, "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], tmp_path
    )
    assert installed.returncode == 0, installed.stderr
    done = _run(
        [sys.executable, "-I", "-c", SMOKE, str(tmp_path / "site")], tmp_path, OMP_WAIT_POLICY="passive"
    )
    assert done.returncode == 0, done.stderr
