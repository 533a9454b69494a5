"""1.0*a = a, a - a = the base, (a + b) - b = a: for every kind of LoRA, through PEFT's own loading, to fp32
rounding or a clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftkern.adapters.arithmetic import (
    LoraWeights,
    combine,
    interpolate,
    negate,
    read_adapter,
    scale,
    write_adapter,
)

from .kinds import KINDS, REPLACING, Kind, adapted, loaded, output, saved

DORA = {"target_modules": ["q_proj", "v_proj"], "use_dora": True}


@pytest.fixture(scope="module", params=KINDS)
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Kind, dict[str, LoraWeights]]:
    """A kind with its two adapters."""
    kind = KINDS[request.param]
    a, b = saved(kind, tmp_path_factory.mktemp(request.param))
    return kind, {"a": read_adapter(a), "b": read_adapter(b)}


def updates(adapter: LoraWeights) -> dict[str, Tensor]:
    """scaling * b @ a of every module, and its bias, in fp64: the definition."""
    found = {}
    for name, module in adapter.modules.items():
        found[name] = module.scaling * module.b.double().flatten(1) @ module.a.double().flatten(1)
        if module.bias is not None:
            found[f"{name}.bias"] = module.scaling * module.bias.double()
    return found


def assert_updates(adapter: LoraWeights, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Each update is the expected one to fp32 rounding of the largest; where none is expected it is that
    small."""
    got = updates(adapter)
    size = max(update.norm() for update in expected.values())
    for name in got.keys() | expected.keys():
        either = expected.get(name, got.get(name))
        zero = torch.zeros_like(either)
        assert (got.get(name, zero) - expected.get(name, zero)).norm() <= tolerance * size, name


def assert_runs_as(
    kind: Kind,
    adapter: LoraWeights,
    expected: Tensor,
    folder: Path,
    tolerance: float = 2e-5,
) -> None:
    """PEFT loads what is written, and the model computes the expected output."""
    got = output(loaded(kind, write_adapter(adapter, folder)))
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def total(parts: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for _, part in parts for name in part)
    return {name: sum(weight * part[name] for weight, part in parts if name in part) for name in names}


def test_one_times_a_is_a(case: tuple[Kind, dict[str, LoraWeights]], tmp_path: Path) -> None:
    kind, adapters = case
    result = combine("1.0*a", adapters).adapter
    for name, module in adapters["a"].modules.items():
        assert torch.equal(result.modules[name].a, module.a) and torch.equal(result.modules[name].b, module.b)
    assert_runs_as(kind, result, output(adapted(kind, kind.one, 3)), tmp_path / "out", 0.0)


def test_a_minus_a_is_the_base(case: tuple[Kind, dict[str, LoraWeights]], tmp_path: Path) -> None:
    kind, adapters = case
    assert_runs_as(kind, combine("a - a", adapters).adapter, output(kind.base()), tmp_path / "out", 0.0)


def test_a_plus_b_minus_b_is_a(case: tuple[Kind, dict[str, LoraWeights]], tmp_path: Path) -> None:
    kind, adapters = case
    assert_runs_as(
        kind,
        combine("(a + b) - b", adapters).adapter,
        output(adapted(kind, kind.one, 3)),
        tmp_path / "one",
        0.0,
    )
    write_adapter(combine("a + b", adapters).adapter, tmp_path / "sum")
    both = {"sum": read_adapter(tmp_path / "sum"), "b": adapters["b"]}
    back = combine("sum - b", both).adapter
    assert_updates(back, updates(adapters["a"]))
    assert_runs_as(kind, back, output(adapted(kind, kind.one, 3)), tmp_path / "back")
    short = combine("sum - b", both, max_error=1e-6).adapter
    for name, module in adapters["a"].modules.items():
        assert short.modules[name].rank <= module.rank, "b's ranks are gone"
    assert_updates(short, updates(adapters["a"]), 2e-6)


def test_a_sum_is_the_sum_of_the_updates(case: tuple[Kind, dict[str, LoraWeights]], tmp_path: Path) -> None:
    kind, adapters = case
    result = combine("a + 0.5*b - 2*a", adapters).adapter
    expected = total([(-1.0, updates(adapters["a"])), (0.5, updates(adapters["b"]))])
    assert_updates(result, expected)
    write_adapter(result, tmp_path / "sum")
    assert_updates(read_adapter(tmp_path / "sum"), expected)
    again = combine("1.0*s", {"s": read_adapter(tmp_path / "sum")}).adapter
    assert_runs_as(kind, again, output(loaded(kind, tmp_path / "sum")), tmp_path / "again", 0.0)


