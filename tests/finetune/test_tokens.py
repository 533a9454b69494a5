"""Rows as token ids and targets: exactly what the row and the template say, cut within the window, and every
loss said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftkern.finetune import FinetuneConfig, InputError
from peftkern.finetune.data import load_data
from peftkern.finetune.generation import make_prompt
from peftkern.finetune.inputs import prepare
from peftkern.finetune.model import load_tokenizer
from peftkern.finetune.tokens import tokenize

from .conftest import write_jsonl

STRICT = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
    "alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] if m['content'] is string else m['content'] | tojson }}"
    "{% if m.tool_calls is defined %}C{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.fixture
def tokenizer(tiny_model: str) -> Any:
    loaded = load_tokenizer(tiny_model)
    loaded.chat_template = STRICT
    return loaded


@pytest.fixture
def tokens(tmp_path: Path, tokenizer: Any) -> Any:
    def run(rows: list[Any], *, length: int = 1000, **options: Any) -> list[tuple[str, str]]:
        """The text of each row and of its targets."""
        options = {"wrapped": False} | options
        dataset = tokenize(
            load_data(write_jsonl(tmp_path / "rows.jsonl", rows)), tokenizer, length=length, **options
        )
        targets = [[label for label in row["labels"] if label != -100] for row in dataset]
        return [
            (tokenizer.decode(row["input_ids"]), tokenizer.decode(target))
            for row, target in zip(dataset, targets, strict=True)
        ]

    return run


def test_what_is_a_target(tokens: Any) -> None:
    assert tokens([{"text": "ab"}, {"text": "c<eos>"}]) == [("ab<eos>", "ab<eos>"), ("c<eos>", "c<eos>")]
    assert tokens([{"prompt": "ab", "completion": "cd"}]) == [("abcd<eos>", "cd<eos>")]
    chat = [turn("user", "a"), turn("assistant", "b")]
    assert tokens([{"messages": chat}]) == [("<user>a<assistant>b", "<user>a<assistant>b")]
    assert tokens([{"prompt": chat[:1], "completion": chat[1:]}]) == [("<user>a<assistant>b", "b")]


def test_what_the_loss_covers(tokens: Any, tokenizer: Any) -> None:
    chat = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    whole = "<user>a<assistant>b<user>c<assistant>d"
    assert tokens([{"messages": chat}], loss_on="completions") == [(whole, "bd")]
    assert tokens([{"messages": chat}], loss_on="all") == [(whole, whole)]
    assert tokens([{"prompt": chat[:3], "completion": chat[3:]}], loss_on="all") == [(whole, whole)]
    assert tokens([{"prompt": chat[:3], "completion": chat[3:]}], loss_on="completions") == [(whole, "d")]
    assert tokens([{"prompt": "ab", "completion": "cd"}], loss_on="all") == [("abcd<eos>", "abcd<eos>")]
    with pytest.raises(InputError, match="has rows of text, which have none"):
        tokens([{"text": "ab"}], loss_on="completions")
    with pytest.raises(InputError, match="all of its 1 rows are blank or have no answer"):
        tokens([{"messages": chat[:1]}], loss_on="completions")
    # As templates do that leave thoughts out of all answers but the last.
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}(thought){% endif %}{{ m['content'] "
        "}}{% endfor %}"
    )
    with pytest.raises(
        InputError, match=r"rows\.jsonl:1: the chat template writes turn 2 otherwise once others follow"
    ):
        tokens([{"messages": chat}], loss_on="completions")


def test_the_template_sees_the_row_as_it_is_written(tokens: Any) -> None:
    calls = [[{"function": {"name": "f", "arguments": {key: 1}}}] for key in ("x", "y")]
    rows = [{"messages": [turn("user", "a"), turn("assistant", "", tool_calls=call)]} for call in calls]
    rows.append({"messages": [turn("user", [{"type": "text", "text": "p"}])], "tools": [{"name": "f"}]})
    assert [text for text, _ in tokens(rows)] == [
        '<user>a<assistant>C[{"function": {"name": "f", "arguments": {"x": 1}}}]',
        '<user>a<assistant>C[{"function": {"name": "f", "arguments": {"y": 1}}}]',
        'T[{"name": "f"}]<user>[{"type": "text", "text": "p"}]',
    ]


def test_what_is_cut_or_left_out_is_said(tokens: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("short", "x"), ("a long prompt", "cut off"), ("a prompt longer than all", "x"), ("", "")]
    got = tokens([{"prompt": prompt, "completion": completion} for prompt, completion in rows], length=16)
    assert got == [("shortx<eos>", "x<eos>"), ("a long promptcut", "cut")]
    said = capsys.readouterr().err
    assert (
        "of 4 rows 1 cut to --seq-length 16, 1 left out, as nothing to learn was left of them within "
        "--seq-length 16"
    ) in said
    assert (
        "1 left out, as they are blank or have no answer. The longest has 26 tokens: raise --seq-length"
        in said
    )


def test_wrapped_texts_lose_nothing(tokens: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        tokens([{"text": "longer than the window"}], length=4, wrapped=True)[0][0]
        == "longer than the window<eos>"
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "longer than the window", "completion": "x"},
            "none of its 1 rows has a token to learn within --seq-length 16",
        ),
        ({"text": ""}, "all of its 1 rows are blank"),
        (
            {"messages": [turn("assistant", "a")]},
            r"rows\.jsonl:1: the chat template does not take this row .*roles must alternate",
        ),
    ],
)
def test_nothing_to_learn_is_an_error(tokens: Any, row: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokens([row], length=16)


def test_messages_need_a_template(tokens: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    for row in (
        {"messages": [turn("user", "a")]},
        {"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]},
    ):
        with pytest.raises(
            InputError, match=r"rows\.jsonl:1 has messages, but the tokenizer has no chat template"
        ):
            tokens([row])


@pytest.mark.parametrize(
    ("rows", "prompt"),
    [
        (
            [
                {
                    "messages": [
                        turn("user", "a"),
                        turn("assistant", "b"),
                        turn("user", "c"),
                        turn("assistant", "d"),
                    ]
                }
            ],
            "<user>a<assistant>b<user>c<assistant>",
        ),
        ([{"messages": [turn("assistant", "a")]}], ""),
        ([{"text": "  "}, {"text": "then words"}], "then words"),
        ([{"prompt": "", "completion": "x"}], ""),
    ],
)
def test_sample_prompt(tmp_path: Path, tokenizer: Any, rows: list[Any], prompt: str) -> None:
    assert (
        make_prompt(None, load_data(write_jsonl(tmp_path / "rows.jsonl", rows)), tokenizer, length=99)
        == prompt
    )


def test_held_out_rows_have_something_to_predict(tmp_path: Path, tokenizer: Any) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "" if i % 2 else f"row {i}"} for i in range(40)])
    for seed in range(5):
        config = FinetuneConfig(
            data=data, seq_length=16, packing=False, eval_fraction=0.05, seed=seed
        ).resolved()
        inputs = prepare(config, load_data(data), {}, tokenizer)
        assert len(inputs.evaluations["held-out"]) == 1 and len(inputs.train) == 19
        assert tokenizer.decode(inputs.evaluations["held-out"][0]["input_ids"]) == inputs.prompt + "<eos>"
