"""A plan as text: the parts at the peak, the phases, what fits, how long a step takes, what to change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .budgets import in_bytes
from .choose import Change
from .ledger import Part
from .options import RunOptions
from .plan import PhasePeak, Plan
from .shapes import Shape
from .step import Step

__all__ = ["PHASE_NAMES", "adapters_of", "described", "lines", "name_of", "part_lines", "short_name"]

PHASE_NAMES = {
    "load": "loading",
    "forward": "forward",
    "loss": "loss",
    "mlp_backward": "MLP backward",
    "attention_backward": "attention backward",
    "optimizer": "optimizer",
}

# What the pieces of a decoder layer are, by their names in `schedule`.
_NAMES = {
    "x": "the layer's input",
    "n1": "first norm's output",
    "qkv": "queries, keys, values",
    "q0": "queries",
    "k0": "keys",
    "q": "queries, rotated",
    "kr": "keys, rotated",
    "v": "values",
    "out": "attention's output",
    "o_y": "the o projection's output",
    "s": "stream after attention",
    "n2": "second norm's output",
    "gate": "gate",
    "up": "up",
    "act": "activation",
    "d_product": "gradient of the product",
    "product": "gate's and up's product",
    "mlp_y": "the MLP's output",
    "x_next": "the next layer's input",
    "dx": "gradient of the layer's output",
    "ds": "gradient of the stream",
    "dn1": "gradient of n1",
    "dn2": "gradient of the MLP's input",
    "d_out": "gradient of attention's output",
    "dq": "gradient of queries",
    "dk": "gradient of keys",
    "dv": "gradient of values",
    "dq0": "gradient of queries before rotation",
    "dk0": "gradient of keys before rotation",
    "d_gate": "gradient of gate",
    "d_up": "gradient of up",
    "nf": "last norm's output",
    "d_nf": "gradient of the last norm's output",
    "lse": "attention's row sums",
    "y_attention": "attention's output, unadapted",
    "z_attention": "attention's bottleneck",
    "d_attention": "gradient that its bottleneck gives",
    "y_mlp": "the MLP's output, unadapted",
    "z_mlp": "the MLP's bottleneck",
    "d_mlp": "gradient that its bottleneck gives",
    "masks": "attention's masks",
    "scores": "attention's scores",
    "xa_qkv": "low-rank products of q, k, v",
    "xa_o": "low-rank product of o",
    "xa_gate_up": "low-rank products of gate, up",
    "xa_down": "low-rank product of down",
}


def name_of(part: Part) -> str:
    """A part's name in words."""
    return _NAMES.get(part.name, part.name)


def short_name(name: str) -> str:
    """Of a model's path the folder's name; a hub id as it is."""
    path = Path(name)
    path = path.parent if path.name == "config.json" and path.parent.name else path
    return path.resolve().name if path.exists() else name


def lines(plan: Plan, changes: Sequence[Change] = ()) -> list[str]:
    """The whole table."""
    shape, options = plan.shape, plan.options
    run = f"{options.batch} × {options.length:,} tokens, {adapters_of(options)}"
    found = [
        f"{short_name(shape.name)}: {shape.parameters / 1e9:.2f} B parameters, {run}, on {plan.card.name}",
        "",
    ]
    found += [f"  {text}" for text in described(options, shape)]
    found += [
        "",
        *_verdict(plan),
        "",
        *part_lines(plan.peak),
        *_letters(plan),
        "",
        *_phases(plan),
        "",
        *_host(plan),
        "",
        *_reach(plan),
    ]
    found += ["", *_time(plan)]
    if changes:
        found += ["", "What would make it smaller, the cheapest that fits first:", *map(_change, changes[:8])]
    for title, texts in (("Refused", plan.refusals), ("Note", plan.warnings)):
        found += [""] * bool(texts) + [f"{title}: {text}." for text in texts]
    return found


def adapters_of(options: RunOptions) -> str:
    """The adapters in two words or a few."""
    if options.prefix:
        return f"a prefix of {options.prefix} tokens"
    made = options.bottleneck
    return f"rank {options.rank}" if made is None else f"bottlenecks of width {made.size}"


