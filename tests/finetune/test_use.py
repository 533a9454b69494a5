"""generate, chat, evaluate, the model card and --version: an adapter after its run."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import peftkern
from peftkern.__main__ import main
from peftkern.finetune import FinetuneConfig, InputError, finetune
from peftkern.finetune.inference import Generation, complete, loaded, perplexities


@pytest.fixture(scope="module")
def trained_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained(options: dict[str, Any], trained_cache: Path) -> Path:
    """A finished run on our kernels, in bf16, with its held-out text in a file of its own."""
    output = trained_cache / "run"
    if not output.exists():
        (trained_cache / "held.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
        changes = {
            "output": str(output),
            "patch": True,
            "steps": 20,
            "dtype": "bf16",
            "eval_data": (str(trained_cache / "held.txt"),),
        }
        finetune(FinetuneConfig(**(options | changes)), quiet=True)
    return output


def result_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"peftkern {peftkern.__version__}\n"


def test_evaluate_gives_the_perplexities_of_the_run(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = str(trained.parent / "held.txt")
    result = result_of(trained)
    for flags in ([], ["--no-patch"]):
        assert main(["evaluate", "--adapter", str(trained), "--data", held, "--base", *flags]) == 0
        shown = capsys.readouterr().out
        found = re.fullmatch(r"Perplexity \(held\):  ([\d.]+)  \(base: ([\d.]+)\)\n", shown)
        assert found, shown
        assert float(found[1]) == pytest.approx(result["perplexity_after"]["held"], rel=0.01)
        assert float(found[2]) == pytest.approx(result["perplexity_before"]["held"], rel=0.01)


def test_evaluate_by_the_logits_or_without_an_adapter(
    options: dict[str, Any], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = (str(trained.parent / "held.txt"),)
    lengths = {"seq_length": 64, "eval_tokens": 512}
    with loaded(None, model=options["model"], dtype="fp32", **lengths) as base:
        plain = perplexities(base, held)
        monkeypatch.setattr(
            "peftkern.patching.loss.LossForward.negative_log_likelihood", lambda *_, **__: None
        )
        assert perplexities(base, held) == pytest.approx(plain, rel=1e-4)
    assert plain["held"] == pytest.approx(result_of(trained)["perplexity_before"]["held"], rel=0.02)


def test_generate_continues_as_the_run_did(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = result_of(trained)
    command = ["generate", "--adapter", str(trained), "--tokens", "4"]
    assert main([*command, "--prompt", result["sample_prompt"]]) == 0
    assert capsys.readouterr().out == result["sample_after"] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(result["sample_prompt"]))
    assert main([*command, "--prompt", "-", "--base"]) == 0
    assert (
        capsys.readouterr().out == f"base:\n{result['sample_before']}\nadapter:\n{result['sample_after']}\n"
    )


def test_sampling_follows_its_seed(trained: Path) -> None:
    with loaded(str(trained)) as model:
        texts = [
            complete(model, "a", Generation(tokens=12, temperature=1.5, seed=seed), stream=False)
            for seed in (1, 1, 2)
        ]
        assert texts[0] == texts[1] != texts[2]
        with pytest.raises(InputError, match="the prompt is empty"):
            complete(model, "", Generation(), stream=False)
        with pytest.raises(
            InputError, match=r"has 500 tokens, and 20 more exceed the model's context of 512"
        ):
            complete(model, "x" * 500, Generation(tokens=20), stream=False)


def test_chat_keeps_the_conversation(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(model: Any, prompt: str, how: Any) -> str:
        asked.append(prompt)
        return f"answer {len(asked)}"

    monkeypatch.setattr("peftkern.finetune.use.complete", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/clear\nthree\n/exit\nfour\n"))
    assert main(["chat", "--adapter", str(trained), "--system", "be brief"]) == 0
    assert asked == [
        "<system>be brief<eos><user>one<eos><assistant>",
        "<system>be brief<eos><user>one<eos><assistant>answer 1<eos><user>two<eos><assistant>",
        "<system>be brief<eos><user>three<eos><assistant>",
    ]
    asked.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert main(["chat", "--adapter", str(trained), "--base"]) == 0
    assert len(asked) == 2 and capsys.readouterr().out == "base:\nadapter:\n"


def test_chat_goes_on_after_a_turn_that_does_not_fit(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 600 + "\nshort\n"))
    assert main(["chat", "--adapter", str(trained), "--tokens", "3"]) == 0
    printed = capsys.readouterr()
    assert "exceed the model's context of 512: shorten one of them, or /clear" in printed.err and printed.out


def test_what_cannot_be_used_is_one_message(
    trained: Path, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut)
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:200])
    for arguments, message in (
        (
            ["generate", "--prompt", "a"],
            "give --adapter (the --output of a run), or --model for a base alone",
        ),
        (["generate", "--adapter", str(tmp_path / "empty"), "--prompt", "a"], "has no adapter_config.json"),
        (
            ["generate", "--adapter", str(cut), "--prompt", "a"],
            f"--adapter {cut} could not be loaded onto this base",
        ),
        (
            ["generate", "--adapter", str(trained), "--prompt", "a", "--tokens", "0"],
            "--tokens must be at least 1",
        ),
        (
            ["generate", "--adapter", str(trained), "--prompt", "a", "--temperature", "-1"],
            "--temperature must be 0",
        ),
        (["evaluate", "--adapter", str(trained), "--data", "typo.txt"], "typo.txt"),
        (["chat", "--model", "nobody/no-such-model"], "--model nobody/no-such-model"),
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.splitlines()[-1].startswith(
            f"peftkern {arguments[0]}: error: "
        ), printed


def test_card_says_what_was_done(trained: Path, options: dict[str, Any]) -> None:
    card, result = (trained / "README.md").read_text(), result_of(trained)
    before, after = result["perplexity_before"]["held"], result["perplexity_after"]["held"]
    name = Path(options["model"]).name
    for expected in (
        "library_name: peft",
        f"# LoRA adapter for {name}",
        "20 steps",
        f"| held | {before:.2f} | {after:.2f} |",
        "| training | topics.txt | ",
        "| evaluation | held.txt | ",
        "| lr | 0.005 |",
        '| quantization | "nf4" |',
        f"peftkern {peftkern.__version__}, torch {torch.__version__.partition('+')[0]}",
        "## Licence",
    ):
        assert expected in card, expected
    assert (
        str(trained.parent) not in card
        and str(Path(options["data"]).parent) not in card
        and "base_model:" not in card
    )
    assert "license:" not in card


def test_explain_refuses_what_the_function_refuses() -> None:
    """Whatever `qlora_linear` raises for is refused, and nothing else."""
    weight = peftkern.functional.quantize_4bit(torch.randn(96, 64))
    for x, r in (
        (torch.randn(2, 64), 16),
        (torch.randn(2, 64), 257),
        (torch.randn(2, 64).double(), 8),
        (torch.randn(2, 63), 8),
    ):
        said = peftkern.explain(x, 96, 64, r)
        a, b = torch.randn(r, 64), torch.randn(96, r)
        try:
            peftkern.functional.qlora_linear(x, weight, lora_a=a, lora_b=b)
        except (TypeError, ValueError) as error:
            assert said == f"refused: {error}; a patched module runs its stock forward on such a call"
        else:
            assert not said.startswith("refused")
    for n, k in ((0, 64), (-1, 64), (96, 0)):
        assert peftkern.explain(torch.randn(2, 64), n, k).startswith("refused: ")
    assert not peftkern.explain(torch.randn(2, 63), 7, 63, 3).startswith("refused")
    assert not peftkern.explain(torch.randn(2, 64), 7, 64, 0).startswith("refused")
