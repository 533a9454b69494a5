"""Loading in slices: the model that transformers gives, bit for bit."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkern import bnb_backend, use_backend
from peftkern.formats import nf4
from peftkern.memory import loading, sliced_quantize, stored_weights
from peftkern.memory.count import MemoryCount
from peftkern.memory.loading import load_4bit, reads_in_slices
from peftkern.memory.sliced_quantize import dense_slices, quantize_slices, staging_bytes
from peftkern.memory.stored_weights import StoredTensor, StoredWeights, WeightsError
from peftkern.ops import quantize

from .. import stock

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from peftkern.memory import sliced_quantizer  # noqa: E402  (imports transformers)

SMALL = dict(
    vocab_size=131,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slices even in small tensors."""
    for module in (stored_weights, sliced_quantize):
        monkeypatch.setattr(module, "SLICE", 256 * 64)


def llama(**sizes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, intermediate_size=300, **sizes))


def save(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    model.generation_config.max_new_tokens = 3  # something that config.json does not tell
    model.to(dtype).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama in shards."""
    saved = save(llama(), tmp_path_factory.mktemp("llama"), max_shard_size="100KB")
    assert len(list(saved.glob("*.safetensors"))) > 2
    return saved


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def of_transformers(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    options = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True) | options
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **options)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=dtype, device_map={"": "cpu"}, quantization_config=config)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Packed bytes under a float dtype may be NaN, which equals nothing."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(model: Any, other: Any) -> None:
    """Every tensor, every attribute of every module, both configs."""
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(bits(tensor), bits(theirs[name])), name
    for (name, one), (_, two) in zip(model.named_modules(), other.named_modules(), strict=True):
        assert vars(one).keys() == vars(two).keys(), name
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert vars(one).keys() == vars(two).keys() and one.requires_grad == two.requires_grad, name
        if (state := getattr(one, "quant_state", None)) is not None:
            assert (state.shape, state.dtype) == (two.quant_state.shape, two.quant_state.dtype), name
            assert one.module is not None and one.module.quant_state is state
    assert all(torch.equal(one, two) for one, two in zip(model.buffers(), other.buffers(), strict=True))
    assert model.config.to_dict() == other.config.to_dict()
    assert model.generation_config == other.generation_config
    assert type(model.hf_quantizer) is type(other.hf_quantizer) and not model.training
    assert model.is_loaded_in_4bit and model.quantization_method == other.quantization_method


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 21), (257, 191), (130, 256), (64, 1024), (16385,)])
def test_slices_give_the_bits_of_the_whole(
    shape: tuple[int, ...], quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    dense.view(-1)[64:128] = 0
    like = bnb.nn.Params4bit(
        torch.empty(shape, device="meta"), quant_type=quant_type, compress_statistics=nested
    )
    right = stock.quantizes(shape, 64, quant_type, dtype, zeros=True)
    with contextlib.ExitStack() as ours:
        if not right and bnb_backend.register():
            ours.callback(bnb_backend.unregister)
        got = quantize_slices(dense_slices(dense), like, shape, dtype, "cpu")
    with use_backend("reference"):
        packed, absmax = quantize.quantize_4bit(dense, 64, nf4.code_tensor(quant_type))
    assert torch.equal(got.data, packed)
    state = got.quant_state
    assert state.dtype == dtype and state.shape == shape and state.nested == nested
    if not nested:
        assert torch.equal(state.absmax, absmax)
    if right:
        whole = bnb.nn.Params4bit(dense, quant_type=quant_type, compress_statistics=nested).to("cpu")
        assert torch.equal(got.data, whole.data)
        mine, theirs = (one.quant_state.as_dict(packed=True) for one in (got, whole))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(31, 70), (700, 512)])
def test_staging_is_what_the_planner_counts(shape: tuple[int, int], nested: bool) -> None:
    dense = torch.randn(shape)
    like = bnb.nn.Params4bit(torch.empty(shape, device="meta"), quant_type="nf4", compress_statistics=nested)
    with MemoryCount(phase="load", classify=None) as count:
        got = quantize_slices(dense_slices(dense), like, shape, torch.bfloat16, "cpu")
    state = got.quant_state.as_dict()
    tensors = [
        got.data,
        *(value for key, value in state.items() if isinstance(value, torch.Tensor) and "map" not in key),
    ]
    result = sum(tensor.nbytes for tensor in tensors)
    predicted = result + staging_bytes(dense.numel(), 2, nested=nested, blocksize=64)
    assert count.peaks["load"] == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize(
    ("stored", "dtype", "options"),
    [
        (torch.bfloat16, torch.bfloat16, {}),
        (torch.bfloat16, torch.float32, dict(nested=False)),
        (torch.float16, torch.bfloat16, dict(quant_type="fp4")),
        (torch.float32, torch.bfloat16, dict(quant_type="fp4", nested=False)),
        (torch.float32, torch.float32, dict(quant_storage=torch.bfloat16)),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_that_of_transformers(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, options: dict[str, Any], tied: bool
) -> None:
    saved = save(llama(tie_word_embeddings=tied), tmp_path, stored, max_shard_size="100KB")
    model = load_4bit(saved, dtype=dtype, device="cpu", progress=False, **options)
    names = dict(quant_type="bnb_4bit_quant_type", nested="bnb_4bit_use_double_quant")
    names |= dict(quant_storage="bnb_4bit_quant_storage")
    other = of_transformers(saved, dtype, **{names[key]: value for key, value in options.items()})
    assert_same(model, other)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} >= {dtype}
    assert torch.float32 not in {p.dtype for p in model.parameters()} or dtype == torch.float32
    ids = torch.tensor([[5, 7, 11]])
    assert torch.equal(model.generate(ids), other.generate(ids))


def test_linears_are_never_dense(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    dense = StoredTensor.dense
    monkeypatch.setattr(
        StoredTensor, "dense", lambda self, *args: read.append(self.name) or dense(self, *args)
    )
    load_4bit(folder, progress=False)
    assert len(read) == 2 + 1 + 2 * 2 and all(
        "norm" in name or "embed" in name or "head" in name for name in read
    )


def test_quantized_checkpoints_keep_their_bits(folder: Path, tmp_path: Path) -> None:
    made = load_4bit(folder, quant_type="fp4", progress=False)
    made.save_pretrained(tmp_path, max_shard_size="60KB")
    model = load_4bit(tmp_path, progress=False)  # nf4 is the default: the checkpoint's own type stays
    assert_same(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}))
    mine, theirs = model.state_dict(), made.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_hub_ids_in_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    model = load_4bit("some/llama", progress=False)
    assert model.name_or_path == model.config._name_or_path == "some/llama"
    with pytest.raises(WeightsError, match="some/llama: neither a folder nor a hub id in the local cache"):
        load_4bit("some/llama", revision="other", progress=False)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=131, n_embd=64, n_layer=2, n_head=2, n_positions=64)
    )


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SMALL, intermediate_size=96, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


def phi3() -> Any:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, intermediate_size=96))


@pytest.mark.filterwarnings("ignore:.*stay dense")
@pytest.mark.parametrize("build", [gpt2, mixtral, phi3])
def test_other_kinds_of_models(build: Callable[[], Any], tmp_path: Path) -> None:
    """Conv1D is stored transposed, experts are stored apart and merged."""
    torch.manual_seed(0)
    saved = save(build(), tmp_path)
    assert_same(load_4bit(saved, progress=False), of_transformers(saved, torch.bfloat16))


def test_dense_experts_are_told(tmp_path: Path) -> None:
    save(mixtral(), tmp_path)
    with pytest.warns(UserWarning, match=r"4 parameters of experts stay dense, 0\.00 GB"):
        load_4bit(tmp_path, progress=False)


def test_other_options_reach_transformers(folder: Path) -> None:
    model = load_4bit(
        folder, progress=False, attn_implementation="eager", skip_modules=["lm_head", "up_proj"]
    )
    assert model.config._attn_implementation == "eager"
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)


def cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def change(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def moved(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    homes = index["weight_map"]
    homes["model.norm.weight"] = next(file for file in homes.values() if file != homes["model.norm.weight"])
    change(folder, "model.safetensors.index.json", weight_map=homes)


@pytest.mark.filterwarnings("ignore:.*stay dense")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: sorted(f.glob("*.safetensors"))[1].unlink(),
            r"model-00002-of-\d+.safetensors: is missing.*copy it",
        ),
        (cut, r"model-00002-of-\d+.safetensors: cut or padded \(\d+ bytes, \d+ expected\): download or copy"),
        (
            lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b""),
            r"model-00001-of-\d+.safetensors: empty",
        ),
        (
            lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"\xff" * 99),
            "header is longer than the file",
        ),
        (
            lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes((9).to_bytes(8, "little") + b"{" * 9),
            "its header is garbled",
        ),
        (moved, r"lacks model\.norm\.weight, which model\.safetensors\.index\.json says it holds"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is no index of shards"),
        (lambda f: [file.unlink() for file in f.glob("model*")], "has neither model.safetensors nor"),
        (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
        (lambda f: change(f, "config.json", num_hidden_layers=3), r"lack 9 weights \(model\.layers\.2"),
        (
            lambda f: change(f, "config.json", intermediate_size=96),
            "other shapes than config.json says: 6 weights",
        ),
        (
            lambda f: change(f, "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
            "is not run here",
        ),
        (lambda f: change(f, "config.json", model_type="own"), r"config\.json is not understood \(.*own"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not understood"),
        (lambda f: change(f, "config.json", model_type="t5"), "t5 is no causal language model"),
        (
            lambda f: change(f, "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
            "by gptq",
        ),
        (
            lambda f: change(f, "config.json", quantization_config={"load_in_8bit": True}),
            "bitsandbytes to 8 bits",
        ),
    ],
)
def test_one_message_names_the_fault(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        load_4bit(copy, progress=False)
    assert str(copy) in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "nobody/nothing",
            {},
            "neither a folder nor a hub id in the local cache: .*hf download nobody/nothing",
        ),
        ("model.gguf", {}, "a GGUF file: `peftkern finetune --model` converts it"),
        (__file__, {}, "is a file: give the folder"),
        ("nobody/nothing", dict(quant_type="int4"), "quant_type: got 'int4', expected 'nf4' or 'fp4'"),
    ],
)
def test_arguments_that_are_not_served(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_4bit(model, **options)


def test_what_is_not_used_is_told(copy: Path) -> None:
    change(copy, "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"not used from its files: 9 weights \(model\.layers\.1\."):
        load_4bit(copy, progress=False)


def test_a_file_that_shrinks_while_it_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoredWeights(copy) as weights:
        path = weights.tensors["model.layers.1.mlp.up_proj.weight"].path
    size = path.stat().st_size

    class Bar(Progress):
        def update(self, count: int) -> None:
            path.write_bytes(path.read_bytes()[: size // 8])

    monkeypatch.setattr(loading, "_progress", lambda name, shown: Bar())
    with pytest.raises(
        WeightsError, match=rf"{path}: ends within model\.layers.*: download or copy this file"
    ):
        load_4bit(copy)


class Progress:
    """In the place of the bar."""

    def reset(self, total: int) -> None:
        self.total = total

    def update(self, count: int) -> None:
        pass

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def open_files(folder: Path) -> list[Path]:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [file for link in links if (file := Path(link.readlink())).parent == folder]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux' /proc")
def test_interrupted_loading_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    made: list[weakref.ref] = []

    def quantize(*args: Any) -> Any:
        weight = quantize_slices(*args)
        made.append(weakref.ref(weight))
        return weight

    class Bar(Progress):
        def update(self, count: int) -> None:
            seen.append(count)
            if len(seen) == 20:
                assert open_files(folder) and sum(seen) < self.total
                raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_progress", lambda name, shown: Bar())
    monkeypatch.setattr(sliced_quantizer, "quantize_slices", quantize)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        load_4bit(folder)
    gc.collect()
    assert len(seen) == 20 and not open_files(folder)
    assert made and not [one for one in made if one() is not None]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_bar_counts_every_byte(folder: Path) -> None:
    counts: list[int] = []
    with StoredWeights(folder, on_read=counts.append, keep_cache=True) as weights:
        for tensor in weights.tensors.values():
            assert torch.equal(tensor.dense("cpu"), tensor.dense("cpu", tensor.dtype))
        assert sum(counts) == 2 * weights.nbytes


def test_which_folders_it_serves(copy: Path, tmp_path: Path) -> None:
    assert reads_in_slices(copy) and not reads_in_slices(tmp_path)
    change(copy, "config.json", auto_map={"AutoConfig": "own.Own"})
    assert not reads_in_slices(copy)


def test_the_report_is_that_of_transformers(copy: Path) -> None:
    change(copy, "config.json", num_hidden_layers=3)
    _, info = load_4bit(copy, progress=False, output_loading_info=True)
    assert len(info["missing_keys"]) == 9 and not info["unexpected_keys"] and not info["mismatched_keys"]
