"""plan.h, the blocking of a large product, through a program that prints what it computes."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

from peftkern.runtime import backends

from .compiled import CSRC, CXX, i64, load

PROGRAM = """
#include <stdio.h>
#include "cpu/plan.h"
int main(void) {
  long m, outputs, contraction, n, k, r, unit, lanes, threads;
  while (scanf("%ld %ld %ld %ld %ld %ld %ld %ld %ld",
               &m, &outputs, &contraction, &n, &k, &r, &unit, &lanes, &threads) == 9) {
    const pk::Operands held{r, r * k, r * n, n, 0, r * pk::rank_ld(r), pk::rank_ld(r)};
    pk::Plan p = pk::make_plan(m, outputs, contraction, held, unit, lanes, (int)threads);
    const long fields[] = {p.mc, p.block,
                           p.pack_at, p.low_rank_at, p.lora_a_at, p.lora_b_at, p.bias_at, p.gram_at, p.own_at,
                           p.decoded_size, p.c_size, p.tmp_size, p.cross_ld, p.own_size, p.total};
    for (long field : fields) printf("%ld ", field);
    printf("\\n");
  }
  return 0;
}
"""
FIELDS = (
    "mc",
    "block",
    "pack_at",
    "low_rank_at",
    "lora_a_at",
    "lora_b_at",
    "bias_at",
    "gram_at",
    "own_at",
    "decoded_size",
    "c_size",
    "tmp_size",
    "cross_ld",
    "own_size",
    "total",
)
SIZES = [
    (1, 64, 64, 1),
    (17, 33, 100, 3),
    (512, 4096, 4096, 16),
    (512, 14336, 4096, 16),
    (2048, 4096, 14336, 64),
    (1000, 576, 1536, 256),
    (65, 193, 257, 5),
]
LANES, THREADS = (8, 16, 32), (1, 2, 3, 16)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, dict]]:
    """(arguments, plan) for both directions, with and without the base product, of every size; each with
    DoRA's norm."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(PROGRAM)
    command = [
        *CXX,
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        f"-I{CSRC}",
        str(folder / "plan.cpp"),
        "-o",
        str(folder / "plan"),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0 and not built.stderr, built.stderr
    arguments = []
    for (m, n, k, r), lanes, threads in itertools.product(SIZES, LANES, THREADS):
        for outputs, contraction, unit in ((n, k, 12), (k, n, 48), (n, 0, 12), (k, 0, 48)):
            arguments.append(
                dict(
                    m=m,
                    outputs=outputs,
                    contraction=contraction,
                    n=n,
                    k=k,
                    r=r,
                    unit=unit,
                    lanes=lanes,
                    threads=threads,
                )
            )
    lines = "\n".join(" ".join(map(str, a.values())) for a in arguments)
    printed = subprocess.run(
        [folder / "plan"], input=lines, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    return [
        (a, dict(zip(FIELDS, map(int, line.split()), strict=True)))
        for a, line in zip(arguments, printed, strict=True)
    ]


def test_blocks_are_whole_tiles_and_vectors(plans: list) -> None:
    """Every tile height (6, 12) divides 12, every vector width (4, 8, 16) too 48, which backward takes;
    passes are whole panels."""
    for a, p in plans:
        assert p["block"] % a["unit"] == 0 and 0 < p["block"] <= 192, a
        assert p["mc"] % a["lanes"] == 0 and 0 < p["mc"] <= max(512, a["lanes"]), a


def test_tasks_are_shared_evenly(plans: list) -> None:
    """Blocks cover every row, and where there is enough work no thread gets more than one task above
    another's."""
    for a, p in plans:
        tasks = -(-a["outputs"] // p["block"])
        assert (tasks - 1) * p["block"] < a["outputs"] <= tasks * p["block"], a
        if a["outputs"] >= 192 * a["threads"]:
            assert tasks >= a["threads"], a
        passes = -(-a["m"] // p["mc"])
        assert (passes - 1) * p["mc"] < a["m"] <= passes * p["mc"], a


def test_regions_are_large_enough_and_apart(plans: list) -> None:
    for a, p in plans:
        sizes = dict(
            pack_at=p["mc"] * a["contraction"],
            low_rank_at=p["mc"] * a["r"],
            lora_a_at=a["r"] * a["k"],
            lora_b_at=a["r"] * a["n"],
        )
        sizes |= dict(bias_at=a["n"], gram_at=a["r"] * p["cross_ld"], own_at=p["own_size"] * a["threads"])
        ends = [p[name] + size for name, size in sizes.items()]
        starts = [p[name] for name in list(sizes)[1:]] + [p["total"]]
        assert all(end <= start for end, start in zip(ends, starts, strict=True)), a
        assert p["decoded_size"] >= p["block"] * 256 and p["c_size"] >= p["block"] * p["mc"], a
        assert (
            p["tmp_size"] >= 2 * 256 * a["lanes"]
            and p["cross_ld"] % a["lanes"] == 0
            and p["cross_ld"] >= a["r"]
        ), a
        assert (
            p["own_size"] >= p["decoded_size"] + p["c_size"] + p["tmp_size"] + p["block"] * p["cross_ld"]
        ), a


def test_scratch_of_the_largest_layer_stays_within_8_mb(plans: list) -> None:
    found = [(a, p) for a, p in plans if (a["m"], a["n"], a["k"], a["threads"]) == (512, 14336, 4096, 2)]
    assert len(found) == 4 * len(LANES)
    for a, p in found:
        assert 4 * p["total"] <= 8 << 20, (a, 4 * p["total"])


def test_the_library_asks_for_the_same(isa: str) -> None:
    lib = load(Path(backends.native().__file__))
    size = lib.pk_qlora_linear_scratch_bytes(i64(512), i64(14336), i64(4096), i64(16), 2)
    assert 0 < size <= 8 << 20
    more_rows = lib.pk_qlora_linear_scratch_bytes(i64(8192), i64(14336), i64(4096), i64(16), 2)
    assert more_rows <= 8 << 20, "scratch grows with the rows of x"
