"""The sections of the report: each asks one question, measures, and says what the numbers carry and what they
do not."""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..intervals import Interval
from ..lexical import TextRate, bits_per_byte, passages
from .page import Line, Plot, Section
from .short_runs import ShortRuns, short_runs
from .subject import Subject

__all__ = [
    "Pretraining",
    "cut_section",
    "distance_section",
    "documents_of",
    "forgetting_section",
    "measured",
    "pretraining_section",
    "run_shortly",
]

_PASSAGES = 120  # of each domain, of 60 words
_DOCUMENTS = 20  # of each domain, for halves and five folds of each half
_CONTEXT = 4 << 20  # bytes of training text that the compressor sees


def measured(question: str, measure: Callable[[], Section]) -> Section:
    """What `measure` gives, with the time it took."""
    begun = time.perf_counter()
    section = measure()
    return Section(
        question, section.verdict, section.lines, section.plots, time.perf_counter() - begun, section.missing
    )


def distance_section(subject: Subject, *, seed: int = 0) -> Section:
    """How far the target's texts lie from the source's: features, surface, words, bits a byte."""
    from ..similarity import domain_similarity

    domains = [documents_of(side) for side in (subject.source, subject.train)]
    texts, documents = zip(*(passages(side, most=_PASSAGES, seed=seed) for side in domains), strict=True)
    with subject.autocast():
        found = domain_similarity(
            subject.model,
            *texts,
            tokenizer=subject.tokenizer,
            source_documents=documents[0],
            target_documents=documents[1],
            seed=seed,
            max_length=128,
        )
    lines = [
        Line(
            f"proxy A-distance of {name}",
            _interval(distance.interval),
            f"0 the same, 2 apart; halves of one: {distance.null_high:.2f}",
        )
        for name, distance in (
            ("the model's features", found.features),
            ("characters", found.characters),
            ("lengths", found.lengths),
        )
    ]
    lines += [
        Line(
            "MMD² of the features", f"{found.mmd.value:.3g}", f"p = {found.mmd.p_value:.3g} for no difference"
        ),
        Line(
            "frequent words in common",
            f"{found.words.overlap:.0%}",
            f"halves of the source: {found.words.within_overlap:.0%}",
        ),
        Line(
            "tokens a word",
            f"source {found.source_fertility.value:.2f}, target {found.target_fertility.value:.2f}",
            "more: worse cut",
        ),
    ]
    if found.source_bits and found.target_bits:
        value = f"source {_rate(found.source_bits)}, target {_rate(found.target_bits)}"
        lines.append(
            Line("bits a byte of the base", value, "lower: better known to the model; s.e. over passages")
        )
    return Section("", found.verdict, tuple(lines), (Plot("distance", found.draw),))


