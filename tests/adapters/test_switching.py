"""A bank of adapters on one base: each as PEFT loads it, switched by pointers, nothing patched anew."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkern
from peftkern.adapters.arithmetic import LoraWeights, of_model, read_adapter
from peftkern.adapters.switching import AdapterBank
from peftkern.patching.forwards import find

from .arithmetic.kinds import IDS, KINDS, Kind, adapted, convolutions, llama, loaded, output, saved

SLOT = {"target_modules": "all-linear", "r": 2}
KIND = KINDS["rslora"]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Adapters of other ranks, scalings and modules than the slot's."""
    found = {}
    for name in ("lora", "rslora", "patterns", "regex"):
        a, b = saved(KINDS[name], tmp_path / name)
        found |= {f"{name}-a": a, f"{name}-b": b}
    return found


def bank_of(folders: dict[str, Path], *, patch: bool) -> AdapterBank:
    model = adapted(Kind(llama, SLOT, {}), SLOT, 9)
    if patch:
        peftkern.patch(model)
    bank = AdapterBank(model)
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() <= 2e-5 * expected.abs().max())


@pytest.mark.parametrize("patch", [False, True])
def test_each_adapter_is_as_peft_loads_it(folders: dict[str, Path], patch: bool) -> None:
    bank = bank_of(folders, patch=patch)
    own = output(bank.model)
    expected = {name: output(loaded(KIND, folder)) for name, folder in folders.items()}
    for name in (*folders, *reversed(folders)):
        bank.use(name)
        assert bank.current == name and close(output(bank.model), expected[name]), name
    bank.use(None)
    assert torch.equal(output(bank.model), own)


def test_single_tokens_follow_too(folders: dict[str, Path]) -> None:
    """The kernel for few rows keeps what it prepared only while the same tensors are there."""
    bank = bank_of(folders, patch=True)
    for name in folders:
        with bank.using(name), torch.no_grad():
            one = bank.model(input_ids=IDS[:1, :1]).logits
            assert close(one, loaded(KIND, folders[name])(input_ids=IDS[:1, :1]).logits), name


def test_nothing_is_copied_and_nothing_patched_anew(folders: dict[str, Path]) -> None:
    bank = bank_of(folders, patch=True)
    layer = next(m for n, m in bank.model.named_modules() if n.endswith("layers.1.self_attn.q_proj"))
    forward, parameter = find(layer)[1], layer.lora_A["default"].weight
    adapter = read_adapter(folders["patterns-a"])
    bank.add("mine", adapter)
    bank.use("mine")
    assert layer.lora_A["default"].weight is parameter and find(layer)[1] is forward
    assert parameter.data_ptr() == adapter.modules["model.layers.1.self_attn.q_proj"].a.data_ptr()


def test_a_thousand_adapters_switch_as_fast_as_two(folders: dict[str, Path]) -> None:
    bank = bank_of({}, patch=True)
    adapter = of_model(bank.model)
    for number in range(1000):
        bank.add(f"n{number}", adapter)
    assert len(bank) == 1000 and "n999" in bank and bank.names[0] == "n0"

    def seconds(names: list[str]) -> float:
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for name in names:
                bank.use(name)
            best = min(best, (time.perf_counter() - start) / len(names))
        return best

    assert seconds([f"n{7 * i}" for i in range(100)]) < 3 * seconds(["n0", "n1"] * 50)


def test_a_mixed_batch_from_the_bank(folders: dict[str, Path]) -> None:
    bank = bank_of(folders, patch=True)
    state = set(bank.model.state_dict())
    names = ["lora-b", "rslora-a", "lora-b", "__base__", "regex-a"]
    ids = torch.randint(0, 48, (5, 7), generator=torch.Generator().manual_seed(5))
    with bank.mixed(names), torch.no_grad():
        got = bank.model(input_ids=ids).logits
    for row, name in enumerate(names):
        model = llama() if name == "__base__" else loaded(KIND, folders[name])
        with torch.no_grad():
            assert close(got[row], model(input_ids=ids[row : row + 1]).logits[0]), name
    assert set(bank.model.state_dict()) == state


@pytest.mark.parametrize(
    ("kind", "slot"),
    [("embeddings", {}), ("lora_bias", {}), ("conv1d", {}), ("conv2d", {})],
)
def test_other_kinds(kind: str, slot: dict, tmp_path: Path) -> None:
    case = KINDS[kind]
    a, _ = saved(case, tmp_path)
    model = adapted(case, case.one, 11)
    bank = AdapterBank(model)
    bank.add("a", a)
    with bank.using("a"):
        assert close(output(model), output(loaded(case, a)))


def test_dora(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "use_dora": True}
    case = Kind(llama, config, {"target_modules": ["q_proj"]})
    a, b = saved(case, tmp_path)
    model = adapted(case, config, 11)
    bank = AdapterBank(model)
    bank.add("a", a)
    with bank.using("a"):
        assert close(output(model), output(loaded(case, a)))
    with pytest.raises(ValueError, match="it is no DoRA"):
        bank.add("b", b)
    with pytest.raises(ValueError, match="cannot be mixed"), bank.mixed(["a"]):
        pass


def test_what_does_not_fit_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    bank = bank_of(folders, patch=False)
    with pytest.raises(ValueError, match="'lora-a' is taken"):
        bank.add("lora-a", folders["lora-a"])
    with pytest.raises(ValueError, match="'nobody' is not in the bank of 8 adapters"):
        bank.use("nobody")
    with pytest.raises(ValueError, match="no LoRA adapter 'other'"):
        AdapterBank(bank.model, "other")
    narrow = AdapterBank(adapted(Kind(llama, {}, {}), {"target_modules": ["q_proj"]}, 9))
    with pytest.raises(ValueError, match="adapts model.layers.0.mlp.down_proj and .* more, where the slot"):
        narrow.add("x", folders["rslora-a"])
    weights = read_adapter(folders["lora-a"])
    modules = dict(weights.modules)
    name, module = next(iter(modules.items()))
    modules[name] = type(module)(module.a[:, :-1], module.b, module.scaling)
    with pytest.raises(ValueError, match="does not fit the model at"):
        bank.add("x", LoraWeights("x", weights.config, modules))
    saved(KINDS["lora_bias"], tmp_path / "biased")
    with pytest.raises(ValueError, match="lora_bias"):
        bank.add("x", tmp_path / "biased" / "a")


def test_merged_models_and_removal(folders: dict[str, Path]) -> None:
    bank = bank_of(folders, patch=False)
    bank.use("lora-b")
    bank.remove("lora-b")
    assert bank.current is None and "lora-b" not in bank
    bank.model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        bank.use("lora-a")


def test_a_bank_of_convolutions_does_not_mix(tmp_path: Path) -> None:
    case = KINDS["conv2d"]
    a, _ = saved(case, tmp_path)
    model: nn.Module = adapted(case, case.one, 11)
    assert case.base is convolutions
    bank = AdapterBank(model)
    bank.add("a", a)
    with pytest.raises(ValueError, match="convolution"), bank.mixed(["a"]):
        pass
