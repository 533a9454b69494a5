"""`merge`, `unmerge`, `compare_merges` of whole models: numbers by definition, bytes, reports, bad input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import peftkern
from peftkern import NF4Weight
from peftkern.adapters.merge import FORMS, RESIDUAL, compare_merges, merge, unmerge
from peftkern.adapters.merge_report import MergeComparison, MergeReport, Probe
from tests.adapters import merging
from tests.adapters.merging import KINDS, adapted, assert_same, layers, logits, snapshot
from tests.patching import models

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(2))


def dense_of(layer: torch.nn.Module) -> torch.Tensor:
    """What the layer's base multiplies by now, fp64."""
    base = layer.base_layer
    if isinstance(base, models.bnb.nn.Linear4bit):
        return NF4Weight.from_bnb(base).dequantize(torch.float32).double()
    return base.weight.detach().double()


def originals(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that `adapted()` quantizes, by their names in a checkpoint."""
    dense = models.llama(four_bit=False)
    return {name: value.detach().clone() for name, value in dense.state_dict().items()}


def checkpoint_name(layer: str) -> str:
    return layer.removeprefix("base_model.model.") + ".weight"


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "stock"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_to_the_byte(form, patched):
    model = adapted()
    if patched:
        peftkern.patch(model)
    before, outputs = snapshot(model), logits(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for _ in range(2):
        report = merge(model, form=form, probe=IDS, progress=False)
        assert len(report.layers) == 14 and report.form == form
        assert unmerge(model) == 14
        assert_same(model, before)
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert torch.equal(logits(model), outputs)
    assert unmerge(model) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_adapter_for_every_kind(kind):
    model = adapted(kind)
    peftkern.patch(model)
    outputs, before = logits(model), snapshot(model)
    report = merge(model, form="dense", probe=IDS, progress=False)
    torch.testing.assert_close(logits(model), outputs, rtol=1e-4, atol=1e-4)
    assert report.total.survival == pytest.approx(1, abs=1e-5) and report.total.error_ratio < 1e-5
    assert report.probe.kl < 1e-7 and abs(report.probe.difference) < 1e-5
    assert all(type(layer.base_layer) is torch.nn.Linear for layer in layers(model).values())
    unmerge(model)
    assert_same(model, before)


@pytest.mark.parametrize("form", ["requantize", "feedback", "residual", "dense"])
def test_the_reports_numbers_are_their_definitions(form):
    model = adapted("dora")
    peftkern.patch(model)
    base = {name: dense_of(layer) for name, layer in layers(model).items()}
    found = layers(model).items()
    goals = {name: merging.defined(base[name], merging.branches(layer)) for name, layer in found}
    report = merge(model, form=form, probe=IDS, original=originals(model), progress=False, rank=3)
    quantized_from = originals(model)
    for layer in report.layers:
        module, origin = layers(model)[layer.name], base[layer.name]
        stored = dense_of(module)
        if form == "residual":
            side = module.lora_B[RESIDUAL].weight.double() @ module.lora_A[RESIDUAL].weight.double()
            stored = stored + side * module.scaling[RESIDUAL]
        delta, change = goals[layer.name] - origin, stored - origin
        got = layer.measures
        assert got.delta_ratio == pytest.approx((delta.norm() / origin.norm()).item(), rel=1e-4)
        error, along = (stored - goals[layer.name]).norm(), (delta * change).sum()
        assert got.error_ratio == pytest.approx((error / delta.norm()).item(), rel=1e-3, abs=1e-5)
        assert got.survival == pytest.approx((along / delta.norm() ** 2).item(), rel=1e-3, abs=1e-5)
        assert got.cosine == pytest.approx((along / delta.norm() / change.norm()).item(), rel=1e-3)
        q = quantized_from[checkpoint_name(layer.name)].double() - origin
        assert got.mismatch_ratio == pytest.approx((q.norm() / delta.norm()).item(), rel=1e-4)
    total = report.total
    assert total.delta == pytest.approx(math.sqrt(sum(layer.measures.delta**2 for layer in report.layers)))


def test_the_probes_numbers_are_their_definitions():
    model = adapted()
    peftkern.patch(model)
    adapter = torch.stack([logits(model, row[None])[0] for row in IDS]).double()
    with model.disable_adapter():
        base = torch.stack([logits(model, row[None])[0] for row in IDS]).double()
    report = merge(model, probe=IDS, progress=False)
    merged = torch.stack([logits(model, row[None])[0] for row in IDS]).double()

    def nll(of: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(of[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none").mean(1)

    p, q = (of[:, :-1].log_softmax(-1) for of in (adapter, merged))
    kl = (p.exp() * (p - q)).sum(-1).mean(1)
    got = report.probe
    assert (got.tokens, got.sequences) == (60, 4)
    perplexities = [nll(of).mean().exp().item() for of in (base, adapter, merged)]
    assert got.perplexities == pytest.approx(perplexities, rel=1e-5)
    assert got.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert got.kl_error == pytest.approx((kl.std() / 2).item(), rel=1e-3)
    assert got.difference_error == pytest.approx(((nll(merged) - nll(adapter)).std() / 2).item(), rel=1e-3)
    ragged = [IDS[0], IDS[1, :5]]
    unmerge(model)
    assert merge(model, probe=ragged, progress=False).probe.tokens == 19


@pytest.mark.parametrize("form", FORMS)
def test_onto_the_original_weights(form):
    model = adapted()
    quantized_from = originals(model)
    goals = {}
    for name, layer in layers(model).items():
        goals[name] = merging.defined(quantized_from[checkpoint_name(name)], merging.branches(layer))
    report = merge(model, form=form, base="original", original=quantized_from, probe=IDS, progress=False)
    for layer in report.layers:
        stored, goal = dense_of(layers(model)[layer.name]), goals[layer.name]
        if form == "dense":
            assert (stored - goal).norm() < 1e-6 * goal.norm()
        else:
            assert (stored - goal).norm() < 0.25 * goal.norm()
    if form == "requantize":  # off the grid, what is added is not rounded away
        assert 0.5 < report.total.survival < 1.5 and "The original weights differ" in report.verdict


def test_original_weights_from_a_folder(tmp_path: Path):
    model = adapted()
    tensors = {name: value.contiguous() for name, value in originals(model).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    from_folder = merge(model, form="dense", base="original", original=tmp_path, progress=False)
    first = snapshot(model)
    unmerge(model)
    from_mapping = merge(model, form="dense", base="original", original=tensors, progress=False)
    assert from_folder == from_mapping
    assert_same(model, first)
    unmerge(model)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    index = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(__import__("json").dumps({"weight_map": index}))
    with pytest.raises(ValueError, match="lacks model-00002-of-00002.safetensors, which"):
        merge(model, original=tmp_path, progress=False)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json is damaged"):
        merge(model, original=tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds no .safetensors file"):
        merge(model, original=tmp_path / "nothing", progress=False)


def test_original_weights_of_another_model_are_named():
    model = adapted()
    before, tensors = snapshot(model), originals(model)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(
        ValueError, match=r"up_proj.weight of the mapping is \(8, 8\), the layer .* \(80, 64\)"
    ):
        merge(model, original=tensors | {name: torch.zeros(8, 8)}, progress=False)
    del tensors[name]
    with pytest.raises(ValueError, match="has no model.layers.1.mlp.up_proj.weight"):
        merge(model, original=tensors, progress=False)
    prefixed = {f"language_model.{key}": value for key, value in originals(model).items()}
    assert merge(model, original=prefixed, progress=False).total.mismatch > 0
    unmerge(model)
    assert_same(model, before)


def test_several_adapters_by_name_and_order():
    model = adapted()
    merging.add(model, "second", r=3, use_rslora=True)
    peftkern.patch(model)
    before = snapshot(model)
    model.base_model.set_adapter(["default", "second"])
    outputs = logits(model)
    model.set_adapter("default")
    report = merge(model, form="dense", adapters=["default", "second"], probe=IDS, progress=False)
    assert report.layers[0].adapters == ("default", "second") and report.probe.kl < 1e-7
    torch.testing.assert_close(logits(model), outputs, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert_same(model, before)


def test_residual_takes_the_adapters_place_and_gives_it_back():
    model = adapted()
    peftkern.patch(model)
    outputs = logits(model)
    report = merge(model, form="residual", rank=8, probe=IDS, progress=False)
    assert model.active_adapters == [RESIDUAL]
    bare = merge(adapted(), probe=IDS, progress=False)
    assert report.total.error < 0.75 * bare.total.error and report.probe.kl < 0.5 * bare.probe.kl
    with pytest.raises(ValueError, match="merged already; call unmerge"):
        merge(model)
    with pytest.raises(ValueError, match="call peftkern.adapters.merge.unmerge"):
        model.merge_adapter()
    unmerge(model)
    assert model.active_adapters == ["default"] and RESIDUAL not in model.peft_config
    assert torch.equal(logits(model), outputs)


def test_stochastic_draws_by_the_layers_name():
    one, two = adapted(), adapted()
    merge(one, form="stochastic", progress=False)
    merge(two, form="stochastic", progress=False)
    assert_same(one, snapshot(two))
    unmerge(two)
    merge(two, form="stochastic", seed=1, progress=False)
    assert any(not torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_dense_base_is_merged_in_its_dtype_whatever_the_form():
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(four_bit=False, dtype=dtype)
        before = snapshot(model)
        report = merge(model, form="requantize", probe=IDS, progress=False)
        first = report.layers[0]
        assert first.base == str(dtype).removeprefix("torch.") and first.note == "dense base"
        assert report.total.survival == pytest.approx(1, abs=1e-4 if dtype is torch.float32 else 0.1)
        unmerge(model)
        assert_same(model, before)


def test_what_cannot_be_merged_is_left_and_named():
    model = adapted("bias")
    layer = models.first(model)
    layer.base_layer.bias = None
    report = merge(model, progress=False)
    (left,) = report.left
    assert left[0].endswith("layers.0.self_attn.o_proj") and "has none to take it up" in left[1]
    assert not layer.merged and len(report.layers) == 7 and "Left as it is" in str(report)


def test_a_failure_midway_leaves_the_model_as_it_was(monkeypatch):
    from peftkern.adapters import merge as module

    model = adapted()
    before = snapshot(model)
    real, calls = module.merge_layer, []

    def failing(task, form, **options):
        calls.append(task)
        if len(calls) == 5:
            raise RuntimeError("no more memory")
        return real(task, form, **options)

    monkeypatch.setattr(module, "merge_layer", failing)
    with pytest.raises(RuntimeError, match="no more memory"):
        merge(model, progress=False)
    assert_same(model, before)
    assert not any(layer.merged for layer in layers(model).values())


BAD = {
    "form": (dict(form="int4"), "form: got 'int4', expected one of requantize"),
    "base": (dict(base="16"), "base: got '16', expected one of dequantized, original"),
    "original": (dict(base="original"), "original: is missing"),
    "feedback": (dict(form="feedback"), "probe: is missing"),
    "string": (dict(adapters="default"), "adapters: got the string"),
    "unknown": (dict(adapters=["french"]), "adapters: got 'french'; the model has default"),
    "none": (dict(adapters=[]), "adapters: got none"),
    "floats": (dict(probe=torch.randn(2, 5)), "probe: expected token ids"),
    "short": (dict(probe=torch.zeros(2, 1, dtype=torch.int64)), "at least two tokens"),
    "rank": (dict(form="residual", rank=0), "rank: got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name):
    options, message = BAD[name]
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        merge(model, **{"progress": False} | options)
    assert_same(model, before)


def test_other_bad_models_are_named():
    with pytest.raises(ValueError, match="has no LoRA layer"):
        merge(models.llama())
    model = adapted()
    layer = models.first(model)
    layer.lora_B["default"].weight.data = torch.zeros(3, 4)
    with pytest.raises(
        ValueError, match=r"for \(3, 64\), the weight is \(64, 64\): it belongs to another base"
    ):
        merge(model, progress=False)
    layer.lora_B["default"].weight.data = torch.full((64, 4), math.inf)
    with pytest.raises(ValueError, match="adapter 'default' holds NaN or inf"):
        merge(model, progress=False)
    with pytest.raises(ValueError, match="'residual' is of 4-bit weights"):
        merge(adapted(four_bit=False), form="residual", progress=False)
    tied = adapted(dtype=torch.float16, four_bit=False)
    models.first(tied).lora_B["default"].weight.data *= 1e8
    with pytest.raises(ValueError, match="beyond the range of torch.float16"):
        merge(tied, progress=False)


def test_compare_measures_all_and_changes_nothing():
    model = adapted()
    peftkern.patch(model)
    before = snapshot(model)
    forms = [*FORMS, ("dense", "original")]
    got = compare_merges(model, IDS, forms=forms, original=originals(model), progress=False)
    assert_same(model, before)
    assert [(report.form, report.base) for report in got.reports] == [
        *((form, "dequantized") for form in FORMS),
        ("dense", "original"),
    ]
    assert got.adapter_bytes > got.reports[0].bytes
    assert got.reports[-1].probe.kl > 10 * got.reports[-2].probe.kl  # the mismatch, never seen by the adapter
    text = str(got)
    assert "4-bit, nearest codes" in text and "dense on the original weights" in text
    assert text.endswith(got.verdict)


def probe_of(difference: float, error: float, gain: float = 1.0) -> Probe:
    return Probe(1000, 10, 3.0 + gain, 3.0, 3.0 + difference, error, 0.01, 0.001)


@pytest.mark.parametrize(
    ("difference", "error", "gain", "faithful"),
    [
        (0.01, 0.001, 1.0, True),
        (0.2, 0.01, 1.0, False),
        (0.04, 0.1, 1.0, None),
        (0.0, 0.0, -0.1, None),
        (0.01, math.inf, 1.0, None),
    ],
)
def test_faithful_means_the_whole_interval(difference, error, gain, faithful):
    assert probe_of(difference, error, gain).faithful() is faithful


def comparison_of(**probes: Probe) -> MergeComparison:
    model = adapted()
    report = merge(model, progress=False)
    sizes = {"requantize": 1, "residual": 2, "dense": 4}
    reports = []
    for form, probe in probes.items():
        part = report.layers[0]
        layer = type(part)(part.name, part.shape, part.base, part.adapters, part.measures, sizes[form])
        reports.append(MergeReport(form, "dequantized", (layer,), probe))
    return MergeComparison(tuple(reports), 2)


def test_the_verdict_takes_the_smallest_faithful_form():
    good, bad, unclear = probe_of(0.0, 0.001), probe_of(0.9, 0.01), probe_of(0.04, 0.1)
    assert comparison_of(requantize=bad, residual=good, dense=good).best.form == "residual"
    told = comparison_of(requantize=bad, residual=bad, dense=good).verdict
    assert told.startswith("Take dense") and "2.0 times the bytes" in told
    assert comparison_of(requantize=bad, residual=unclear).verdict.startswith("Keep the adapter")
    assert "cannot tell; give a longer probe" in comparison_of(requantize=bad, residual=unclear).verdict
    assert "gains nothing" in comparison_of(requantize=probe_of(0.0, 0.1, -1.0)).verdict


def test_plots_say_their_answer():
    figure = pytest.importorskip("matplotlib.figure")
    model = adapted()
    comparison = compare_merges(model, IDS, forms=["requantize", "dense"], progress=False)
    for drawn in (comparison, comparison.reports[0]):
        axes = figure.Figure().subplots()
        drawn.plot(axes)
        assert axes.get_title() and axes.get_xlabel()
        axes.figure.canvas.draw()
    report = comparison.reports[0]
    assert f"{report.total.survival:.0%} of the adapter's change survives" in str(report)


def test_shared_weights_are_named():
    config = models.transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    base = models.transformers.LlamaForCausalLM(config)
    model = models.peft.get_peft_model(base, models.config(target_modules=["lm_head"]))
    merging.fill(model.eval())
    report = merge(model, probe=IDS, progress=False)
    assert report.untied == ("base_model.model.lm_head",) and "Untied" in str(report)
    assert report.probe.kl < 1e-6
