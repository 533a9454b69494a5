"""The sub-commands `generate`, `chat` and `evaluate`: an adapter at work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from .errors import InputError, exit_status, require
from .inference import Generation, LoadedModel, complete, loaded, perplexities

__all__ = ["add_commands"]

_EXTRA = ("transformers", "peft", "accelerate", "bitsandbytes")
_MODEL = ("model", "quantization", "double_quant", "dtype", "trust_remote_code", "patch")


def add_commands(commands: Any) -> None:
    """Add the three commands to the sub-parsers of `peftkern`."""
    generate = commands.add_parser("generate", help="continue a text with an adapter")
    _add_model(generate)
    generate.add_argument(
        "--prompt", required=True, help="the text to continue; - reads it from standard input"
    )
    _add_generation(generate)
    generate.add_argument(
        "--base", action="store_true", help="let the base continue it too, before the adapter"
    )
    generate.set_defaults(run=lambda args: _guarded("generate", _generate, args))
    chat = commands.add_parser("chat", help="talk to an adapter, by the chat template of its tokenizer")
    _add_model(chat)
    chat.add_argument("--system", help="the system message")
    _add_generation(chat)
    chat.add_argument("--base", action="store_true", help="let the base answer too, before the adapter")
    chat.set_defaults(run=lambda args: _guarded("chat", _chat, args))
    evaluate = commands.add_parser("evaluate", help="the perplexity of an adapter, or of a base, on texts")
    _add_model(evaluate)
    evaluate.add_argument("--data", nargs="+", required=True, help="texts, as --eval-data of finetune")
    evaluate.add_argument(
        "--seq-length", type=int, help="tokens of a sequence; default: the run's, else 1024"
    )
    evaluate.add_argument(
        "--eval-tokens", type=int, help="most tokens of each text; default: the run's, else 32768"
    )
    evaluate.add_argument("--base", action="store_true", help="evaluate the base too")
    evaluate.set_defaults(run=lambda args: _guarded("evaluate", _evaluate, args))


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    switch: Any = argparse.BooleanOptionalAction
    group.add_argument("--adapter", help="the --output of a run, or a folder that PEFT saved")
    group.add_argument(
        "--model", help="the base: hub id, folder, .gguf file or `sample`; default: the adapter's"
    )
    group.add_argument("--quantization", help="nf4, fp4 or none; default: the run's, else nf4")
    group.add_argument(
        "--double-quant", action=switch, help="quantize the block maxima as well; default: as the run"
    )
    group.add_argument("--dtype", help="auto, bf16, fp16 or fp32; default: the run's, else auto")
    group.add_argument(
        "--trust-remote-code", action=switch, help="run Python code that the model brings along"
    )
    group.add_argument(
        "--patch", action=switch, default=True, help="--no-patch runs plain PEFT and bitsandbytes"
    )


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group, default = parser.add_argument_group("generation"), Generation()
    group.add_argument(
        "--tokens", type=int, default=default.tokens, help=f"most new tokens (default: {default.tokens})"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        help="0 (the default): the likeliest token each time",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=default.top_p,
        help="sample from the likeliest tokens of this total probability",
    )
    group.add_argument("--seed", type=int, default=default.seed, help="seed of the sampling")


def _guarded(name: str, command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command; what the user can mend is one message and status 2."""

    def run() -> None:
        require(*_EXTRA)
        from .recipe import calm_libraries

        calm_libraries(not sys.stderr.isatty())
        command(args)

    return exit_status(name, run)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _MODEL}


def _how(args: argparse.Namespace) -> Generation:
    return Generation(tokens=args.tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)


def _generate(args: argparse.Namespace) -> None:
    how, prompt = _how(args), sys.stdin.read() if args.prompt == "-" else args.prompt
    with loaded(args.adapter, **_options(args)) as model:
        if args.base and model.has_adapter:
            print("base:")
            with model.base():
                complete(model, prompt, how)
            print("adapter:")
        complete(model, prompt, how)


def _chat(args: argparse.Namespace) -> None:
    how = _how(args)
    with loaded(args.adapter, **_options(args)) as model:
        if model.tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template: use `peftkern generate`, or an instruct model"
            )
        print("/clear begins anew, /exit or the end of input ends.", file=sys.stderr)
        opening = [{"role": "system", "content": args.system}] if args.system else []
        turns = list(opening)
        while (text := _ask()) is not None:
            if text.strip() == "/clear":
                turns = list(opening)
            elif text.strip():
                turns = _answer(model, [*turns, {"role": "user", "content": text}], how, base=args.base)


def _ask() -> str | None:
    try:
        text = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return None if text.strip() in ("/exit", "/quit") else text


def _answer(
    model: LoadedModel, turns: list[dict[str, str]], how: Generation, *, base: bool
) -> list[dict[str, str]]:
    """The conversation with the model's answer; without the last turn where it does not fit or is broken
    off."""
    try:
        prompt = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if base and model.has_adapter:
            print("base:")
            with model.base():
                complete(model, prompt, how)
            print("adapter:")
        return [*turns, {"role": "assistant", "content": complete(model, prompt, how)}]
    except InputError as error:
        print(f"{error}, or /clear", file=sys.stderr)
    except KeyboardInterrupt:
        print("\n(broken off)", file=sys.stderr)
    return turns[:-1]


def _evaluate(args: argparse.Namespace) -> None:
    require("datasets", "trl")
    lengths = {"seq_length": args.seq_length, "eval_tokens": args.eval_tokens}
    with loaded(args.adapter, **_options(args), **lengths) as model:
        with_base = args.base and model.has_adapter
        adapted = perplexities(model, tuple(args.data))
        with model.base():
            plain = perplexities(model, tuple(args.data)) if with_base else {}
        for name, value in adapted.items():
            beside = f"  (base: {plain[name]:.2f})" if with_base else ""
            print(f"Perplexity ({name}):  {value:.2f}{beside}")