def described(options: RunOptions, shape: Shape) -> list[str]:
    """How the run uses memory, one line a choice."""
    layers = shape.layers
    if not options.checkpointing:
        found = ["no gradient checkpointing"]
    else:
        kept, disk = options.kept(layers), options.on_disk(layers)
        places = [f"{kept} on the card"] + (
            [f"{layers - kept - disk} on the host"] if layers - kept - disk else []
        )
        found = [
            "gradient checkpointing: layers' inputs "
            + ", ".join(places + ([f"{disk} on disk"] if disk else []))
        ]
    found.append(f"the MLP in tiles of {options.mlp_tile:,} tokens" if options.mlp_tile else "the MLP whole")
    if shape.dense_attention:
        by_tiles = ", by key/value heads and tiles of queries" if options.kv_groups else ""
        found.append(f"eager attention, for a soft cap on its scores{by_tiles}")
    else:
        by_heads = ", its backward by key/value heads" if options.kv_groups else ""
        found.append(f"{options.attention} attention{by_heads}")
    if options.rows != "whole":
        rows = {"packed": "several documents, the batch as one row", "padded": "several lengths, filled up"}
        found.append(f"rows of {rows[options.rows]}")
    if options.bottleneck is not None:
        read = {"output": "its output", "input": "its input", "sum": "the stream behind it"}
        places = " and ".join(options.bottleneck.places)
        found.append(f"adapters of each layer's {places}, which read {read[options.bottleneck.reads]}")
    if options.cards > 1:
        found.append(f"the model divided among {options.cards} cards (FSDP2), each with batches of its own")
    if options.replicas > 1:
        found.append(f"the whole model in each of {options.replicas} processes, whose gradients are averaged")
    if options.rebuild_norms:
        found.append("norms' outputs computed again in backward")
    if options.embedding_on_host:
        found.append("the embedding on the host")
    if options.layers_on_host:
        found.append(f"packed layers on the host, streamed through {options.layer_slots} slots")
    return found


def part_lines(peak: PhasePeak, most: int = 24) -> list[str]:
    """The parts at a phase's fullest moment, the largest first."""
    parts = sorted(peak.parts, key=lambda part: -part.nbytes)
    head = f"At the peak, {PHASE_NAMES[peak.phase]} ({peak.at}):"
    found = [head, *_rows(parts[:most], peak.nbytes)]
    rest = sum(part.nbytes for part in parts[most:])
    return found + ([f"  {in_bytes(rest):>12}  {len(parts) - most} smaller ones"] if rest else [])


def _rows(parts: Iterable[Part], total: int) -> list[str]:
    rows = [
        f"  {in_bytes(one.nbytes):>12}  {one.nbytes / total:4.0%}  {name_of(one):<34} {one.formula}"
        for one in parts
    ]
    return [row.rstrip() for row in rows]


def _letters(plan: Plan) -> list[str]:
    """The sizes that the formulas are made of."""
    step = Step(plan.shape, plan.options, plan.card)
    sizes = {
        "a hidden state, h": step.h,
        "queries, q": step.q,
        "keys, k": step.k,
        "the MLP's inner state, i": step.i,
    }
    return [
        "  of the whole batch: " + "; ".join(f"{name} = {in_bytes(size)}" for name, size in sizes.items())
    ]


def _verdict(plan: Plan) -> list[str]:
    text = f"{in_bytes(plan.device_bytes)} of {in_bytes(plan.limits.gpu)} on the card"
    if plan.fits:
        return [f"It fits: {text}."]
    if not plan.shortages:
        return [f"Its bytes fit ({text}), but the run is refused (below)."]
    missing = ", ".join(f"{in_bytes(nbytes)} of {name}" for name, nbytes in plan.shortages.items())
    return [f"It does not fit: {text}; missing: {missing}."]


def _phases(plan: Plan) -> list[str]:
    found = ["Each phase at its fullest:"]
    for peak in plan.peaks:
        mark = "  <- the peak" if peak is plan.peak else ""
        found.append(f"  {in_bytes(peak.nbytes):>12}  {PHASE_NAMES[peak.phase]:<20} {peak.at}{mark}")
    return found


def _host(plan: Plan) -> list[str]:
    rows = [
        f"  {in_bytes(part.nbytes):>12}  {part.tier:<8} {part.name}: {part.formula}" for part in plan.host
    ]
    processes = plan.options.processes
    whose = f", of each of {processes} processes" if processes > 1 else ""
    return [f"Beside the card{whose}:", *rows]


def _reach(plan: Plan) -> list[str]:
    options = plan.options
    return [
        f"The longest sequence at batch {options.batch}: {plan.longest:,} tokens. The largest batch at"
        f" {options.length:,} tokens: {plan.largest_batch:,}."
    ]


def _time(plan: Plan) -> list[str]:
    time = plan.time
    rate = plan.options.tokens * plan.options.accumulation * plan.options.processes / time.seconds
    found = [
        f"A step is expected to take {time.seconds:,.1f} s ({rate:,.0f} tokens/s), bound by {time.bound}:"
        f" {time.flops / 1e15:,.2f} PFLOP, {in_bytes(time.link_bytes)} over PCIe,"
        f" {in_bytes(time.disk_bytes)} to and from disk.",
    ]
    return found + [f"  assumed: {text}" for text in time.assumptions]


def _change(change: Change) -> str:
    mark = "fits" if change.fits else "    "
    return f"  {mark}  {in_bytes(change.device):>12}  {change.seconds:8.1f} s  {change.text}"
