"""The cheapest way to make a run fit: which checkpoints leave the card, what is tiled, what lies on the
host."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import InputError
from .budgets import Limits, in_bytes
from .cards import Card
from .options import RunOptions
from .plan import fits, longest, phase_peaks
from .shapes import Shape
from .step import Step
from .steptime import step_time

__all__ = ["Change", "changes", "choose", "minimum"]

# Tokens of an MLP's tile, and the share of the step that the smaller products are taken to cost: not
# measured.
_TILES = ((None, 0.0), (8192, 0.003), (2048, 0.01), (512, 0.04))
_COSTS = {
    "kv_groups": 0.02,
    "embedding_on_host": 0.002,
    "layers_on_host": 0.03,
    "offload": 0.01,
    "disk": 0.02,
}


@dataclass(frozen=True)
class Change:
    """One thing to do differently. text: what; options: with it; device: bytes at the peak then; seconds: of
    a step;
    fits: whether the run fits then.
    """

    text: str
    options: RunOptions
    device: int
    seconds: float
    fits: bool


def choose(shape: Shape, options: RunOptions, limits: Limits, card: Card) -> RunOptions:
    """The options of the least expected step time with which `options.length` and `batch` fit.

    What is chosen: checkpointing, which checkpoints stay, tiles, attention by key/value heads, what lies on
    the host. What changes the result of training (rank, dtypes, quantization, length) is left as it is.

    Raises: InputError with the least that the run needs, where nothing fits.
    """
    candidates = sorted(_candidates(shape, options, card), key=lambda one: _cost(shape, one, card))
    for candidate in candidates:
        placed = _placed(shape, candidate, limits, card)
        if placed is not None:
            return placed
    raise InputError(_too_small(shape, options, limits, card))


def minimum(shape: Shape, options: RunOptions, card: Card) -> tuple[int, RunOptions]:
    """The least bytes on the device with which the run can be done, and the options that take them."""
    least = {
        _least(one, shape, card): None for one in _candidates(shape, options, card)
    }  # each once, in order
    best = min(least, key=lambda one: _device(shape, one, card))
    return _device(shape, best, card), best


def changes(shape: Shape, options: RunOptions, limits: Limits, card: Card) -> list[Change]:
    """What would make a run that does not fit smaller, one thing at a time and at last together; what fits
    comes first, the quickest step before the others.
    """
    before = _device(shape, options, card)
    found = []
    for text, changed in _single(shape, options, card):
        device = _device(shape, changed, card)
        works = fits(shape, changed, limits, card)
        if device < before or works:
            found.append(Change(text, changed, device, _seconds(shape, changed, card), works))
    try:
        together = choose(shape, options, limits, card)
    except InputError:
        together = None
    if together is not None and together != options:
        device, seconds = _device(shape, together, card), _seconds(shape, together, card)
        found.append(Change(_described(options, together, shape), together, device, seconds, True))
    return sorted(
        found, key=lambda change: (not change.fits, change.seconds if change.fits else change.device)
    )


def _candidates(shape: Shape, options: RunOptions, card: Card) -> Iterator[RunOptions]:
    """Combinations, in which checkpoints have not been placed yet. A CPU's host is the device itself.
    Attention that has no fused kernel runs by tiles in all of them."""
    options = options.but(kv_groups=options.kv_groups or shape.dense_attention)
    yield options.but(checkpointing=False, keep_layers=None, disk_layers=0, layers_on_host=False)
    one = card.is_gpu and options.cards == 1
    hosts = (False,) if shape.tied or not one else (False, True)
    streams = (False, True) if one and options.storable else (False,)
    stay = (None, 1) if options.storable else (None,)
    less = ((False, False), (True, False)) + (((True, True),) if _groups(shape, options) else ())
    if shape.dense_attention:
        less = (False, True), (True, True)
    if not _rebuilds(shape, options):
        less = tuple((False, grouped) for grouped in dict.fromkeys(grouped for _, grouped in less))
    for (tile, _), (rebuilt, grouped), looked_up, streamed, kept in itertools.product(
        _TILES, less, hosts, streams, stay
    ):
        yield options.but(
            checkpointing=True,
            mlp_tile=tile if tile is None or tile < options.tokens else None,
            rebuild_norms=rebuilt,
            kv_groups=grouped,
            embedding_on_host=looked_up,
            layers_on_host=streamed,
            keep_layers=kept,
            disk_layers=0,
        )


def _rebuilds(shape: Shape, options: RunOptions) -> bool:
    """Whether `rebuild_norms` spares anything: not beside bottlenecks and prefixes, for whose frozen linears
    no norm's output is kept; a layer whose additions are not inside its norms refuses it."""
    return not shape.extra_norms and options.rank > 0


def _groups(shape: Shape, options: RunOptions) -> bool:
    """Whether attention by groups spares anything: it is not asked where a prefix is joined to attention."""
    return shape.kv_heads > 1 and not options.prefix


def _least(options: RunOptions, shape: Shape, card: Card) -> RunOptions:
    """With every checkpoint away that can be."""
    if not options.checkpointing or not options.storable:
        return options
    return options.but(keep_layers=1, disk_layers=0 if card.is_gpu else shape.layers)


