"""tile_plan.h, the blocking of a product of bf16 tiles, through a program that prints what it computes."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from .compiled import CSRC, CXX

PROGRAM = """
#include <stdio.h>
#include "cpu/tile_plan.h"
int main(void) {
  long m, n, k, r, threads, forward;
  while (scanf("%ld %ld %ld %ld %ld %ld", &m, &n, &k, &r, &threads, &forward) == 6) {
    pk_member member{};
    member.weight.n = n, member.weight.k = k;
    pk_adapter adapter{};
    adapter.lora.r = r, adapter.row_end = m;
    const pk::Group g{&member, 1, &adapter, r ? 1 : 0};
    const pk::TilePlan p =
        forward ? pk::forward_tile_plan(g, m, (int)threads) : pk::backward_tile_plan(g, m, (int)threads);
    const long fields[] = {p.mc, p.chunk, p.block, p.pack_at, p.low_at, p.project_at, p.bias_at, p.slots_at,
                           p.own_at, p.slots_size, p.b_size, p.low_size, p.c_size, p.sums_size, p.own_size,
                           p.total};
    for (long field : fields) printf("%ld ", field);
    printf("\\n");
  }
  return 0;
}
"""
FIELDS = [
    *("mc", "chunk", "block", "pack_at", "low_at", "project_at", "bias_at", "slots_at", "own_at"),
    *("slots_size", "b_size", "low_size", "c_size", "sums_size", "own_size", "total"),
]
SIZES = [
    (1, 64, 64, 1),
    (17, 33, 128, 0),
    (512, 576, 1536, 16),
    (512, 4096, 4096, 16),
    (512, 14336, 4096, 16),
    (512, 4096, 14336, 16),
    (2048, 4096, 14336, 64),
    (65, 193, 256, 256),
]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[tuple, dict]]:
    """((m, n, k, r, threads, forward), plan) of every size."""
    folder = tmp_path_factory.mktemp("tile_plan")
    (folder / "plan.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", f"-I{CSRC}"]
    command = [*CXX, *flags, str(folder / "plan.cpp"), "-o", str(folder / "plan")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0 and not built.stderr, built.stderr
    arguments = [
        (*size, threads, way) for size, threads, way in itertools.product(SIZES, (1, 2, 3, 16), (0, 1))
    ]
    text = "\n".join(" ".join(map(str, a)) for a in arguments)
    run = subprocess.run(
        [folder / "plan"], input=text, capture_output=True, text=True, check=True, timeout=60
    )
    lines = [dict(zip(FIELDS, map(int, line.split()), strict=True)) for line in run.stdout.splitlines()]
    return list(zip(arguments, lines, strict=True))


def test_parts_do_not_overlap(plans: list) -> None:
    """Each part begins behind the one before it, on a cache line, with room for what it holds."""
    for (_, n, k, r, threads, forward), p in plans:
        contraction = -(-(k if forward else n) // 32) * 32
        blocks, low = -(-r // 32), -(-3 * r // 32) if r else 0
        sizes = [
            p["mc"] * contraction // 2,
            p["mc"] * low * 32 // 2,
            3 * blocks * contraction * 32 // 2,
            n if forward else 0,
            p["slots_size"],
            p["own_size"] * threads,
        ]
        names = ("pack_at", "low_at", "project_at", "bias_at", "slots_at", "own_at", "total")
        starts = [p[name] for name in names]
        assert all(start % 16 == 0 for start in starts)
        for start, size, end in zip(starts, sizes, starts[1:], strict=False):
            assert start + size <= end
        assert (
            p["own_size"] >= p["b_size"] + p["low_size"] + p["c_size"] + p["sums_size"]
            and p["own_size"] % 16 == 0
        )
        assert p["c_size"] >= p["block"] * p["mc"] * 32 and p["b_size"] * 2 >= p["chunk"] * 1024


def test_gradients_have_room(plans: list) -> None:
    """A strip of 128 columns: its sums, and three pieces of 256 rows in bf16; xa and dyb by blocks of 32
    slots, where a megabyte holds them."""
    for (m, _, _, r, _, forward), p in plans:
        if forward or not r:
            assert p["slots_size"] == 0
            continue
        assert p["own_size"] >= r * 128 + 3 * 256 * 32 // 2
        wanted = 2 * -(-m // 32) * -(-3 * r // 32) * 1024 // 2
        assert p["slots_size"] == (wanted if 4 * wanted <= 1 << 20 else 0)


def test_a_block_of_a_weight_lies_in_one_chunk(plans: list) -> None:
    """A block of 64 codes is two steps of 32, decoded with one absmax."""
    for a, p in plans:
        assert p["chunk"] % 2 == 0 and 2 <= p["chunk"] <= 10, a
        assert p["mc"] % 32 == 0 and p["mc"] <= 512, a


def test_threads_get_equal_tasks(plans: list) -> None:
    for (_, n, k, _, threads, forward), p in plans:
        panels = -(-(n if forward else k) // 32)
        assert 1 <= p["block"] <= min(4, -(-panels // threads))


def test_large_linears_stay_within_8_megabytes(plans: list) -> None:
    """Of the sizes that docs/cpu-engine.md names: r = 16, two threads, and however many rows."""
    for a, p in plans:
        if a[3] == 16 and a[4] <= 2:
            assert 4 * p["total"] <= 8 << 20, (a, 4 * p["total"])
