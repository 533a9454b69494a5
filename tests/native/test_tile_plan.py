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
  long m, n, k, r, threads, forward, apart;
  while (scanf("%ld %ld %ld %ld %ld %ld %ld", &m, &n, &k, &r, &threads, &forward, &apart) == 7) {
    pk_member member{};
    member.weight.n = n, member.weight.k = k;
    pk_adapter adapter{};
    adapter.lora.r = r, adapter.row_end = m;
    const pk::Group g{&member, 1, &adapter, r ? 1 : 0};
    const pk::TilePlan p =
        forward ? pk::forward_tile_plan(g, m, (int)threads, apart != 0)
                : pk::backward_tile_plan(g, m, (int)threads, apart != 0);
    const long fields[] = {p.mc, p.chunk, p.block, p.teams, p.team_rows, p.strips, p.pack_at, p.low_at,
                           p.project_at, p.bias_at, p.slots_at, p.parts_at, p.own_at, p.slots_size, p.b_size,
                           p.low_size, p.c_size, p.sums_size, p.part_size, p.own_size, p.total};
    for (long field : fields) printf("%ld ", field);
    printf("\\n");
  }
  return 0;
}
"""
FIELDS = [
    *("mc", "chunk", "block", "teams", "team_rows", "strips", "pack_at", "low_at"),
    *("project_at", "bias_at", "slots_at", "parts_at", "own_at", "slots_size", "b_size"),
    *("low_size", "c_size", "sums_size", "part_size", "own_size", "total"),
]
SIZES = [
    (1, 64, 64, 1),
    (512, 192, 576, 16),
    (333, 2816, 1024, 16),
    (512, 576, 1536, 16),
    (512, 3072, 576, 16),
    (17, 33, 128, 0),
    (512, 4096, 4096, 16),
    (512, 14336, 4096, 16),
    (512, 4096, 14336, 16),
    (2048, 4096, 14336, 64),
    (65, 193, 256, 256),
]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[tuple, dict]]:
    """((m, n, k, r, threads, forward, apart), plan) of every size."""
    folder = tmp_path_factory.mktemp("tile_plan")
    (folder / "plan.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", f"-I{CSRC}"]
    command = [*CXX, *flags, str(folder / "plan.cpp"), "-o", str(folder / "plan")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0 and not built.stderr, built.stderr
    arguments = [(*size, *how) for size, *how in itertools.product(SIZES, (1, 2, 3, 16), (0, 1), (0, 1))]
    text = "\n".join(" ".join(map(str, a)) for a in arguments)
    run = subprocess.run(
        [folder / "plan"], input=text, capture_output=True, text=True, check=True, timeout=60
    )
    lines = [dict(zip(FIELDS, map(int, line.split()), strict=True)) for line in run.stdout.splitlines()]
    return list(zip(arguments, lines, strict=True))


def test_parts_do_not_overlap(plans: list) -> None:
    """Each part begins behind the one before it, on a cache line, with room for what it holds."""
    for (_, n, k, r, threads, forward, _), p in plans:
        contraction = -(-(k if forward else n) // 32) * 32
        blocks, low = -(-r // 32), -(-3 * r // 32) if r else 0
        sizes = [
            p["mc"] * contraction // 2,
            p["mc"] * low * 32 // 2,
            3 * blocks * contraction * 32 // 2,
            n if forward else 0,
            p["slots_size"],
            p["strips"] * 2 * p["part_size"],
            p["own_size"] * threads,
        ]
        names = ("pack_at", "low_at", "project_at", "bias_at", "slots_at", "parts_at", "own_at", "total")
        starts = [p[name] for name in names]
        assert all(start % 16 == 0 for start in starts)
        for start, size, end in zip(starts, sizes, starts[1:], strict=False):
            assert start + size <= end
        assert (
            p["own_size"] >= p["b_size"] + p["low_size"] + p["c_size"] + p["sums_size"]
            and p["own_size"] % 16 == 0
        )
        assert p["c_size"] >= p["block"] * p["team_rows"] * 32 and p["b_size"] * 2 >= p["chunk"] * 1024


def test_gradients_have_room(plans: list) -> None:
    """A strip of 128 columns: its sums, and three pieces of 256 rows in bf16; xa and dyb by blocks of 32
    slots, where a megabyte holds them."""
    for (m, _, _, r, _, forward, _), p in plans:
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
    for (_, n, k, _, threads, forward, _), p in plans:
        panels = -(-(n if forward else k) // 32)
        assert 1 <= p["block"] <= min(4, -(-panels // (threads // p["teams"])))


def test_teams_hold_all_rows(plans: list) -> None:
    """As many threads each, and row panels that follow each other; alone where one panel is all there is."""
    for (m, _, _, _, threads, _, _), p in plans:
        assert threads % p["teams"] == 0 and p["team_rows"] % 32 == 0
        assert (p["teams"] - 1) * p["team_rows"] < p["mc"] <= p["teams"] * p["team_rows"]
        assert p["teams"] <= -(-m // 32) and (threads > 1 or p["teams"] == 1)


def test_teams_where_sharing_rows_is_dearer_than_decoding(plans: list) -> None:
    """Two threads forward. Together they share the columns, unless these are very few; apart the rows, unless
    the columns are very many. 11 panels of rows do not halve."""
    together, apart = ({a[:3]: p["teams"] for a, p in plans if a[4:] == (2, 1, how)} for how in (0, 1))
    assert together[512, 192, 576] == apart[512, 192, 576] == 2
    assert together[512, 576, 1536] == together[512, 3072, 576] == 1
    assert apart[512, 576, 1536] == apart[512, 3072, 576] == 2
    assert apart[512, 14336, 4096] == apart[333, 2816, 1024] == 1


def test_halves_of_rows_have_room(plans: list) -> None:
    """The sums of a strip of 128 columns over either half of the rows, for a strip a thread or more; below
    128 rows there are no halves."""
    for (m, _, _, r, threads, forward, _), p in plans:
        halves = not forward and r and m >= 128
        assert p["part_size"] >= r * 128 if halves else p["part_size"] == 0
        assert p["strips"] >= threads


def test_large_linears_stay_within_8_megabytes(plans: list) -> None:
    """Of the sizes that docs/cpu-engine.md names: r = 16, two threads, and however many rows."""
    for a, p in plans:
        if a[3] == 16 and a[4] <= 2:
            assert 4 * p["total"] <= 8 << 20, (a, 4 * p["total"])