def test_merged_into_the_base_both_are_there(
    case: tuple[Kind, dict[str, LoraWeights]],
    tmp_path: Path,
) -> None:
    """What PEFT computes when both adapters are active is what their sum computes."""
    kind, adapters = case
    write_adapter(adapters["a"], tmp_path / "a")
    write_adapter(adapters["b"], tmp_path / "b")
    model = loaded(kind, tmp_path / "a")
    model.load_adapter(tmp_path / "b", "b")
    model.base_model.set_adapter(["default", "b"])
    assert_runs_as(kind, combine("a + b", adapters).adapter, output(model), tmp_path / "sum")


def test_scale_negate_interpolate(case: tuple[Kind, dict[str, LoraWeights]]) -> None:
    _, adapters = case
    a, b = adapters["a"], adapters["b"]
    assert_updates(scale(a, 0.3), total([(0.3, updates(a))]))
    assert_updates(negate(a), total([(-1.0, updates(a))]), 0.0)
    assert scale(a, 0.3).modules.keys() == a.modules.keys() and scale(a, 0.3).config == a.config
    assert_updates(interpolate(a, b, 0.25), total([(0.75, updates(a)), (0.25, updates(b))]))
    assert_updates(interpolate(a, b, 0.0), updates(a), 0.0)


def test_recompression_is_each_updates_truncated_svd(
    case: tuple[Kind, dict[str, LoraWeights]],
    tmp_path: Path,
) -> None:
    kind, adapters = case
    result = combine("a + b", adapters, rank=2)
    exact = total([(1.0, updates(adapters["a"])), (1.0, updates(adapters["b"]))])
    for name, module in result.adapter.modules.items():
        values = torch.linalg.svdvals(exact[name])
        best = (values[2:].norm() / values.norm()).item()
        assert module.rank <= 2
        assert result.errors[name] == pytest.approx(best, rel=1e-5, abs=1e-7)
        got = updates(result.adapter)[name]
        assert ((got - exact[name]).norm() / exact[name].norm()).item() == pytest.approx(
            best,
            rel=1e-4,
            abs=1e-6,
        )
    output(loaded(kind, write_adapter(result.adapter, tmp_path / "out")))


def test_ties_and_dare_in_the_weights_space_are_their_rule_on_the_updates(
    case: tuple[Kind, dict[str, LoraWeights]],
) -> None:
    from peftkern.adapters.arithmetic import Method
    from peftkern.adapters.arithmetic.rules import Piece, prepare_rule

    _, adapters = case
    parts = [updates(adapters["a"]), {name: -0.5 * update for name, update in updates(adapters["b"]).items()}]
    names = dict.fromkeys(name for part in parts for name in part)
    for method in (
        Method("ties", density=0.3),
        Method("dare", drop=0.5, seed=1),
        Method("dare_ties", drop=0.5),
    ):
        vectors = {
            n: [p.get(n, torch.zeros_like(next(q[n] for q in parts if n in q))).float() for p in parts]
            for n in names
        }
        rule = prepare_rule(
            method,
            ["a", "b"],
            lambda _, v=vectors: (Piece(n, 0, taus) for n, taus in v.items()),
        )
        expected = {n: rule.merge(Piece(n, 0, taus)).double() for n, taus in vectors.items()}
        result = combine("a - 0.5*b", adapters, method=method, space="weights", rank=200)
        # Entries at the threshold may fall to either side: the updates are rounded to fp32 along two ways.
        assert_updates(result.adapter, expected, 2e-2)


def test_ties_and_dare_in_the_core_space_run(
    case: tuple[Kind, dict[str, LoraWeights]],
    tmp_path: Path,
) -> None:
    from peftkern.adapters.arithmetic import Method

    kind, adapters = case
    everything = combine("a", adapters, method=Method("ties", density=1.0)).adapter
    assert_updates(everything, updates(adapters["a"]), 3e-6)
    for method in (Method("ties"), Method("dare", drop=0.5), Method("dare_ties", drop=0.5, scale=0.7)):
        one, other = (combine("a - 0.5*b", adapters, method=method) for _ in range(2))
        assert all(
            torch.equal(part, updates(other.adapter)[name]) for name, part in updates(one.adapter).items()
        ), "seeded"
        output(loaded(kind, write_adapter(one.adapter, tmp_path / method.name)))


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, dict[str, LoraWeights]]:
    from .kinds import llama

    kind = Kind(llama, DORA, {"r": 3, "target_modules": ["q_proj", "v_proj"]})
    a, b = saved(kind, tmp_path_factory.mktemp("dora"))
    return kind, {"a": read_adapter(a), "b": read_adapter(b)}


