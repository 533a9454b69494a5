"""Full checkpoints, streamed: what is computed, in how much memory, and what an interruption or bad input
leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.adapters.arithmetic import Method, combine_checkpoints
from peftkern.adapters.arithmetic import checkpoints as module
from peftkern.adapters.arithmetic.rules import dare_keeps

from .test_rules import ties_by_definition

SHAPES = {
    "embed_tokens.weight": (40, 16),
    "layers.0.w.weight": (16, 16),
    "layers.0.norm.weight": (16,),
    "layers.1.w.weight": (16, 16),
    "scalar": (),
}


def tensors(
    seed: int,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    around: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: spread * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if around is not None:
        found = {name: around[name].float() + value for name, value in found.items()}
    return {name: value.to(dtype) for name, value in found.items()} | {"steps": torch.tensor([3, 4])}


def save(folder: Path, values: dict[str, Tensor], shards: int = 1, **config: Any) -> Path:
    folder.mkdir(parents=True)
    names = list(values)
    if shards == 1:
        save_file(values, folder / "model.safetensors")
    else:
        places = {
            name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
        }
        for file in set(places.values()):
            save_file({name: values[name] for name in names if places[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places}),
        )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"} | config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert set(json.loads(index.read_text())["weight_map"]) == set(found)
    return found


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    base = tensors(0)
    values = {
        "base": base,
        "a": tensors(1, spread=0.1, around=base),
        "b": tensors(2, spread=0.1, around=base),
    }
    for name, shards in (("base", 2), ("a", 1), ("b", 3)):
        save(tmp_path / name, values[name], shards)
    return {"folder": tmp_path} | values


def run(
    models: dict[str, Any],
    coefficients: dict[str, float],
    output: str = "out",
    **options: Any,
) -> dict[str, Tensor]:
    folder = models["folder"]
    folders = {name: folder / name for name in coefficients}
    made = combine_checkpoints(
        coefficients,
        folder / "base",
        folders,
        folder / output,
        progress=False,
        **options,
    )
    assert {path.name for path in made.iterdir()} >= {"config.json", "tokenizer.json", "arithmetic.json"}
    assert not list(folder.glob(".incomplete-*"))
    return read(made)


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name]), name


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].reshape(-1).float() for name in SHAPES])


@pytest.mark.parametrize("piece", [7, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identities(tmp_path: Path, piece: int, dtype: torch.dtype) -> None:
    base = tensors(0, dtype)
    base["layers.0.norm.weight"][0] = -0.0
    models = {
        "folder": tmp_path,
        "base": base,
        "a": tensors(1, dtype, 0.1, base),
        "b": tensors(2, dtype, 0.1, base),
    }
    for name in ("base", "a", "b"):
        save(tmp_path / name, models[name], 2)
    assert_equal(run(models, {"a": 1.0}, "one", piece=piece), models["a"])
    assert_equal(run(models, {"a": 0.0}, "none", piece=piece), models["base"])
    assert_equal(run(models, {"a": 1.0, "b": 0.0}, "back", piece=piece), models["a"])
    total = run(models, {"a": 1.0, "b": 1.0}, "sum", piece=piece)
    expected = (
        flat(base).double()
        + (flat(models["a"]).double() - flat(base))
        + (flat(models["b"]).double() - flat(base))
    )
    unit = torch.finfo(dtype).eps
    assert ((flat(total) - expected).abs() <= unit * expected.abs() + 4e-7).all(), "rounded once"
    back = run(models, {"sum": 1.0, "b": -1.0}, "again", piece=piece)
    assert (
        (flat(back) - flat(models["a"])).abs() <= unit * (expected.abs() + flat(models["a"]).abs()) + 1e-6
    ).all()


@pytest.mark.parametrize("piece", [5, 1 << 22])
def test_ties_is_its_definition_on_the_whole_checkpoint(models: dict[str, Any], piece: int) -> None:
    result = run(models, {"a": 1.0, "b": -0.5}, method=Method("ties", density=0.3, scale=0.8), piece=piece)
    base = flat(models["base"])
    taus = [flat(models["a"]) - base, -0.5 * (flat(models["b"]) - base)]
    torch.testing.assert_close(flat(result), base + 0.8 * ties_by_definition(taus, 0.3))
    record = json.loads((models["folder"] / "out" / "arithmetic.json").read_text())
    assert record["thresholds"] == [
        tau.abs().sort(descending=True).values[int(0.3 * len(tau)) - 1].item() for tau in taus
    ]


def test_dare_is_its_mask_tensor_by_tensor(models: dict[str, Any]) -> None:
    result = run(models, {"a": 1.0}, method=Method("dare", drop=0.6, seed=5), piece=9)
    for name, value in models["base"].items():
        if name != "steps":
            keeps = dare_keeps(value.numel(), 0, drop=0.6, seed=5, tensor=name, term="a").view(value.shape)
            expected = value + torch.where(keeps, (models["a"][name] - value) / (1 - 0.6), 0)
            torch.testing.assert_close(result[name], expected)


def test_output_dtype_and_config(models: dict[str, Any]) -> None:
    result = run(models, {"a": 0.5, "b": 0.5}, dtype="bf16")
    expected = {
        n: (0.5 * models["a"][n] + 0.5 * models["b"][n]).bfloat16() for n in models["base"] if n != "steps"
    }
    assert_equal(result, expected | {"steps": models["base"]["steps"]})
    assert json.loads((models["folder"] / "out" / "config.json").read_text())["dtype"] == "bfloat16"


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors' storages that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now, self.most = 0, 0

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


@pytest.mark.parametrize("method", [Method(), Method("ties"), Method("dare_ties")])
def test_memory_is_bounded_by_the_piece_and_not_by_the_model(
    tmp_path: Path,
    method: Method,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = module.Checkpoint.read

    def counted(self: Any, *args: Any) -> Tensor:
        tensor = original(self, *args)
        live.note(tensor)
        return tensor

    piece, most = 1 << 12, {}
    for rows in (64, 1024):
        values = {"w": torch.randn(rows, 256), "v": torch.randn(rows, 64)}
        for name, shift in (("base", 0.0), ("a", 0.1), ("b", -0.2)):
            save(
                tmp_path / str(rows) / name,
                {key: (value + shift).bfloat16() for key, value in values.items()},
            )
        folder = tmp_path / str(rows)
        folders = {name: folder / name for name in ("a", "b")}
        with monkeypatch.context() as patch, LiveBytes() as live:
            patch.setattr(module.Checkpoint, "read", counted)
            combine_checkpoints(
                {"a": 1.0, "b": 0.5},
                folder / "base",
                folders,
                folder / "out",
                method=method,
                piece=piece,
                progress=False,
            )
        most[rows] = live.most
    assert most[64] == most[1024] <= module.peak_bytes(2, piece)


def test_eight_billion_parameters_stay_within_two_gigabytes_by_the_count() -> None:
    assert module.peak_bytes(10) < 2e9, "ten checkpoints at once"
    assert module.peak_bytes(2) < 0.5e9


KILLED = """
import os, signal, sys
from pathlib import Path
from peftkern.adapters.arithmetic import Method, combine_checkpoints, checkpoints
folder, after = Path(sys.argv[1]), int(sys.argv[2])
original, calls = checkpoints.ShardWriter.write, []
def write(self, *args):
    calls.append(1)
    if len(calls) > after:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, *args)
