"""Builds the native extension: one translation unit per ISA level, each with its own flags; no torch at build time."""

import os
import platform
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError as error:  # setup.py run without the build requirements
    raise SystemExit(f"pybind11 is missing ({error}); build with: pip install .") from error

CPU = Path("csrc/cpu")
COMMON = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    # gcc 12's own header trips -Wmaybe-uninitialized on _mm512_cvtph_ps.
    LEVELS["avx512"] = [*LEVELS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-Wno-maybe-uninitialized"]


class Build(build_ext):
    """Compiles every source with its level's flags; objects in parallel where ninja is there."""

    def build_extension(self, ext):
        tmp = Path(self.build_temp)
        tmp.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++").split()
        includes = [f"-I{d}" for d in (*ext.include_dirs, *self.compiler.include_dirs)]
        jobs = []
        for source in ext.sources:
            stem = Path(source).stem
            level = LEVELS.get(stem.removeprefix("kernels_"), [])
            obj = tmp / f"{stem}.o"
            jobs.append((source, obj, [*cxx, "-fPIC", "-fopenmp", *COMMON, *level, *includes]))
        if shutil.which("ninja"):
            self._ninja(jobs, tmp)
        else:
            for source, obj, command in jobs:
                self.spawn([*command, "-c", source, "-o", str(obj)])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([*cxx, "-shared", *[str(obj) for _, obj, _ in jobs], "-fopenmp", "-o", str(target)])

    def _ninja(self, jobs, tmp):
        quote = lambda args: " ".join(a.replace("$", "$$").replace(" ", "\\ ") for a in args)  # noqa: E731
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


sources = ["csrc/bindings.cpp", str(CPU / "dispatch.cpp"), *(str(CPU / f"kernels_{level}.cpp") for level in LEVELS)]
setup(ext_modules=[Pybind11Extension("peftkern._C", sources)], cmdclass={"build_ext": Build})