def _placed(shape: Shape, options: RunOptions, limits: Limits, card: Card) -> RunOptions | None:
    """With as many checkpoints on the device as fit, and on the disk only those for which the host has no
    room."""
    if options.keep_layers is None or not options.checkpointing:
        return options if fits(shape, options, limits, card) else None
    if _device(shape, options, card) > limits.gpu:
        return None
    low, high = 1, shape.layers
    while high - low > 1:  # how many stay
        middle = (low + high) // 2
        enough = _device(shape, options.but(keep_layers=middle), card) <= limits.gpu
        low, high = (middle, high) if enough else (low, middle)
    kept = options.but(keep_layers=low)
    if not card.is_gpu:
        kept = kept.but(disk_layers=kept.away(shape.layers))
        return kept if fits(shape, kept, limits, card) else None
    if fits(shape, kept, limits, card):
        return kept
    away = kept.away(shape.layers)
    return _on_disk(shape, kept, limits, card, away) if limits.disk else None


def _on_disk(shape: Shape, options: RunOptions, limits: Limits, card: Card, away: int) -> RunOptions | None:
    """With the fewest layers on the disk."""
    for layers in range(1, away + 1):
        candidate = options.but(disk_layers=layers)
        if fits(shape, candidate, limits, card):
            return candidate
    return None


def _cost(shape: Shape, options: RunOptions, card: Card) -> float:
    share = dict(_TILES).get(options.mlp_tile, 0.0)
    share += sum(cost for name, cost in _COSTS.items() if getattr(options, name, False))
    if options.keep_layers is not None:
        share += _COSTS["offload"]
    return _seconds(shape, options, card) * (1 + share)


def _device(shape: Shape, options: RunOptions, card: Card) -> int:
    return max(peak.nbytes for peak in phase_peaks(Step(shape, options, card)))


def _seconds(shape: Shape, options: RunOptions, card: Card) -> float:
    return step_time(Step(shape, options, card)).seconds


def _single(shape: Shape, options: RunOptions, card: Card) -> Iterator[tuple[str, RunOptions]]:
    if not options.checkpointing:
        yield "gradient checkpointing", options.but(checkpointing=True)
        return
    if options.kept(shape.layers) > 1 and options.storable:
        where = "the host" if card.is_gpu else "the disk"
        yield f"checkpoints to {where}", _least(options, shape, card)
    for tile, _ in _TILES[1:]:
        if tile < options.tokens and (options.mlp_tile is None or tile < options.mlp_tile):
            yield f"the MLP in tiles of {tile:,} tokens", options.but(mlp_tile=tile)
            break
    if not options.rebuild_norms and _rebuilds(shape, options):
        yield "norms' outputs computed again in backward", options.but(rebuild_norms=True)
    if not options.kv_groups and (_groups(shape, options) or shape.dense_attention):
        yield _by_groups(shape), options.but(kv_groups=True)
    one = card.is_gpu and options.cards == 1
    if one and not options.embedding_on_host and not shape.tied:
        yield "the embedding on the host", options.but(embedding_on_host=True)
    if one and not options.layers_on_host and options.storable:
        yield "the packed layers on the host, streamed", options.but(layers_on_host=True)
    if not options.nested and options.four_bit:
        yield "nested block maxima (double quantization)", options.but(nested=True)
    if options.batch > 1:
        rows = options.accumulation * options.batch
        yield f"a batch of 1, {rows} times a step", options.but(batch=1, accumulation=rows)
    if options.rank > 8:
        yield f"rank {options.rank // 2}", options.but(rank=options.rank // 2)


def _by_groups(shape: Shape) -> str:
    if shape.dense_attention:
        return "attention by key/value heads and tiles of queries"
    return "attention's backward by key/value heads"


def _described(before: RunOptions, after: RunOptions, shape: Shape) -> str:
    parts = []
    if after.checkpointing != before.checkpointing:
        parts.append("gradient checkpointing" if after.checkpointing else "no checkpointing")
    if after.mlp_tile != before.mlp_tile:
        parts.append(f"the MLP in tiles of {after.mlp_tile:,} tokens" if after.mlp_tile else "the MLP whole")
    if after.checkpointing and after.kept(shape.layers) != (
        before.kept(shape.layers) if before.checkpointing else -1
    ):
        away = after.away(shape.layers)
        parts.append(
            f"{away} of {shape.layers} checkpoints off the card" if away else "all checkpoints on the card"
        )
    if after.disk_layers != before.disk_layers:
        parts.append(f"{after.disk_layers} of them on the disk")
    names = (
        ("rebuild_norms", "norms' outputs computed again in backward"),
        ("kv_groups", _by_groups(shape)),
        ("embedding_on_host", "the embedding on the host"),
        ("layers_on_host", "the packed layers streamed from the host"),
    )
    parts += [text for name, text in names if getattr(after, name) and not getattr(before, name)]
    return ", ".join(parts) or "as asked"


def _too_small(shape: Shape, options: RunOptions, limits: Limits, card: Card) -> str:
    """Why nothing fits, with the least that would."""
    from .parts import host_parts, total

    least, how = minimum(shape, options, card)
    run = f"{options.batch} × {options.length:,} tokens of {shape.name}"
    if least > limits.gpu:
        one = minimum(shape, options.but(length=1, batch=1), card)[0]
        text = f"{run} needs {in_bytes(least)} on the card at the least, {in_bytes(limits.gpu)} may be used: "
        if one > limits.gpu:
            return (
                text + f"even one token needs {in_bytes(one)}; give a larger card, or a smaller model or rank"
            )
        most = longest(shape, how, limits, card)
        return text + f"shorten the sequences (to {most:,} tokens), or give a larger card"
    host = host_parts(Step(shape, how, card), limits)
    need = total(host, "pinned", "host")
    return (
        f"{run} fits the card with {in_bytes(least)}, but then needs {in_bytes(need)} of host memory, of"
        f" which {in_bytes(limits.host)} may be used, and a disk for what is left ({in_bytes(limits.disk)}"
        " may be used): give more of either, or shorten the sequences"
    )
