"""What a merge did to a model: numbers a layer, and on a probe; as text, as a verdict, as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..merging import Measures

__all__ = ["FORM_NAMES", "TOLERANCE", "MergeComparison", "MergeReport", "MergedLayer", "Probe"]

TOLERANCE = 0.05  # of what the adapter gained: a merge that loses less is called faithful
_Z = 1.96
FORM_NAMES = {
    "requantize": "4-bit, nearest codes",
    "stochastic": "4-bit, stochastic rounding",
    "feedback": "4-bit, error feedback",
    "residual": "4-bit and a residual adapter",
    "dense": "dense",
}


@dataclass(frozen=True)
class MergedLayer:
    """One merged layer.

    name      as in `model.named_modules()`
    shape     (out_features, in_features)
    base      what its weight was: "nf4, nested", "bfloat16", ...
    adapters  merged ones, in the order they run
    measures  norms, rounding error, survival, mismatch
    bytes     of the merged weight as stored, with the residual adapter where there is one
    note      what else is worth knowing; "" for most layers
    """

    name: str
    shape: tuple[int, int]
    base: str
    adapters: tuple[str, ...]
    measures: Measures
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Probe:
    """Base, adapter and merged model on the same tokens; negative log-likelihoods in nats a token.

    difference  merged - adapter, with its standard error over sequences; kl: KL(adapter || merged), likewise
    """

    tokens: int
    sequences: int
    base_nll: float
    adapter_nll: float
    merged_nll: float
    difference_error: float
    kl: float
    kl_error: float

    @property
    def difference(self) -> float:
        return self.merged_nll - self.adapter_nll

    @property
    def interval(self) -> tuple[float, float]:
        """Of the difference, 95 %; infinite with a single sequence."""
        half = _Z * self.difference_error
        return self.difference - half, self.difference + half

    @property
    def gain(self) -> float:
        """By how much the adapter lowered the loss."""
        return self.base_nll - self.adapter_nll

    @property
    def lost(self) -> float:
        """The part of the gain that merging loses; NaN where the adapter gained nothing here."""
        return self.difference / self.gain if self.gain > 0 else math.nan

    @property
    def perplexities(self) -> tuple[float, float, float]:
        """Of base, adapter and merged model."""
        return tuple(_exp(nll) for nll in (self.base_nll, self.adapter_nll, self.merged_nll))

    def faithful(self, tolerance: float = TOLERANCE) -> bool | None:
        """Whether at most `tolerance` of the gain is lost, by the whole interval; None: cannot be told."""
        if self.gain <= 0:
            return None
        low, high = self.interval
        return True if high <= tolerance * self.gain else False if low > tolerance * self.gain else None


@dataclass(frozen=True)
class MergeReport:
    """A merge of one form; `str(report)` is a table that ends with the verdict.

    form      "requantize", "stochastic", "feedback", "residual" or "dense"
    base      "dequantized": the 4-bit weight that the adapter was trained on; "original": the 16-bit one
    layers    in the model's order
    probe     what it does to the model's outputs; None where no probe was given
    untied    layers whose weight was shared with another module, which keeps the unmerged one
    left      layers of the adapters that were not merged and run as before, with the reason
    """

    form: str
    base: str
    layers: tuple[MergedLayer, ...]
    probe: Probe | None = None
    untied: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = field(default=())

    @property
    def total(self) -> Measures:
        """All layers as if they were one weight."""
        return Measures.total([layer.measures for layer in self.layers])

    @property
    def bytes(self) -> int:
        """Of all merged weights as stored."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def name(self) -> str:
        """The form in words."""
        onto = " on the original weights" if self.base == "original" else ""
        return FORM_NAMES[self.form] + onto

    @property
    def verdict(self) -> str:
        """What became of the adapter, in a sentence or two."""
        total = self.total
        if not total.delta:
            return "The adapters change nothing: there is nothing to merge."
        told = [_survived(total), _on_probe(self.probe) if self.probe else _without_probe(total)]
        if self.base == "original" and total.mismatch_ratio and total.mismatch_ratio > 1:
            told.append(
                "The original weights differ from those the adapter was trained on by "
                f"{total.mismatch_ratio:.1f} times what the adapter adds."
            )
        return " ".join(told)

    def __str__(self) -> str:
        head = (
            "layer",
            "shape",
            "was",
            "|delta|/|W|",
            "error/|delta|",
            "survival",
            "mismatch/|delta|",
            "remark",
        )
        rows = [head, *(_cells(layer) for layer in self.layers), _cells(self._as_layer())]
        lines = [f"Merged as: {self.name}", *_table(rows)]
        if self.probe:
            lines.append(_probe_line(self.probe))
        lines += [f"Untied: {name} has a weight of its own now." for name in self.untied]
        lines += [f"Left as it is: {name}: {reason}" for name, reason in self.left]
        return "\n".join([*lines, self.verdict])

    def plot(self, axes: Any) -> None:
        """Draw how much of each layer's change survives, by depth, a line for each kind of layer."""
        kinds: dict[str, list[float]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer.measures.survival)
        for kind, values in list(kinds.items())[:12]:
            axes.plot(range(len(values)), values, marker=".", label=kind)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_xlabel("layer, from the input")
        axes.set_ylabel("survival: <delta, change stored> / |delta|²")
        axes.set_title(f"{self.name}: {self.total.survival:.0%} of the adapter's change survives")
        axes.legend(fontsize="small", ncols=2)

    def _as_layer(self) -> MergedLayer:
        return MergedLayer("all together", (0, 0), "", (), self.total, self.bytes)


