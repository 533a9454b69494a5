"""The sub-command `plan`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ...errors import InputError, exit_status, require

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add `plan` to the sub-parsers of `peftkern`."""
    parser = commands.add_parser(
        "plan", help="what a fine-tuning run will need, from the model's config alone"
    )
    parser.add_argument(
        "model", help="hub id, folder, config.json, .gguf file or `sample`; no weights are read"
    )
    _add_machine(parser.add_argument_group("machine"))
    _add_run(parser.add_argument_group("run"))
    _add_memory(parser.add_argument_group("memory: what is not given is chosen, the quickest step that fits"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="the plan as JSON")
    output.add_argument(
        "--plot", metavar="FILE", help="a picture of the parts, phase by phase (.png, .svg, .pdf)"
    )
    parser.set_defaults(run=lambda args: exit_status("plan", lambda: _plan(args)))


def _add_machine(group: Any) -> None:
    group.add_argument(
        "--gpu", help="GB (24), GiB that torch may use (22GiB), a card (`rtx 4090`), cpu; default: this"
    )
    group.add_argument(
        "--cards", type=int, default=1, help="so many of them, the model in shards (FSDP2; default: 1)"
    )
    group.add_argument(
        "--replicas", type=int, default=1, help="so many processes, the whole model in each (default: 1)"
    )
    group.add_argument(
        "--ram",
        help="host memory that all processes may use, as 64GB; default: what is available here",
    )
    group.add_argument("--pinned", help="of that, what may be pinned; default: four fifths")
    group.add_argument("--disk", help="room for checkpoints on the disk, as 100GB; default: none")


def _add_run(group: Any) -> None:
    switch: Any = argparse.BooleanOptionalAction
    group.add_argument("--length", type=int, default=4096, help="tokens of a sequence (default: 4096)")
    group.add_argument("--batch", type=int, default=1, help="sequences at a time (default: 1)")
    group.add_argument(
        "--rows",
        choices=("whole", "packed", "padded"),
        default="whole",
        help="one document each, of one length; several, kept apart; or of several lengths (default: whole)",
    )
    group.add_argument("--accumulation", type=int, default=1, help="batches of a step (default: 1)")
    group.add_argument("--rank", type=int, default=16, help="of the adapters on all linears (default: 16)")
    group.add_argument(
        "--adapter",
        default="lora",
        help="lora, or as `finetune --adapter` names it: bottleneck (of width --rank), seq_bn, prefix, …",
    )
    group.add_argument("--adapter-dtype", choices=("fp32", "16-bit"), default="fp32")
    group.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of activations")
    group.add_argument("--quantization", choices=("nf4", "fp4", "none"), default="nf4")
    group.add_argument(
        "--double-quant", action=switch, default=True, help="block maxima are quantized as well"
    )
    group.add_argument("--dora", action="store_true")
    group.add_argument(
        "--optimizer", help="paged_adamw_8bit, adamw_8bit or adamw; default: the first on a GPU"
    )
    group.add_argument("--attention", choices=("flash", "efficient", "cudnn", "math"), default="flash")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model brings along"
    )


def _add_memory(group: Any) -> None:
    switch: Any = argparse.BooleanOptionalAction
    group.add_argument("--checkpointing", action=switch, help="keep layers' inputs alone")
    group.add_argument("--keep-layers", type=int, help="checkpoints that stay on the card")
    group.add_argument("--mlp-tile", type=int, help="tokens of the MLP at a time; 0: all")
    group.add_argument("--kv-groups", action=switch, help="attention by key/value heads")
    group.add_argument("--embedding-on-host", action=switch)
    group.add_argument("--layers-on-host", action=switch, help="packed layers streamed from the host")


def _plan(args: argparse.Namespace) -> None:
    require("transformers", extra="peft")
    from .budgets import bytes_of, limits_of
    from .cards import card_of, this_card
    from .choose import changes
    from .plan import plan
    from .shapes import read_shape
    from .table import lines

    card = card_of(args.gpu) if args.gpu else this_card()
    sizes = {name: getattr(args, name) for name in ("ram", "pinned", "disk")}
    given = {name: None if text is None else bytes_of(text, f"--{name}") for name, text in sizes.items()}
    processes = max(args.cards * args.replicas, 1)
    limits = limits_of(card, processes=processes, **given | {"disk": given["disk"] or 0})
    _calm()
    shape = read_shape(_resolved(args.model), trust_remote_code=args.trust_remote_code)
    options = _options(args, shape, limits, card)
    found = plan(shape, options, limits, card)
    others = [] if found.fits else changes(shape, options, limits, card)
    if args.plot:
        from .picture import plot_plan

        plot_plan(found, _picture(args.plot))
    if args.json:
        rows = [
            {"text": one.text, "device_bytes": one.device, "seconds": one.seconds, "fits": one.fits}
            for one in others
        ]
        print(json.dumps(found.to_dict() | {"changes": rows}, indent=2))
    else:
        print("\n".join(lines(found, others)))


def _options(args: argparse.Namespace, shape: Any, limits: Any, card: Any) -> Any:
    from .choose import choose, minimum
    from .options import RunOptions

    tile = None if not args.mlp_tile else args.mlp_tile
    run = RunOptions(
        length=args.length,
        batch=args.batch,
        rows=args.rows,
        accumulation=args.accumulation,
        adapter_bytes=4 if args.adapter_dtype == "fp32" else 2,
        dtype_bytes=4 if args.dtype == "fp32" else 2,
        four_bit=args.quantization != "none",
        nested=args.double_quant,
        **_adapter(args, shape),
        cards=args.cards,
        replicas=args.replicas,
        optimizer=args.optimizer or ("paged_adamw_8bit" if card.is_gpu and args.cards == 1 else "adamw"),
        attention=args.attention,
    )
    asked = {
        "checkpointing": args.checkpointing,
        "keep_layers": args.keep_layers,
        "kv_groups": args.kv_groups,
        "embedding_on_host": args.embedding_on_host,
        "layers_on_host": args.layers_on_host,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if args.mlp_tile is not None:
        asked["mlp_tile"] = tile
    if asked:
        return run.but(**asked)
    try:
        return choose(shape, run, limits, card)
    except InputError as error:
        print(f"peftkern plan: {error}.", file=sys.stderr)
        return minimum(shape, run, card)[1]


def _adapter(args: argparse.Namespace, shape: Any) -> dict[str, Any]:
    from ...finetune.adapters import planned_adapter
    from ...finetune.config import FinetuneConfig

    return planned_adapter(FinetuneConfig(adapter=args.adapter, r=args.rank, dora=args.dora), shape)


def _resolved(model: str) -> str:
    """The sample and GGUF files as the folders that the recipe makes of them."""
    if model != "sample" and not model.lower().endswith(".gguf"):
        return model
    require("gguf")
    from ...finetune.model import resolve_model

    return resolve_model(model)


def _picture(text: str) -> Path:
    require("matplotlib", extra="finetune")
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {text}: expected a name that ends in .png, .svg or .pdf")
    if not path.resolve().parent.is_dir():
        raise InputError(f"--plot {text}: there is no folder {path.resolve().parent}")
    return path


def _calm() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
