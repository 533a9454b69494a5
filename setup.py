"""Builds the native extensions, with no torch at build time: the CPU kernels, one translation unit per ISA
level with its own flags, and, where nvcc is found, the CUDA kernels as a module of their own.

PEFTKERN_CPU         0: no CPU kernels, and no C++ compiler needed: for those who only use GPUs
PEFTKERN_CUDA        0: no CUDA kernels; 1: a missing or failing nvcc is an error; unset: they are built where
that succeeds
PEFTKERN_CUDA_ARCHS  compute capabilities, such as "86;89"; "all": every supported one;
                     unset: those of this machine's GPUs, else 8.0, whose PTX newer ones compile when they
                         load it
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError as error:  # setup.py run without the build requirements
    raise SystemExit(f"pybind11 is missing ({error}); build with: pip install .") from error

CPU = Path("csrc/cpu")
CUDA = Path("csrc/cuda")
COMMON = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [*LEVELS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    LEVELS["avx512bf16"] = [*LEVELS["avx512"], "-mavx512vbmi", "-mavx512bf16"]
    LEVELS["amx"] = [*LEVELS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]

ARCHS = ["75", "80", "86", "89", "90", "100", "120"]
# Where no GPU is seen: machine code of 8.0 serves 8.x, and its PTX all that came later. Seven architectures
# take five times as long.
UNSEEN = ["80"]
NO_NVCC = (
    "nvcc was not found: set CUDA_HOME to a CUDA toolkit (12 or later), put nvcc on PATH, or run: pip "
    "install nvidia-cuda-nvcc"
)

NO_CXX = (
    "install g++ (apt-get install g++), or set CXX to a C++17 compiler with OpenMP (Clang's is in the "
    "package libomp-dev)"
)
WITHOUT = (
    "PEFTKERN_CPU=0 builds without the CPU kernels: enough for GPUs; on the CPU the slow reference then runs"
)
PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n"
# not sdist, nor what pip asks beforehand
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def cxx_command():
    """The C++ compiler as words."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def leave_out_unknown_levels():
    """Drops the levels whose flags the compiler does not know (GCC before 11, Clang before 12)."""
    for level in ("avx512bf16", "amx"):
        if (
            level in LEVELS
            and subprocess.run(
                [*cxx_command(), *LEVELS[level], "-fsyntax-only", "-x", "c++", os.devnull],
                capture_output=True,
                check=False,
            ).returncode
        ):
            del LEVELS[level]


