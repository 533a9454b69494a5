"""What a `Specialization` says a launch is compiled for is what Triton's own look-up finds in its arguments,
those within tuples included: the cubins that are read are those that run, and a warmed cache is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

ROOT = Path(__file__).parents[2]
SCRIPT = """
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 86, 32)
driver.set_active(Driver())
from benchmarks.gpu import warm
from tests.cubins import harness, worker
asked = []
def compiled(self, key, signature, device, constants, options, attrs, warmup):
    asked.append((signature, constants, {path: attr for path, attr in attrs.items() if attr}))
JITFunction._do_compile = compiled
count = 0
for module in harness.modules():
    met = set()
    for spec in harness.specializations(module, 86):
        if spec.kernel in met:
            continue
        met.add(spec.kernel)
        asked.clear()
        spec.kernel.run(**warm.arguments(spec), **spec.options, grid=(1,), warmup=True)
        signature, constants, attributes = asked[0]
        path = lambda name: worker._path(spec.kernel, name) if isinstance(name, str) else name
        said = {path(name): value for name, value in worker._constants(spec).items()}
        assert signature == worker._signature(spec), (spec.name, signature, worker._signature(spec))
        assert constants == said, (spec.name, constants, said)
        assert attributes == worker._attributes(spec.kernel, spec.divisible_by_16), spec.name
        count += 1
print(count)
"""


@pytest.mark.slow
def test_triton_compiles_what_the_variants_say(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(ROOT))))
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 20
