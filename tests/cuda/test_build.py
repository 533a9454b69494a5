"""setup.py's CUDA door: what is built with, without and with a failing nvcc, and for which architectures."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from peftkern.runtime.native_cuda import native_cuda

from ..cubins.nvcc import MISSING
from ..cubins.nvcc import find as find_nvcc
from ..native.compiled import CSRC

ROOT = CSRC.parent
# Stands in for the compilers where only setup.py's decisions are tested: writes down its arguments and makes
# the file it was asked for.
RECORDER = """#!/bin/sh
echo "$0 $*" >> "{log}"
case "$*" in *--list-gpu-arch*) printf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_90\\n'; exit 0;; esac
{body}
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Build:
    """Runs `setup.py build_ext` into a folder, with compilers that only take notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.cxx = _script(folder / "c++", RECORDER.format(log=self.log, body=""))
        self.environment = {
            **os.environ,
            "CXX": str(self.cxx),
            "CUDA_HOME": str(folder / "no-toolkit"),
            "PATH": self._path_without("nvidia-smi"),
        }
        for name in ("PEFTKERN_CUDA", "PEFTKERN_CUDA_ARCHS", "CUDA_PATH"):
            self.environment.pop(name, None)

    @staticmethod
    def _path_without(tool: str) -> str:
        return os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, tool).exists())

    def toolkit(self, body: str = "") -> None:
        """A CUDA_HOME with such an nvcc."""
        _script(self.folder / "toolkit/bin/nvcc", RECORDER.format(log=self.log, body=body))
        self.environment["CUDA_HOME"] = str(self.folder / "toolkit")

    def gpus(self, *capabilities: str) -> None:
        """A machine with these GPUs."""
        tool = _script(
            self.folder / "smi/nvidia-smi", "#!/bin/sh\n" + "".join(f"echo {c}\n" for c in capabilities)
        )
        self.environment["PATH"] = f"{tool.parent}{os.pathsep}{self.environment['PATH']}"

    def run(self, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        places = ["--build-lib", str(self.folder / "lib"), "--build-temp", str(self.folder / "temp")]
        command = [sys.executable, "setup.py", "-q", "build_ext", *places]
        env = {**self.environment, **environment}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)

    def modules(self) -> list[str]:
        return sorted(path.name.split(".")[0] for path in (self.folder / "lib").glob("peftkern/*.so"))

    def architectures(self) -> list[str]:
        """Of the kernels' compilation: `sm_*` as machine code, `compute_*` as PTX."""
        line = next(
            line for line in self.log.read_text().splitlines() if "/nvcc " in line and ".cu -o " in line
        )
        return re.findall(r",code=(\w+)", line)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path)


def test_without_nvcc_the_cpu_kernels_are_built_as_ever(build: Build) -> None:
    done = build.run()
    assert done.returncode == 0, done.stderr
    assert build.modules() == ["_C"]
    assert "CUDA" not in done.stdout + done.stderr
    for line in build.log.read_text().splitlines():
        assert "cuda" not in line.replace(str(build.folder), "")


def test_a_required_nvcc_that_is_missing_names_the_fix(build: Build) -> None:
    done = build.run(PEFTKERN_CUDA="1")
    assert done.returncode != 0
    assert (
        "PEFTKERN_CUDA=1" in done.stderr
        and "CUDA_HOME" in done.stderr
        and "pip install nvidia-cuda-nvcc" in done.stderr
    )


def test_both_modules_are_built_where_nvcc_is(build: Build) -> None:
    build.toolkit()
    done = build.run()
    assert done.returncode == 0, done.stderr
    assert build.modules() == ["_C", "_C_cuda"]
    compiled = build.log.read_text()
    assert all(f"{kernel.resolve()} -o" in compiled for kernel in (CSRC / "cuda").glob("*.cu"))
    assert "cudart_static" in compiled and "--exclude-libs,ALL" in compiled


def test_zero_leaves_the_cuda_kernels_out(build: Build) -> None:
    build.toolkit()
    assert build.run(PEFTKERN_CUDA="0").returncode == 0
    assert build.modules() == ["_C"] and "nvcc" not in build.log.read_text()


def test_a_failing_nvcc_costs_only_the_cuda_kernels(build: Build) -> None:
    build.toolkit("echo 'unsupported compiler' >&2; exit 1")
    done = build.run()
    assert done.returncode == 0, done.stderr
    assert build.modules() == ["_C"]
    warning = [
        line for line in (done.stdout + done.stderr).splitlines() if "going on with the CPU kernels" in line
    ]
    assert len(warning) == 1 and "PEFTKERN_CUDA=0" in warning[0]
    required = build.run(PEFTKERN_CUDA="1")
    assert required.returncode != 0 and "could not be built" in required.stderr


def test_architectures_are_the_machines_own(build: Build) -> None:
    build.toolkit()
    build.gpus("9.0", "8.6", "9.0")
    assert build.run().returncode == 0
    assert build.architectures() == ["sm_86", "sm_90", "compute_90"]


@pytest.mark.parametrize("gpus", [(), ("6.1",)])
def test_without_a_known_gpu_what_serves_all(build: Build, gpus: tuple) -> None:
    build.toolkit()
    if gpus:
        build.gpus(*gpus)
    assert build.run().returncode == 0
    assert build.architectures() == ["sm_80", "compute_80"]


def test_all_architectures_that_nvcc_supports(build: Build) -> None:
    build.toolkit()
    assert build.run(PEFTKERN_CUDA_ARCHS="all").returncode == 0
    assert build.architectures() == ["sm_75", "sm_80", "sm_86", "sm_90", "compute_90"]