checkpoints.ShardWriter.write = write
method = Method("ties", density=0.4)
combine_checkpoints({"a": 1.0, "b": 0.5}, folder / "base", {"a": folder / "a", "b": folder / "b"},
                     folder / "out",
                    method=method, piece=50, progress=False)
"""


def test_a_killed_run_goes_on_at_the_tensor_where_it_was(
    models: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = models["folder"]
    whole = run(models, {"a": 1.0, "b": 0.5}, "whole", method=Method("ties", density=0.4), piece=50)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), "16"], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "out").exists(), "nothing half-written under the output's name"
    written: list[str] = []
    original = module.ShardWriter.write
    monkeypatch.setattr(
        module.ShardWriter,
        "write",
        lambda self, name, *args: (written.append(name), original(self, name, *args)),
    )
    monkeypatch.setattr(module, "prepare_rule", lambda *args: pytest.fail("the thresholds were known"))
    assert_equal(run(models, {"a": 1.0, "b": 0.5}, method=Method("ties", density=0.4), piece=50), whole)
    assert 0 < len(set(written)) < len(whole), "only what was left"


def test_another_job_does_not_go_on_with_it(models: dict[str, Any]) -> None:
    folder = models["folder"]
    subprocess.run([sys.executable, "-c", KILLED, str(folder), "16"], env=os.environ, check=False)
    assert_equal(run(models, {"a": 1.0}), models["a"])


def test_tied_weights_count_once(tmp_path: Path) -> None:
    base = tensors(0)
    tuned = tensors(1, around=base)
    folders = {name: tmp_path / name for name in ("base", "a", "twice")}
    save(
        folders["base"],
        base | {"lm_head.weight": base["embed_tokens.weight"].clone()},
        tie_word_embeddings=True,
    )
    save(folders["a"], tuned, tie_word_embeddings=True)
    save(
        folders["twice"],
        tuned | {"lm_head.weight": tuned["embed_tokens.weight"].clone()},
        tie_word_embeddings=True,
    )
    for name in ("a", "twice"):
        made = combine_checkpoints(
            {name: 1.0},
            folders["base"],
            folders,
            tmp_path / f"out-{name}",
            method=Method("ties"),
            progress=False,
        )
        result = read(made)
        assert "lm_head.weight" not in result
        delta = flat(tuned) - flat(base)
        expected = flat(base) + ties_by_definition([delta], 0.2)
        torch.testing.assert_close(flat(result), expected)


def broken(folder: Path, how: str) -> None:
    a = folder / "a"
    values = load_file(a / "model.safetensors")
    match how:
        case "vocabulary":
            values["embed_tokens.weight"] = torch.zeros(41, 16)
        case "shape":
            values["layers.0.w.weight"] = torch.zeros(16, 15)
        case "lacks":
            del values["layers.1.w.weight"]
        case "beyond":
            values["extra.weight"] = torch.zeros(3)
        case "quantized":
            values["layers.0.w.weight"] = torch.zeros(16, 16, dtype=torch.uint8)
        case "integers":
            values["steps"] = torch.tensor([5, 6])
        case "nan":
            values["layers.0.w.weight"][0, 0] = float("nan")
    save_file(values, a / "model.safetensors")
    if how == "cut":
        os.truncate(a / "model.safetensors", 2000)
    if how == "shard":
        (folder / "b" / "model-00002-of-00003.safetensors").unlink()
    if how == "index":
        (folder / "b" / "model.safetensors.index.json").write_text("{")
    if how == "bin":
        (a / "model.safetensors").rename(a / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("vocabulary", r"embed_tokens.weight has shape \(41, 16\).*vocabularies of 41 and 40: resize"),
        ("shape", r"layers.0.w.weight has shape \(16, 15\), the base's has \(16, 16\)"),
        ("lacks", "checkpoint a .* lacks layers.1.w.weight"),
        ("beyond", "has beside the base's tensors extra.weight"),
        ("quantized", "U8.*dequantized first"),
        ("integers", r"steps \(I64\) differs"),
        ("cut", "cut"),
        ("shard", "1 of 3 shards are missing: model-00002-of-00003.safetensors"),
        ("index", "index.json is damaged"),
        ("bin", "it holds pytorch_model.bin; save it anew"),
        ("nan", "not finite"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(models: dict[str, Any], how: str, words: str) -> None:
    broken(models["folder"], how)
    with pytest.raises(ValueError, match=words):
        run(models, {"a": 1.0, "b": 1.0}, method=Method("ties"))
    assert sorted(path.name for path in models["folder"].iterdir()) == ["a", "b", "base"]


def test_no_space_is_said_before_anything_is_written(
    models: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match="GB are free"):
        run(models, {"a": 1.0})
    assert sorted(path.name for path in models["folder"].iterdir()) == ["a", "b", "base"]


def test_an_output_that_exists_is_left_alone(models: dict[str, Any]) -> None:
    (models["folder"] / "out").mkdir()
    with pytest.raises(ValueError, match="exists"):
        run(models, {"a": 1.0})
