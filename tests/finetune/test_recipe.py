"""The recipe from end to end on a tiny model, without peftkern's kernels: they have tests of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.finetune import FinetuneConfig, InputError, finetune

from .conftest import write_jsonl


def run(options: dict[str, Any], **changes: Any) -> Any:
    return finetune(FinetuneConfig(**(options | changes)), quiet=True)


def metrics_of(options: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(options["output"]) / "metrics.jsonl").read_text().splitlines()]


def test_run_lowers_perplexity_and_writes_everything(options: dict[str, Any]) -> None:
    result = run(options, steps=30, save_steps=10)
    assert result.perplexity_after["held-out"] < 0.8 * result.perplexity_before["held-out"]
    rows = metrics_of(options)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["tokens"] == 128 for row in rows)
    assert rows[-1]["loss"] == result.final_loss < rows[0]["loss"]
    rates = [row["lr"] for row in rows]
    assert (
        rates[:3] == pytest.approx([0.0, 0.0025, 0.005])
        and max(rates) == rates[2]
        and rates[-1] < 0.02 * rates[2]
    )
    output = Path(options["output"])
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "result.json").read_text())["final_loss"] == result.final_loss
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == [
        "checkpoint-20",
        "checkpoint-30",
    ]


def test_stock_peft_loads_the_adapter_with_the_same_perplexity(
    options: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    evaluation = tmp_path / "held.txt"
    evaluation.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    result = run(options, quantization="none", eval_data=(str(evaluation),), eval_tokens=64)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(options["model"]), options["output"]
    )
    tokenizer = AutoTokenizer.from_pretrained(options["output"])
    ids = torch.tensor([tokenizer(evaluation.read_text() + tokenizer.eos_token)["input_ids"][:64]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert math.exp(loss) == pytest.approx(result.perplexity_after["held"], rel=1e-4)
    assert result.perplexity_after["held"] != pytest.approx(result.perplexity_before["held"], rel=1e-2)


def test_prompt_rows_train_on_the_completion_only(options: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}"} for i in range(40)]
    data = write_jsonl(tmp_path / "sums.jsonl", rows)
    result = run(options, data=data, packing=False, steps=2)
    # Prompts are random to the model and never learned: with two steps of 2 rows, only the few completion
    # tokens have targets.
    assert result.perplexity_before["held-out"] > 50
    assert result.sample_prompt.endswith(" is ")
    assert all(row["tokens"] > 20 for row in metrics_of(options))


def test_message_rows_use_the_chat_template(options: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"count to {i}"},
                {"role": "assistant", "content": "no " * i},
            ]
        }
        for i in range(1, 30)
    ]
    result = run(options, data=write_jsonl(tmp_path / "chat.jsonl", rows), steps=2)
    assert result.sample_prompt.startswith("<user>count to") and result.sample_prompt.endswith(
        "<eos><assistant>"
    )


def test_datasets_folder_and_second_evaluation(options: dict[str, Any], tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(
        [{"text": f"row {i} of the data set, long enough to fill something", "id": i} for i in range(60)]
    ).save_to_disk(tmp_path / "folder")
    result = run(
        options, data=str(tmp_path / "folder"), eval_data=(options["data"], "python-reference"), steps=2
    )
    assert list(result.perplexity_after) == ["topics", "python-reference"]


def test_two_runs_give_the_same_losses(options: dict[str, Any], tmp_path: Path) -> None:
    first = run(options, dropout=0.1)
    second = run(options, dropout=0.1, output=str(tmp_path / "second"))
    other = run(options, dropout=0.1, output=str(tmp_path / "third"), seed=1)
    assert first.final_loss == second.final_loss != other.final_loss
    assert first.perplexity_after == second.perplexity_after


def test_gradient_checkpointing_changes_no_loss(options: dict[str, Any], tmp_path: Path) -> None:
    plain = run(options)
    checkpointed = run(options, gradient_checkpointing=True, output=str(tmp_path / "checkpointed"))
    assert checkpointed.final_loss == pytest.approx(plain.final_loss, rel=1e-5)


def test_bf16_keeps_fp32_adapters_and_learns(options: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    result = run(options, dtype="bf16", steps=20)
    assert result.perplexity_after["held-out"] < 0.9 * result.perplexity_before["held-out"]
    weights = load_file(Path(options["output"]) / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_nan_loss_stops_with_advice(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="lower --lr"):
        run(options, lr=1e30, steps=10, max_grad_norm=1e30, warmup=0.0)


def test_text_shorter_than_a_window_is_used_whole(options: dict[str, Any], tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "only"}, {"text": "a few"}, {"text": "words"}])
    result = run(options, data=short, eval_data=(short,), steps=2, batch_size=1)
    # The letters of the three rows and an end of sequence after each.
    assert [row["tokens"] for row in metrics_of(options)] == [4 + 5 + 5 + 3] * 2
    assert result.perplexity_before["short"] > 1


def test_model_without_linear_layers(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--targets no_such_layer"):
        run(options, targets=("no_such_layer",))
    assert not Path(options["output"]).exists()


def test_unknown_model(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--model"):
        run(options, model="nobody/no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json"):
        run(options, model=str(tmp_path / "empty"))


def test_out_of_memory_names_what_to_lower(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkern.finetune import trainer

    def exhausted(*args: Any, **kwargs: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(trainer.RecipeTrainer, "training_step", exhausted)
    with pytest.raises(
        MemoryError,
        match=r"--batch-size 1 --grad-accumulation 2 .now --batch-size 2.*"
        r"--gradient-checkpointing.*--seq-length .now 64",
    ):
        run(options)
