"""Promises of the machine code, read from cubins: it fits, spills nothing, uses tensor cores, loads packed
weights 16 bytes wide."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from peftkern.runtime import targets

pytest.importorskip("triton", reason="Triton is not installed here")

from . import harness, kernels  # noqa: E402
from .checks import broken_promises  # noqa: E402

PROCESSES = int(os.environ.get("PEFTKERN_TEST_PROCESSES", "1"))
JOBS = harness.jobs(harness.modules())
SAMPLES = {(job.name, job.arch): job for job in harness.jobs([kernels])}
# By default each kernel's main variant is compiled for sm_86: mma.sync, with the least shared memory.
# Products are lowered differently by other generations, wgmma on sm_90 and no tensor core on sm_75: there the
# variants of a single linear are compiled, not those of a group. The nightly run has every variant on every
# architecture.
PRODUCTS = {job.kernel for job in JOBS if job.product}


def _parameter(job: harness.Job):
    lowered_differently = job.kernel in PRODUCTS and "qlora_group" not in job.module
    quick = job.main and job.arch in ((75, 86, 90) if lowered_differently else (86,))
    return pytest.param(job, id=job.id, marks=() if quick else pytest.mark.slow)


@pytest.fixture(scope="module")
def compiler(request: pytest.FixtureRequest) -> Iterator[harness.Compiler]:
    """One for the module; with several processes, all that was selected is compiled in the background."""
    with harness.Compiler(PROCESSES) as compiler:
        calls = (
            getattr(item, "callspec", None) for item in request.session.items if item.path == request.path
        )
        compiler.submit(call.params["job"] for call in calls if call and "job" in call.params)
        yield compiler


@pytest.mark.parametrize("job", [_parameter(job) for job in JOBS])
def test_machine_code(job: harness.Job, compiler: harness.Compiler) -> None:
    spec = harness.specialization(job)
    found = broken_promises(spec, compiler.facts(job))
    assert not found, "; ".join(found)


@pytest.mark.parametrize("name", harness.module_names())
def test_every_module_can_be_imported(name: str) -> None:
    importlib.import_module(name)


def test_variants_have_names_of_their_own() -> None:
    """By which a worker finds them again."""
    names = Counter((job.module, job.arch, job.name) for job in JOBS)
    assert not [key for key, count in names.items() if count > 1]


def test_every_kernel_is_compiled() -> None:
    """A kernel that no module's `specializations` has is found."""
    declared, defined = set(), set()
    for module in harness.modules():
        specs = (spec for arch in harness.ARCHS for spec in harness.specializations(module, arch))
        declared |= {(spec.kernel.fn.__module__, spec.kernel.__name__) for spec in specs}
        named = (name for name, value in vars(module).items() if hasattr(value, "fn"))
        functions = (getattr(module, name).fn for name in named if name.endswith("_kernel"))
        defined |= {(function.__module__, function.__name__) for function in functions}
    assert declared == defined


BROKEN = {
    "copy": (),
    "product": (),
    "unaligned": ("16 bytes",),
    "fused": ("fused",),
    "no-mma": ("tensor-core",),
    "spilling": ("local memory",),
}


@pytest.mark.parametrize("arch", [86, 90, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BROKEN)
def test_each_check_can_fail(name: str, arch: int, compiler: harness.Compiler) -> None:
    job = SAMPLES[name, arch]
    spec = harness.specialization(job)
    found = broken_promises(spec, compiler.facts(job))
    assert len(found) == len(BROKEN[name]) and all(
        any(word in line for line in found) for word in BROKEN[name]
    ), found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("incomplete", r"in signature and constexprs \[\], in neither \['BLOCK'\]"),
        ("twice", r"in signature and constexprs \['scale'\]"),
        ("indivisible", r"divisible_by_16 names \['BLOCK'\]"),
        ("misnamed", r"wide_loads names weight_ptr, .*packed = tl.load\(packed_ptr"),
        ("uncalled", r"unfused names \['_scale'\], .*it calls \['_affine', '_copy_kernel'\]"),
    ],
)
def test_a_promise_about_nothing_is_an_error(name: str, words: str, compiler: harness.Compiler) -> None:
    with pytest.raises(RuntimeError, match=f"(?s)kernels-{name}-sm86.*{words}"):
        compiler.facts(SAMPLES[name, 86])


def test_limits_are_those_of_the_architecture(compiler: harness.Compiler) -> None:
    """Two tiles of 64x64 in 16 bits are counted; 128 KiB fit into sm_90's shared memory and not into
    sm_86's."""
    facts = compiler.facts(SAMPLES["product", 86])
    assert 8192 <= facts.shared <= 16384
    facts = replace(facts, shared=128 * 1024)
    spec = harness.specialization(SAMPLES["product", 86])
    assert "shared memory" in broken_promises(spec, facts)[0]
    assert not broken_promises(spec, replace(facts, arch=90))
    assert targets.nearest(86).shared_per_block < 128 * 1024 < targets.nearest(90).shared_per_block