@pytest.mark.parametrize("asked", ["89;8.0", "80 89", "80,89"])
def test_architectures_asked_for(build: Build, asked: str) -> None:
    build.toolkit()
    build.gpus("9.0")
    assert build.run(PEFTKERN_CUDA_ARCHS=asked).returncode == 0
    assert build.architectures() == ["sm_80", "sm_89", "compute_89"]


@pytest.mark.parametrize("variables", [{"PEFTKERN_CUDA_ARCHS": "ampere"}, {"PEFTKERN_CUDA": "yes"}])
def test_wrong_variables_are_named(build: Build, variables: dict) -> None:
    build.toolkit()
    done = build.run(**{"PEFTKERN_CUDA": "1", **variables})
    name, value = next(iter(variables.items()))
    assert done.returncode != 0 and name in done.stderr and value in done.stderr


def _cuobjdump() -> str | None:
    import triton

    packaged = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(packaged) if packaged.exists() else shutil.which("cuobjdump")


def _real_build(folder: Path, archs: str) -> Path:
    """The CUDA module, really compiled; of the CPU module only notes are taken, as its own tests build it."""
    nvcc = find_nvcc() or pytest.skip(MISSING)
    build = Build(folder)
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    pass_on = f'case "$*" in *_cuda*) exec {compiler} "$@";; esac'
    _script(build.cxx, RECORDER.format(log=build.log, body=pass_on))
    done = build.run(
        timeout=900, PEFTKERN_CUDA="1", PEFTKERN_CUDA_ARCHS=archs, CUDA_HOME=str(Path(nvcc).parents[1])
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "lib/peftkern" / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The CUDA module and its architectures: the installed one, else one built here for a single
    architecture."""
    found = importlib.util.find_spec("peftkern._C_cuda")
    if found is not None and found.origin is not None:
        return Path(found.origin), native_cuda().architectures
    return _real_build(tmp_path_factory.mktemp("one"), "86"), "86"


def _assert_contains(path: Path, archs: str) -> None:
    listed = subprocess.run(
        [_cuobjdump() or pytest.skip("no cuobjdump"), "--list-elf", "--list-ptx", str(path)],
        capture_output=True,
        text=True,
    )
    assert listed.returncode == 0, listed.stderr
    assert set(re.findall(r"\.(sm_\w+)\.cubin", listed.stdout)) == {f"sm_{a}" for a in archs.split(";")}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listed.stdout)) == {f"sm_{archs.split(';')[-1]}"}


def test_the_module_imports_without_a_driver(module: tuple[Path, str]) -> None:
    """And without torch: it knows no framework."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import _C_cuda as m; print(m.architectures, "
        "m.versions()[1], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(module[0].parent)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    archs, runtime, torch = done.stdout.split()
    assert archs == module[1] and int(runtime) >= 12000 and torch == "False"


def test_the_module_exports_the_c_abi_and_no_runtime(module: tuple[Path, str]) -> None:
    """Another cudart in the process must not take this one's calls, nor the other way round."""
    listed = subprocess.run(["nm", "-D", str(module[0])], capture_output=True, text=True, check=True).stdout
    symbols = {
        kind: {line.split()[-1] for line in listed.splitlines() if f" {kind} " in line} for kind in "TU"
    }
    declared = set(
        re.findall(r"\b(pk_cuda_\w+|pk_\w+_cuda)\(", (CSRC / "include/peftkern_cuda.h").read_text())
    )
    assert declared <= symbols["T"] and len(declared) >= 6
    assert not [name for name in symbols["T"] | symbols["U"] if name.startswith(("cuda", "__cuda", "cu"))]


def test_the_module_has_machine_code_for_what_was_asked(module: tuple[Path, str]) -> None:
    _assert_contains(*module)


def test_the_nested_absmax_is_not_fused(module: tuple[Path, str]) -> None:
    """No fused multiply-add in any dequantization kernel's machine code: the multiply and the add are rounded
    separately."""
    listed = subprocess.run(
        [_cuobjdump() or pytest.skip("no cuobjdump"), "-sass", str(module[0])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    kernels = [part for part in listed.stdout.split("Function : ")[1:] if "dequantize" in part.split()[0]]
    assert len(kernels) >= 8
    for kernel in kernels:
        assert "FADD" in kernel and "FMUL" in kernel and "FFMA" not in kernel, kernel.split()[0]


@pytest.mark.slow
def test_machine_code_for_every_architecture(tmp_path: Path) -> None:
    known = subprocess.run(
        [find_nvcc() or pytest.skip(MISSING), "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    archs = ";".join(a for a in ("75", "80", "86", "89", "90", "100", "120") if f"compute_{a}\n" in known)
    _assert_contains(_real_build(tmp_path, archs), archs)


@pytest.mark.slow
@pytest.mark.parametrize("required", ["0", "1"])
def test_a_wheel_holds_the_modules(tmp_path: Path, required: str) -> None:
    """Through pip, as a user installs it: without the CUDA kernels, and with them."""
    if required == "1" and not find_nvcc():
        pytest.skip(MISSING)
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", "build", "*.so", "*.egg-info", "out", "__pycache__"),
    )
    env = {**os.environ, "PEFTKERN_CUDA": required, "PEFTKERN_CUDA_ARCHS": "86"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(source),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    modules = sorted(p.name.split(".")[0] for p in (tmp_path / "site/peftkern").glob("*.so"))
    assert modules == (["_C", "_C_cuda"] if required == "1" else ["_C"])
