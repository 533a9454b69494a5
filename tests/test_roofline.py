"""The roofline model: cases computed by hand, its direction when an input changes, and that it counts the
launches of our own plan."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.pages import put
from benchmarks.roofline import PEAKS, PEERS, Assumptions, frozen, ours, peer, rows, seconds
from peftkern.ops.linear.plan import Shape
from peftkern.runtime.plan import Launch
from peftkern.runtime.targets import ARCHITECTURES, CARDS, nearest, occupancy

CARD = replace(
    CARDS["RTX 4090"], half=100e12, dram=1e12, fp32=40e12
)  # its ALU rate: a quarter of fp32's, 10e12
EXACT = Assumptions(gemm=1.0, dram=1.0, alu=1.0, launch=0.0)


def test_a_launch_takes_its_longest_part_and_its_overhead() -> None:
    assert seconds([Launch("a", 3_000_000, 1_000_000)], CARD, EXACT) == pytest.approx(4e-6)
    assert seconds([Launch("a", 1, 1, flops=500_000_000)], CARD, EXACT) == pytest.approx(5e-6)
    assert seconds([Launch("a", 1, 1, flops=1, ops=70_000_000)], CARD, EXACT) == pytest.approx(7e-6)
    halves = Assumptions(gemm=0.5, triton=0.5, dram=0.5, alu=1.0, launch=1e-6)
    two = [Launch("a", 1_000_000, 0), Launch("b", 0, 0, flops=100_000_000)]
    assert seconds(two, CARD, halves) == pytest.approx(2e-6 + 2e-6 + 2 * 1e-6)
    assert seconds(two, CARD, halves, triton=True) == pytest.approx(2e-6 + 4e-6 + 2 * 1e-6)


def test_a_frozen_linear_and_a_peer_by_hand() -> None:
    s = Shape(m=4, n=64, k=128, r=2)
    y, dx = frozen(s)
    assert (y.reads, y.writes, y.flops) == (2 * 4 * 128 + 2 * 64 * 128, 2 * 4 * 64, 2 * 4 * 64 * 128)
    assert (dx.reads, dx.writes, dx.flops) == (2 * 4 * 64 + 2 * 64 * 128, 2 * 4 * 128, y.flops)
    unsloth = next(p for p in PEERS if p.name == "unsloth")
    launches = peer(unsloth, s)
    extra = sum(one.reads + one.writes for one in launches) - sum(one.reads + one.writes for one in (y, dx))
    decode = (
        64 * 128 // 2 + 128 + 4 + 2 * 64 * 128
    )  # codes, 8-bit absmax, one nested block; the weight in 16 bits
    assert 0 <= extra - (2 * decode + 5 * 2 * 4 * 128 + 5 * 2 * 4 * 64) < 18, (
        "passes are shared out among 18 launches, rounded up"
    )


@pytest.mark.parametrize("p", PEERS, ids=lambda p: p.name)
def test_peers_have_the_launches_that_were_counted(p: roofline.Peer) -> None:
    assert len(peer(p, Shape(2048, 4096, 4096))) == p.launches


# 4096 x 4096, M = 8192, r = 16: derived at the data sheet's peaks when the peers' code was read. LoRAFusion's
# there has the mask's bytes.
@pytest.mark.parametrize(
    ("card", "expected"), [("RTX 4090", (1.40, 1.24, 1.22, 1.16)), ("H200", (1.50, 1.29, 1.27, 1.19))]
)
def test_the_survey_of_peers_is_reproduced(card: str, expected: tuple[float, ...]) -> None:
    found = {
        row.provider: row.at_peaks for row in rows([CARDS[card]], [(4096, 4096)], [8192], 16, Assumptions())
    }
    for p, ratio in zip(PEERS, expected, strict=True):
        assert found[p.name] == pytest.approx(ratio, abs=0.045 if "LoRAFusion" in p.name else 0.02)


@pytest.mark.parametrize("card", ["RTX 3090", "RTX 4090", "H200"])
@pytest.mark.parametrize("m", [512, 2048, 8192])
def test_ours_is_the_plan_and_between_the_floor_and_the_peers(card: str, m: int) -> None:
    s = Shape(m, 4096, 4096)
    launches, triton = ours(s, CARDS[card])
    found = {row.provider: row for row in rows([CARDS[card]], [(4096, 4096)], [m], 16, Assumptions())}
    (name,) = (name for name in found if "as dispatched" in name)
    assert found[name].launches == len(launches) <= 7 and ("Triton" in name) == triton
    assert found["floor"].ratio <= found[name].ratio * 1.02 and found[name].ratio < found["axolotl"].ratio
    assert found["frozen bf16 linear"].ratio == 1.0


def test_more_work_never_takes_less_time() -> None:
    card = CARDS["H200"]
    for grown in ("m", "n", "k", "r"):
        small = Shape(2048, 4096, 4096, 16)
        large = replace(small, **{grown: 2 * getattr(small, grown)})
        for of in (
            frozen,
            roofline.floor,
            lambda s: ours(s, card)[0],
            *(lambda s, p=p: peer(p, s) for p in PEERS),
        ):
            assert seconds(of(large), card, PEAKS) >= seconds(of(small), card, PEAKS), grown
    launches = ours(Shape(2048, 4096, 4096), card)[0]
    for slower in (Assumptions(gemm=0.4), Assumptions(dram=0.4), Assumptions(launch=9e-6)):
        assert seconds(launches, card, slower) > seconds(launches, card, Assumptions())


def test_dropout_costs_operations_and_no_bytes() -> None:
    plain, dropped = (ours(Shape(2048, 4096, 4096, dropout=on), CARDS["RTX 4090"])[0] for on in (False, True))
    assert [one.reads + one.writes for one in dropped] == [one.reads + one.writes for one in plain]
    assert sum(one.ops for one in dropped) > sum(one.ops for one in plain)


def test_the_command_labels_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        roofline.main(["--card", "L4", "--shape", "1024x512", "--m", "512", "--csv", str(tmp_path / "a.csv")])
        == 0
    )
    printed = capsys.readouterr().out
    assert all(roofline.LABEL in line for line in printed.splitlines() if line.startswith(("#", "Forward")))
    with (tmp_path / "a.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) >= 7 and {line["kind"] for line in lines} == {roofline.LABEL}


def test_a_page_is_written_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- roofline: begin -->\nold\n<!-- roofline: end -->\nafter\n")
    assert roofline.main(["--card", "L4", "--shape", "1024x512", "--m", "512", "--write", str(page)]) == 0
    text = page.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("\nafter\n")
        and "old" not in text
        and "### L4, 1024x512" in text
    )
    with pytest.raises(ValueError, match="cubins: begin"):
        put(page, "cubins", "")
    for name in ("cubins", "roofline"):
        assert (
            f"<!-- {name}: begin -->" in (Path(__file__).parents[1] / "docs" / "gpu-kernels.md").read_text()
        )


def test_occupancy_by_hand() -> None:
    """sm_86: 48 warps, 64 K registers in quarters, 100 KiB of shared memory of which each block's first KiB
    is the system's."""
    sm86 = ARCHITECTURES[86]
    assert occupancy(sm86, registers=32, shared=0, warps=4).blocks == 12  # 48 warps / 4
    assert occupancy(sm86, registers=32, shared=0, warps=1).limit == "blocks"  # 16 of one warp
    # 168 registers are 21 x 256 a warp: 16384 / 5376 = 3 warps a quarter, 12 an SM
    found = occupancy(sm86, registers=168, shared=0, warps=4)
    assert (found.blocks, found.share, found.limit) == (3, 0.25, "registers")
    assert occupancy(sm86, registers=32, shared=49 * 1024, warps=4).blocks == 2  # 2 x (49 + 1) KiB
    assert occupancy(sm86, registers=32, shared=49 * 1024 + 1, warps=4).blocks == 1
    assert occupancy(sm86, registers=32, shared=99 * 1024, warps=4).blocks == 1
    assert occupancy(sm86, registers=32, shared=99 * 1024 + 1, warps=4).blocks == 0
    assert (
        occupancy(sm86, registers=128, shared=0, warps=32).blocks == 0
    )  # 16384 / 4096 = 4 warps a quarter, 16 an SM
    assert [nearest(sm).sm for sm in (61, 75, 87, 89, 103, 121)] == [75, 75, 86, 89, 100, 120]


def test_cards_are_consistent() -> None:
    """A typing error shows as an impossible clock, or as FLOPs a clock and SM of the tensor cores that are no
    power of two."""
    for card in CARDS.values():
        assert card.sm in ARCHITECTURES and card.source
        assert card.tf32 == 0 or card.tf32 == pytest.approx(card.half / 2, rel=0.03)
        lanes = 64 if card.sm <= 80 else 128
        assert 1.4e9 < card.fp32 / (card.sms * 2 * lanes) < 2.6e9
        # Tensor cores are clocked a little lower at some boost figures.
        a_clock = card.half / card.fp32 * 2 * lanes
        assert any(0.87 * 2**power < a_clock < 1.01 * 2**power for power in (9, 10, 11, 12, 13)), card.name


def test_a_decoder_layer_of_every_card_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--card", "RTX 4090", "H200", "--m", "8192", "--shape", "4096x4096"]) == 0
    printed = capsys.readouterr().out
    assert "| RTX 4090, triton, 128 MiB | 43 |" in printed and "| RTX 4090, triton, 256 MiB | 39 |" in printed
    assert "| H200, cublas, 128 MiB | 52 |" in printed and "| H200, cublas, 256 MiB | 50 |" in printed
