"""The planner: what it reads, chooses, refuses and prints; and the issue of how far cards reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftkern.__main__ import main
from peftkern.finetune.errors import InputError
from peftkern.memory.planner.attention import attention_workspace
from peftkern.memory.planner.budgets import Limits, bytes_of, in_bytes
from peftkern.memory.planner.cards import CARDS, CPU, card_of, generic_card
from peftkern.memory.planner.choose import changes, choose, minimum
from peftkern.memory.planner.ledger import Ledger, Part
from peftkern.memory.planner.options import RunOptions
from peftkern.memory.planner.plan import fits, longest, phase_peaks, plan, predict
from peftkern.memory.planner.shapes import Shape, llama_shape, read_shape, shape_of
from peftkern.memory.planner.step import Step

pytest.importorskip("transformers", reason="transformers is not installed")

GB = 10**9
EIGHT = llama_shape("8B", hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128_256)
THIRTY_TWO = llama_shape(
    "32B", hidden=5120, intermediate=27648, layers=64, heads=40, kv_heads=8, vocab=152_064
)
SEVENTY = llama_shape("70B", hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, vocab=128_256)
TILED = RunOptions(rank=32, keep_layers=1, mlp_tile=2048)


def limits_of(gigabytes: float, ram: int = 64) -> Limits:
    """Of a card, 3 % of it left for gaps, and a machine."""
    return Limits(int(generic_card(gigabytes).memory * 0.97), ram * GB, int(0.8 * ram) * GB)


def reach(shape: Shape, options: RunOptions, gigabytes: float, ram: int = 64) -> int:
    return longest(shape, options, limits_of(gigabytes, ram), generic_card(gigabytes))


def test_slope_and_intercept_of_an_8b_shape() -> None:
    card = CARDS["rtx 4090"]

    def peak(length: int) -> int:
        return max(peak.nbytes for peak in phase_peaks(Step(EIGHT, TILED.but(length=length), card)))

    slope = (peak(131_072) - peak(65_536)) / 65_536
    assert slope <= 120_000
    assert peak(131_072) - 131_072 * slope <= 8.3 * GB


@pytest.mark.parametrize(
    ("gigabytes", "changed", "tokens"),
    [
        (24, {}, 131_072),
        (24, {"embedding_on_host": True}, 160_000),
        (24, {"embedding_on_host": True, "kv_groups": True}, 185_000),
        (16, {}, 65_536),
        (12, {}, 32_768),
        (8, {"embedding_on_host": True, "mlp_tile": 512}, 16_384),
    ],
)
def test_how_far_an_8b_shape_reaches(gigabytes: float, changed: dict, tokens: int) -> None:
    assert reach(EIGHT, TILED.but(**changed), gigabytes) >= tokens


def test_how_far_larger_shapes_reach_on_24_gb() -> None:
    assert reach(THIRTY_TWO, TILED.but(embedding_on_host=True, mlp_tile=512), 24) >= 24_000
    assert reach(SEVENTY, TILED.but(layers_on_host=True), 24) >= 8_192


@pytest.mark.parametrize(
    ("shape", "gigabytes", "length", "ram"),
    [(EIGHT, 24, 4096, 64), (EIGHT, 24, 131_072, 64), (EIGHT, 8, 16_384, 64), (SEVENTY, 24, 8192, 64)],
)
def test_what_is_chosen_fits_and_nothing_cheaper_does(
    shape: Shape, gigabytes: float, length: int, ram: int
) -> None:
    limits, card = limits_of(gigabytes, ram), generic_card(gigabytes)
    options = choose(shape, RunOptions(length=length, rank=32), limits, card)
    assert (options.length, options.rank, options.adapter_bytes) == (length, 32, 4)
    assert fits(shape, options, limits, card)
    if options.keep_layers is not None:
        kept = options.kept(shape.layers)
        assert kept == shape.layers or not fits(shape, options.but(keep_layers=kept + 1), limits, card)
    if options.checkpointing:
        assert not fits(shape, options.but(checkpointing=False, layers_on_host=False), limits, card)


def test_checkpoints_that_the_host_has_no_room_for_go_to_the_disk() -> None:
    card, few = generic_card(24), Limits(int(23 * 2**30), 16 * GB, 12 * GB, 100 * GB)
    options = choose(EIGHT, RunOptions(length=131_072, rank=32), few, card)
    found = plan(EIGHT, options, few, card)
    assert found.fits and found.tier_bytes("disk") == options.on_disk(32) * 131_072 * 8192 > 0
    assert not fits(EIGHT, options.but(disk_layers=options.disk_layers - 1), few, card)
    with pytest.raises(InputError, match="host memory"):
        choose(EIGHT, RunOptions(length=131_072, rank=32), Limits(few.gpu, few.host, few.pinned, 0), card)


def test_less_than_the_minimum_is_refused_with_the_minimum() -> None:
    card, limits = generic_card(8), limits_of(8)
    least, how = minimum(EIGHT, RunOptions(length=131_072, rank=32), card)
    with pytest.raises(InputError, match="needs .* at the least") as caught:
        choose(EIGHT, RunOptions(length=131_072, rank=32), limits, card)
    assert in_bytes(least) in str(caught.value)
    assert max(peak.nbytes for peak in phase_peaks(Step(EIGHT, how, card))) == least
    assert fits(EIGHT, how, Limits(least, 1 << 50, 1 << 50), card)
    assert not fits(EIGHT, how, Limits(least - 1, 1 << 50, 1 << 50), card)
    with pytest.raises(InputError, match="even one token"):
        choose(SEVENTY, RunOptions(rank=32), Limits(1 * GB, 64 * GB), card)


def test_changes_name_what_fits_first_and_the_quickest_of_it() -> None:
    card, limits = generic_card(24), limits_of(24)
    options = RunOptions(length=65_536, rank=32)
    found = changes(EIGHT, options, limits, card)
    assert found[0].fits and all(change.device <= limits.gpu for change in found if change.fits)
    fitting = [change.fits for change in found]
    assert fitting == sorted(fitting, reverse=True)
    seconds = [change.seconds for change in found if change.fits]
    assert seconds == sorted(seconds)
    assert not fits(EIGHT, options, limits, card)


def test_longest_and_largest_batch_are_the_last_that_fit() -> None:
    card, limits = generic_card(24), limits_of(24)
    found = plan(EIGHT, TILED.but(length=8192), limits, card)
    assert found.fits
    for changed, more in (("length", found.longest), ("batch", found.largest_batch)):
        assert fits(EIGHT, found.options.but(**{changed: more}), limits, card)
        assert not fits(EIGHT, found.options.but(**{changed: more + 1}), limits, card)


def test_peaks_are_sums_of_their_parts() -> None:
    found = plan(EIGHT, TILED.but(length=4096), limits_of(24), generic_card(24))
    for peak in found.peaks:
        assert peak.nbytes == sum(part.nbytes for part in peak.parts)
    assert predict(EIGHT, TILED.but(length=4096), found.card, allocated=False) == found.device_bytes
    assert predict(EIGHT, TILED.but(length=4096), found.card) < found.device_bytes


@pytest.mark.parametrize(
    ("card", "changed", "what"),
    [
        ("rtx 4090", {"attention": "math", "length": 32_768}, "dense attention"),
        ("t4", {"length": 2048}, "has no FlashAttention"),
        ("t4", {"length": 2048, "attention": "efficient"}, "fewer key/value heads"),
        ("rtx 4090", {"dtype_bytes": 4}, "16-bit"),
    ],
)
def test_refusals_say_why(card: str, changed: dict, what: str) -> None:
    found = plan(EIGHT, TILED.but(**changed), limits_of(80), CARDS[card])
    assert any(what in text for text in found.refusals) and not found.fits


def test_deterministic_attention_and_wsl_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from peftkern.memory import host

    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(host, "in_wsl", lambda: True)
    found = plan(EIGHT, TILED.but(length=16_384), limits_of(24), CARDS["rtx 4090"])
    once, four_times = (
        attention_workspace(Step(EIGHT, TILED.but(length=16_384, deterministic=on), CARDS["rtx 4090"]))
        for on in (False, True)
    )
    assert four_times - once == 3 * 16_384 * 4096 * 4
    assert any("4 times" in text for text in found.warnings)
    assert any("WSL" in text for text in found.warnings)
    assert not plan(EIGHT, TILED, limits_of(24), CPU).warnings


def test_a_shape_is_read_from_a_config_alone(tmp_path: Path) -> None:
    import transformers

    config = transformers.Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=200,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        shape = read_shape(path)
        assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (64, 3, 4, 2, 32)
        assert shape.tied and shape.query_norms and shape.vocab == 200
        total = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
        assert shape.parameters == total
    with pytest.raises(InputError, match="could not be read"):
        read_shape(tmp_path / "nothing")


def test_fused_projections_are_recognized() -> None:
    import transformers

    config = transformers.Phi3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    shape = shape_of(config)
    assert shape.intermediate == 96 and [len(shape.of(part)) for part in ("qkv", "gate_up")] == [1, 1]


def test_sizes_and_cards_are_read() -> None:
    assert bytes_of("24GiB", "--ram") == 24 << 30 and bytes_of("64", "--ram") == 64 * GB
    assert card_of("RTX 4090") is CARDS["rtx 4090"] and card_of("h100").arch == 90
    assert card_of("23GiB").memory == 23 << 30 and card_of("48").memory < 48 << 30
    for text in ("24x", "", "-3", "0"):
        with pytest.raises(InputError, match="--gpu"):
            card_of(text)
    with pytest.raises(InputError, match="--ram many"):
        bytes_of("many", "--ram")


def test_the_ledger_remembers_the_fullest_moment() -> None:
    ledger = Ledger()
    ledger.hold([Part("w", 100)])
    ledger.make("forward", "a", x=(50, "h"), scratch=(5, "s"))
    ledger.free("x", "unknown")
    ledger.make("forward", "b", y=(20, "h"))
    assert ledger.total == 120 and ledger.peaks["forward"].nbytes == 155
    assert ledger.peaks["forward"].at == "a" and len(ledger.peaks["forward"].parts) == 3


@pytest.fixture
def folder(tmp_path: Path) -> str:
    import transformers

    transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_command_prints_a_table_and_draws(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    options = ["--gpu", "24", "--ram", "64GB", "--length", "131072", "--rank", "32", "--plot", str(picture)]
    assert main(["plan", folder, *options]) == 0
    text = capsys.readouterr().out
    for words in (
        "It fits",
        "attention backward",
        "packed weights",
        "longest sequence",
        "expected",
        "assumed",
    ):
        assert words in text
    assert picture.stat().st_size > 10_000


def test_the_command_gives_json(folder: str, capsys: pytest.CaptureFixture) -> None:
    options = ["--gpu", "24", "--ram", "64GB", "--length", "131072", "--rank", "32", "--no-checkpointing"]
    assert main(["plan", folder, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["shortages"]["gpu"] > 0
    assert found["changes"][0]["fits"] and len(found["peaks"]) == 6


def test_the_command_says_what_is_wrong(folder: str, capsys: pytest.CaptureFixture) -> None:
    for options in (["--gpu", "many"], ["--gpu", "24", "--plot", "x.txt"], ["--gpu", "24", "--length", "0"]):
        assert main(["plan", folder, "--ram", "64GB", *options]) == 2
        assert capsys.readouterr().err.startswith("peftkern plan: error: ")