@dataclass(frozen=True)
class MergeComparison:
    """Several forms of one merge on one probe; `str(comparison)` is a table that ends with the verdict.

    adapter_bytes: of the unmerged weights with the adapters beside them.
    """

    reports: tuple[MergeReport, ...]
    adapter_bytes: int

    @property
    def best(self) -> MergeReport | None:
        """The smallest form that is faithful on the probe; None where none is, or where it cannot be told."""
        faithful = [report for report in self.reports if report.probe and report.probe.faithful()]
        return min(faithful, key=lambda report: (report.bytes, report.probe.kl), default=None)

    @property
    def verdict(self) -> str:
        """Which form to take."""
        probes = [report.probe for report in self.reports if report.probe]
        if not probes:
            return "Cannot tell which form to take: no probe was given."
        if probes[0].gain <= 0:
            return (
                "Cannot tell which to take: the adapter gains nothing on the probe; give text like its own."
            )
        limit, best = f"{TOLERANCE:.0%} of what the adapter gained", self.best
        if best is None:
            probed = [report for report in self.reports if report.probe]
            open_ = [report.name for report in probed if report.probe.faithful() is None]
            more = f" ({', '.join(open_)}: cannot tell; give a longer probe)" if open_ else ""
            return f"Keep the adapter beside its base: no form is sure to lose at most {limit}{more}."
        told = f"Take {best.name}: it loses {_percent(best.probe.lost)} of what the adapter gained"
        told += f", and no smaller form is sure to lose at most {limit}."
        if best.bytes > self.adapter_bytes:
            told += (
                f" It takes {best.bytes / self.adapter_bytes:.1f} times the bytes of the 4-bit base with the "
                "adapter beside it, which loses nothing: merge for speed or other software, not for space."
            )
        return told

    def __str__(self) -> str:
        head = ("form", "MB", "error/|delta|", "survival", "KL, nats", "perplexity", "lost of the gain")
        return "\n".join([*_table([head, *map(_form_cells, self.reports)]), self.verdict])

    def plot(self, axes: Any) -> None:
        """Draw the perplexity of each form between the base's and the adapter's, on matplotlib axes."""
        reports = [report for report in self.reports if report.probe]
        if not reports:
            raise ValueError("comparison: has no probe to plot; compare with probe=...")
        values = [report.probe.perplexities[2] for report in reports]
        axes.barh([report.name for report in reports], values, color="tab:blue")
        base, adapter, _ = reports[0].probe.perplexities
        axes.axvline(base, color="tab:red", label=f"base alone, {base:.2f}")
        axes.axvline(adapter, color="tab:green", label=f"adapter beside it, {adapter:.2f}")
        axes.invert_yaxis()
        axes.set_xlabel("perplexity on the probe (lower is better)")
        axes.set_title(self.verdict.partition(":")[0])
        axes.legend(fontsize="small")


def _survived(total: Measures) -> str:
    return (
        f"{total.survival:.0%} of the adapter's change survives; the rounding error is "
        f"{total.error_ratio:.2g} times as large as the change."
    )


def _on_probe(probe: Probe) -> str:
    if probe.gain <= 0:
        return "The adapter gains nothing on the probe: cannot tell what is lost; give text like its own."
    told = {
        True: "The merge is faithful",
        False: "The merge is not faithful",
        None: "Cannot tell whether it is faithful",
    }
    low, high = (value / probe.gain for value in probe.interval)
    return (
        f"{told[probe.faithful()]}: on the probe {_percent(probe.lost)} of what the adapter gained is lost "
        f"(95 % interval {_percent(low)} to {_percent(high)})."
    )


def _without_probe(total: Measures) -> str:
    if total.error_ratio < 0.1:
        return "The merged weights are the adapter's but for rounding."
    return "Cannot tell what that does to the outputs: give a probe."


def _percent(value: float) -> str:
    return f"{round(value, 3) + 0.0:.1%}" if math.isfinite(value) else "an unknown part"


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _probe_line(probe: Probe) -> str:
    base, adapter, merged = probe.perplexities
    return (
        f"On {probe.tokens} tokens: perplexity {merged:.3f} (base {base:.3f}, adapter {adapter:.3f}); "
        f"KL {probe.kl:.4g} ± {probe.kl_error:.2g} nats; "
        f"loss {probe.difference:+.4f} ± {probe.difference_error:.2g}"
    )


def _cells(layer: MergedLayer) -> tuple[str, ...]:
    it = layer.measures
    shape = "x".join(map(str, layer.shape)) if any(layer.shape) else "-"
    mismatch = "-" if it.mismatch_ratio is None else f"{it.mismatch_ratio:.3g}"
    numbers = (f"{it.delta_ratio:.3g}", f"{it.error_ratio:.3g}", f"{it.survival:.3f}", mismatch)
    return layer.name, shape, layer.base or "-", *numbers, layer.note


def _form_cells(report: MergeReport) -> tuple[str, ...]:
    total, probe = report.total, report.probe
    on_probe = ("-", "-", "-")
    if probe:
        on_probe = (f"{probe.kl:.4f}", f"{probe.perplexities[2]:.3f}", _percent(probe.lost))
    return (
        report.name,
        f"{report.bytes / 1e6:.1f}",
        f"{total.error_ratio:.3g}",
        f"{total.survival:.3f}",
        *on_probe,
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join(line).rstrip() for line in lines]