def test_dora_alone_is_itself_and_cancels(dora: tuple[Kind, dict[str, LoraWeights]], tmp_path: Path) -> None:
    kind, adapters = dora
    for number, what in enumerate(("a", "(a + b) - b", "a + 0*b")):
        assert_runs_as(
            kind,
            combine(what, adapters).adapter,
            output(adapted(kind, DORA, 3)),
            tmp_path / str(number),
            0.0,
        )
    assert_runs_as(kind, combine("a - a", adapters).adapter, output(kind.base()), tmp_path / "base", 0.0)
    assert_runs_as(
        kind,
        combine("b + a - a", adapters).adapter,
        output(adapted(kind, kind.other, 4)),
        tmp_path / "b",
        0.0,
    )


@pytest.mark.parametrize("what", ["0.5*a", "-a", "a + b", "b - a"])
def test_dora_is_refused_without_the_base(dora: tuple[Kind, dict[str, LoraWeights]], what: str) -> None:
    with pytest.raises(ValueError, match="adapter a: it is DoRA.*--base.*--rank"):
        combine(what, dora[1])
    with pytest.raises(ValueError, match="adapter a: it is DoRA"):
        combine(what, dora[1], rank=8)


@pytest.mark.parametrize("source", ["model", "folder"])
def test_dora_on_the_base_becomes_its_dense_update(
    dora: tuple[Kind, dict[str, LoraWeights]],
    source: str,
    tmp_path: Path,
) -> None:
    kind, adapters = dora
    base: nn.Module | Path = kind.base()
    exact = _merged_difference(kind, adapters["a"], tmp_path / "a")
    if source == "folder":
        base.save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
    result = combine("0.5*a + b", adapters, rank=32, base=base)
    assert max(result.errors.values()) < 1e-6, "of full rank nothing is lost"
    assert_updates(result.adapter, total([(0.5, exact), (1.0, updates(adapters["b"]))]), 3e-6)
    back = combine(
        "s - b", {"s": combine("a + b", adapters, rank=32, base=base).adapter, "b": adapters["b"]}
    ).adapter
    assert_runs_as(kind, back, output(adapted(kind, DORA, 3)), tmp_path / "back")
    short = combine("a + b", adapters, rank=4, base=base)
    assert 0.01 < short.worst[1] < 1 and all(module.rank == 4 for module in short.adapter.modules.values())


def _merged_difference(kind: Kind, adapter: LoraWeights, folder: Path) -> dict[str, Tensor]:
    """What PEFT's merge adds to the base's weights."""
    merged = loaded(kind, write_adapter(adapter, folder)).merge_and_unload()
    base = dict(kind.base().named_parameters())
    parameters = dict(merged.named_parameters())
    return {
        name: (parameters[f"{name}.weight"] - base[f"{name}.weight"]).detach().double()
        for name in adapter.modules
    }


def test_dora_has_no_core(dora: tuple[Kind, dict[str, LoraWeights]], tmp_path: Path) -> None:
    from peftkern.adapters.arithmetic import Method

    kind, adapters = dora
    with pytest.raises(ValueError, match="no core; give space weights"):
        combine("a + b", adapters, rank=8, base=kind.base(), method=Method("ties"))
    result = combine("a + b", adapters, rank=8, base=kind.base(), method=Method("ties"), space="weights")
    output(loaded(kind, write_adapter(result.adapter, tmp_path / "out")))


@pytest.mark.parametrize("name", REPLACING)
def test_what_an_adapter_replaces_needs_the_base(name: str, tmp_path: Path) -> None:
    kind = REPLACING[name]
    a, b = saved(kind, tmp_path)
    adapters = {"a": read_adapter(a), "b": read_adapter(b)}
    if not adapters["a"].trained:
        pytest.skip("this PEFT does not save the biases of LoRA layers (0.18)")
    exact = output(adapted(kind, kind.one, 3))
    assert_runs_as(kind, combine("1.0*a", adapters).adapter, exact, tmp_path / "one", 0.0)
    assert_runs_as(kind, combine("a - a", adapters).adapter, output(kind.base()), tmp_path / "zero", 0.0)
    with pytest.raises(ValueError, match="adapter a: it replaces .* in the base; give the base's weights"):
        combine("a + b", adapters)
    write_adapter(combine("a + b", adapters, base=kind.base()).adapter, tmp_path / "sum")
    both = {"s": read_adapter(tmp_path / "sum"), "b": adapters["b"]}
    assert_runs_as(kind, combine("s - b", both, base=kind.base()).adapter, exact, tmp_path / "back")