def documents_of(texts: Sequence[str]) -> list[str]:
    """The texts, or where they are fewer than the distance needs, as many parts of each as make them enough:
    a part is a document then.

    Passages of one document never stand on both sides of a split. Parts of one text are less independent than
    texts.
    """
    parts = -(-_DOCUMENTS // len(texts))
    if parts == 1:
        return list(texts)
    words = [text.split() for text in texts]
    cut = [
        " ".join(each[i * len(each) // parts : (i + 1) * len(each) // parts])
        for each in words
        for i in range(parts)
    ]
    return [text for text in cut if text]


class Pretraining:
    """The base's bits a byte of held-out text beside those of a compressor that has read the training
    text."""

    def __init__(self, base: TextRate, compressor: float) -> None:
        self.base, self.compressor = base, compressor

    @property
    def difference(self) -> float:
        """Bits a byte that the base needs less than the compressor."""
        return self.compressor - self.base.value

    @property
    def verdict(self) -> str:
        """helps, hurts, or cannot tell."""
        if abs(self.difference) <= 2 * self.base.se or not math.isfinite(self.base.se):
            return (
                "Cannot tell whether pretraining helps: the base and a compressor trained on the target are"
                " alike."
            )
        if self.difference > 0:
            return (
                "Pretraining helps: the base knows this text better than a compressor that read the"
                " training text."
            )
        return (
            "Pretraining does not show on this text: a compressor that read the training text knows it better"
            " than the base."
        )


def pretraining_section(subject: Subject) -> Section:
    """Whether the base knows the target at all."""
    texts, _ = passages(subject.held_out, words=120, most=24)
    with subject.autocast():
        base = bits_per_byte(subject.model, texts, subject.tokenizer)
    found = Pretraining(base, compressed_bits_per_byte(subject.train, texts))
    lines = (
        Line("bits a byte of the base, held-out target", _rate(base), "s.e. over passages"),
        Line(
            "bits a byte of LZMA after the training text",
            f"{found.compressor:.3f}",
            "what counting repeated strings gives",
        ),
    )
    return Section("", found.verdict, lines)


def compressed_bits_per_byte(train: Sequence[str], held_out: Sequence[str]) -> float:
    """Bits that LZMA needs for a byte of `held_out` after it has read the end of `train`, up to 4 MiB."""
    context, text = "\n".join(train).encode()[-_CONTEXT:], "\n".join(held_out).encode()
    return (
        8 * (len(lzma.compress(context + text, preset=6)) - len(lzma.compress(context, preset=6))) / len(text)
    )


def run_shortly(
    subject: Subject, *, arms: int = 4, forecast: bool = True, progress: bool = False
) -> ShortRuns:
    """Short runs from evenly spaced first layers, the forecast of forgetting with the run that trains all."""
    from ..depth import layer_stacks

    layers = sum(len(stack.layers) for stack in layer_stacks(subject.model))
    # What is forecast and what is measured are other windows.
    seen, measured_on = (
        subject.source_windows[::4],
        [w for i, w in enumerate(subject.source_windows) if i % 4],
    )
    predict = _forecast(subject, seen) if forecast and measured_on else None
    with subject.autocast():
        return short_runs(
            subject.model,
            subject.batches,
            subject.target_windows,
            measured_on or seen,
            nll=subject.nll,
            firsts=sorted({index * layers // arms for index in range(arms)}),
            layers=layers,
            lr=subject.config.lr,
            forecast=predict,
            progress=progress,
        )


def _forecast(subject: Subject, windows: Sequence[dict[str, Any]]) -> Callable[[], float]:
    """First and second order of the loss of `windows` along the adapter's update, by the whole Fisher.

    The diagonal alone, which a penalty has to make do with, was 9 to 50 times too low
    (docs/transfer/forgetting.md).
    """
    from ..forgetting import expansion_terms

    def measure() -> float:
        with subject.autocast():
            terms = expansion_terms(subject.model, windows, seed=subject.config.seed)
        return terms.linear + terms.fisher

    return measure


def cut_section(found: ShortRuns) -> Section:
    """Where to cut, by short runs."""
    cut, whole = found.cut(), found.whole
    lines = [
        Line(
            "gain of training all layers",
            f"{_interval(found.gain)} nats a token",
            f"after {found.steps} steps, held-out target",
        )
    ]
    for run in found.runs[1:]:
        time_share = run.seconds / whole.seconds
        value = f"{_interval(found.behind(run))} nats a token behind"
        lines.append(
            Line(
                f"layers {run.first} to {found.layers - 1} alone",
                value,
                f"a step takes ×{time_share:.2f} of the time",
            )
        )
    if found.gain.sign != 1:
        verdict = "Cannot tell where to cut: the short run itself gained nothing certain."
    elif cut:
        share = next(run.seconds for run in found.runs if run.first == cut) / whole.seconds
        verdict = (
            f"Train from layer {cut} of {found.layers} up: it keeps 90 % of the gain, and a step takes"
            f" ×{share:.2f} of the time."
        )
    else:
        verdict = "Train all layers: every cut that was tried may lose more than a tenth of the gain."
    return Section("", verdict, tuple(lines), (Plot("cut", lambda axes: _draw_cut(axes, found)),))


def _draw_cut(axes: Any, found: ShortRuns) -> None:
    seconds = [run.seconds for run in found.runs]
    gains = [_gain_of(found, run) for run in found.runs]
    for run, time_, gain in zip(found.runs, seconds, gains, strict=True):
        axes.errorbar(time_, gain.mean, gain.mean - gain.low, marker="o", label=f"from layer {run.first}")
    cut = found.cut()
    axes.set(
        xlabel="seconds a step",
        ylabel="nats a token gained",
        title=f"A cut at {cut} keeps the gain" if cut else "No cut keeps the gain for certain",
    )
    axes.legend()


def _gain_of(found: ShortRuns, run: Any) -> Interval:
    from .short_runs import paired_gain

    return paired_gain(found.before.target, run.target)


def forgetting_section(found: ShortRuns, *, budget: float) -> Section:
    """What the short run of all layers did to the source's loss, and what the Fisher information says of
    it."""
    rise = found.forgotten
    lines = [
        Line(
            "rise of the source's loss",
            f"{_interval(rise)} nats a token",
            f"measured after {found.steps} steps, paired over windows",
        ),
    ]
    if found.forecast is not None:
        reading = "first and second order along the adapter's update, from other windows of the source"
        lines.append(Line("its forecast", f"{found.forecast:.4f} nats a token", reading))
    if rise.sign == 1:
        verdict = f"The model forgets: {_interval(rise)} nats a token of the source in {found.steps} steps"
        verdict += (
            f", more than the budget of {budget:g}." if rise.low > budget else "; a longer run forgets more."
        )
    elif rise.sign == -1:
        verdict = (
            f"The source's loss fell by {-rise.mean:.3f} nats a token in {found.steps} steps: nothing is"
            " forgotten yet."
        )
    elif rise.high <= budget:
        verdict = f"Nothing certain is forgotten in {found.steps} steps; a longer run may differ."
    else:
        verdict = (
            f"Cannot tell: the interval {_interval(rise)} holds zero and the budget of {budget:g}; give more"
            " source text."
        )
    return Section(
        "", verdict, tuple(lines), (Plot("forgetting", lambda axes: _draw_forgetting(axes, found)),)
    )


def _draw_forgetting(axes: Any, found: ShortRuns) -> None:
    from .short_runs import paired_gain

    for run in found.runs:
        gain, rise = _gain_of(found, run), paired_gain(run.source, found.before.source)
        axes.errorbar(
            gain.mean,
            rise.mean,
            rise.mean - rise.low,
            gain.mean - gain.low,
            marker="o",
            label=f"from layer {run.first}",
        )
    axes.axhline(0, color="gray", linewidth=0.8)
    title = "The source is forgotten" if found.forgotten.sign == 1 else "No forgetting that is certain"
    axes.set(
        xlabel="gained on the target, nats a token", ylabel="lost on the source, nats a token", title=title
    )
    axes.legend()


def _interval(value: Interval) -> str:
    if not math.isfinite(value.low):
        return f"{value.mean:.3f} (one value: no interval)"
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _rate(rate: TextRate) -> str:
    return f"{rate.value:.3f} ± {rate.se:.3f}"