def check_compiler():
    """SystemExit with one message where there is no compiler that the CPU kernels can be built with: before
    anything else is printed."""
    cxx = cxx_command()
    if shutil.which(cxx[0]) is None:
        raise SystemExit(f"no C++ compiler: {' '.join(cxx)!r} was not found; {NO_CXX}. {WITHOUT}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        command = [
            *cxx,
            "-std=c++17",
            "-fopenmp",
            "-fPIC",
            "-shared",
            str(source),
            "-o",
            str(Path(folder, "probe.so")),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        words = next(
            (line.strip() for line in done.stdout.splitlines() if "error" in line), done.stdout.strip()[:200]
        )
        raise SystemExit(
            f"the C++ compiler {' '.join(cxx)!r} cannot build with OpenMP ({words}); {NO_CXX}. {WITHOUT}"
        )


def find_nvcc():
    """CUDA_HOME's (or CUDA_PATH's) where it is set, else the first on PATH, in /usr/local/cuda or in NVIDIA's
    pip packages, else None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home, "bin/nvcc") for home in homes]
    if not homes:
        on_path = shutil.which("nvcc")
        candidates = [*([Path(on_path)] if on_path else []), Path("/usr/local/cuda/bin/nvcc")]
        # An isolated build does not see the environment it builds for on sys.path: sysconfig names that one's
        # packages.
        for packages in dict.fromkeys([*sys.path, sysconfig.get_path("purelib")]):
            candidates += sorted(Path(packages).glob("nvidia/*/bin/nvcc"), reverse=True)
    return next((str(c) for c in candidates if c.is_file() and os.access(c, os.X_OK)), None)


def words_of(command):
    """What a command prints, on either stream; "" where it fails."""
    try:
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=True
        )
        return run.stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def cuda_archs(nvcc):
    """The compute capabilities to build for, such as ["86", "89"], ascending."""
    asked = os.environ.get("PEFTKERN_CUDA_ARCHS", "").replace(".", "")
    known = set(re.findall(r"compute_(\d+)", words_of([nvcc, "--list-gpu-arch"])))
    if asked == "all":
        archs = [a for a in ARCHS if a in known]
    elif asked:
        archs = [a for a in re.split(r"[;, ]+", asked) if a]
        if bad := [a for a in archs if not re.fullmatch(r"\d{2,3}[a-z]?", a)]:
            raise SystemExit(
                f"PEFTKERN_CUDA_ARCHS: got {bad[0]!r}, expected compute capabilities such as '86;89', "
                "or 'all'"
            )
    else:
        here = set(
            words_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
            .replace(".", "")
            .split()
        )
        archs = [a for a in here if a in known] or [a for a in UNSEEN if a in known]
    return sorted(set(archs), key=lambda a: (int(re.match(r"\d+", a)[0]), a))


def cudart_static(nvcc):
    """The static runtime of nvcc's toolkit, for the linker. nvcc is asked where it lies, as it may be a
    script that calls another."""
    top = re.search(r"^#\$ TOP=(.+)$", words_of([nvcc, "--dryrun", "nothing.o"]), re.MULTILINE)
    root = Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]
    found = [
        path
        for pattern in ("lib64", "lib", "targets/*/lib")
        for path in sorted(root.glob(f"{pattern}/libcudart_static.a"))
    ]
    # a distribution's toolkit: among the linker's own directories
    return str(found[0]) if found else "-lcudart_static"


def nvcc_command(nvcc, archs):
    """Compiles one .cu: machine code for each architecture, and PTX of the newest for those to come."""
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return [nvcc, "-O3", "-std=c++17", "--threads=1", "-Xcompiler=-fPIC,-fvisibility=hidden", *code]


class Build(build_ext):
    """Compiles every source with its level's flags; objects in parallel where ninja is there."""

    def build_extension(self, ext):
        tmp = Path(self.build_temp)
        tmp.mkdir(parents=True, exist_ok=True)
        cxx = cxx_command()
        includes = [f"-I{d}" for d in (*ext.include_dirs, *self.compiler.include_dirs)]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == "peftkern._C_cuda":
            return self._build_cuda(ext, tmp, cxx, includes, target)
        jobs = []
        # gcc 12's own header trips these on _mm512_cvtph_ps and _mm512_unpacklo_epi32; Clang has no such
        # warning.
        silent = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
        quiet = [] if "clang" in words_of([*cxx, "--version"]) else silent
        for source in ext.sources:
            stem = Path(source).stem
            flags = LEVELS.get(stem.removeprefix("kernels_"), [])
            level = flags + (quiet if "-mavx512f" in flags else [])
            obj = tmp / f"{stem}.o"
            jobs.append((source, obj, [*cxx, "-fPIC", "-fopenmp", *COMMON, *level, *includes]))
        self._compile(jobs, tmp)
        loader = ["-ldl"] if sys.platform.startswith("linux") else []
        self.spawn(
            [*cxx, "-shared", *[str(obj) for _, obj, _ in jobs], "-fopenmp", *loader, "-o", str(target)]
        )

    def _build_cuda(self, ext, tmp, cxx, includes, target):
        """nvcc for the kernels, the C++ compiler for the bindings. cudart is linked in, so that the module
        imports without a driver."""
        nvcc = find_nvcc()
        try:
            if nvcc is None:
                raise CompileError(NO_NVCC)
            archs = cuda_archs(nvcc)
            if not archs:
                raise CompileError(f"{nvcc} compiles for none of {', '.join(ARCHS)}")
            tmp = tmp / "cuda"
            tmp.mkdir(parents=True, exist_ok=True)
            bindings = [*cxx, "-fPIC", *COMMON, *includes, f'-DPK_CUDA_ARCHS="{";".join(archs)}"']
            jobs = [
                (s, tmp / f"{Path(s).stem}.o", nvcc_command(nvcc, archs) if s.endswith(".cu") else bindings)
                for s in ext.sources
            ]
            self._compile(jobs, tmp)
            # No nvcc here: its device link would add code for an architecture that nobody asked for, and
            # there is nothing to link.
            # exclude-libs: another cudart in the process, torch's, must not take this one's calls.
            runtime = [cudart_static(nvcc), "-Wl,--exclude-libs,ALL", "-lrt", "-lpthread", "-ldl"]
            self.spawn([*cxx, "-shared", *[str(obj) for _, obj, _ in jobs], *runtime, "-o", str(target)])
        except Exception as error:
            target.unlink(missing_ok=True)  # of an earlier build
            if not ext.optional:
                raise SystemExit(
                    f"PEFTKERN_CUDA=1, but the CUDA kernels could not be built: {error}"
                ) from error
            raise CompileError(
                f"the CUDA kernels ({error}); going on with the CPU kernels. PEFTKERN_CUDA=0 leaves them out"
            ) from error

    def _compile(self, jobs, tmp):
        if shutil.which("ninja"):
            self._ninja(jobs, tmp)
        else:
            for source, obj, command in jobs:
                self.spawn([*command, "-c", source, "-o", str(obj)])

    def _ninja(self, jobs, tmp):
        # One level of quoting for the shell that runs the command, one for ninja.
        quote = lambda args: " ".join(shlex.quote(a).replace("$", "$$") for a in args)  # noqa: E731
        lines = [
            f"builddir = {tmp.resolve()}",
            "rule cxx",
            "  command = $compile -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for source, obj, command in jobs:
            lines += [f"build {obj.resolve()}: cxx {Path(source).resolve()}", f"  compile = {quote(command)}"]
        (tmp / "build.ninja").write_text("\n".join(lines) + "\n")
        self.spawn(["ninja", "-f", str((tmp / "build.ninja").resolve())])


def switch(name, *values):
    """The value of an environment variable; SystemExit where it is none of these."""
    value = os.environ.get(name, "")
    if value not in ("", *values):
        raise SystemExit(f"{name}: got {value!r}, expected {', '.join(values)} or nothing")
    return value


extensions = []
if switch("PEFTKERN_CPU", "0", "1") != "0":
    if BUILDS & set(sys.argv) and shutil.which(cxx_command()[0]):
        leave_out_unknown_levels()
    sources = [
        "csrc/bindings.cpp",
        str(CPU / "dispatch.cpp"),
        *(str(CPU / f"kernels_{level}.cpp") for level in LEVELS),
    ]
    extensions.append(Pybind11Extension("peftkern._C", sources))
wanted = switch("PEFTKERN_CUDA", "0", "1")
if wanted == "1" or (wanted != "0" and find_nvcc()):
    kernels = [*map(str, sorted(CUDA.glob("*.cu"))), str(CUDA / "bindings_cuda.cpp")]
    extensions.append(Pybind11Extension("peftkern._C_cuda", kernels, optional=wanted != "1"))
if BUILDS & set(sys.argv) and any(extension.name == "peftkern._C" for extension in extensions):
    check_compiler()
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
