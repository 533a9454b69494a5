"""A plan as a picture: a stacked bar a phase, beside the line of what the card has."""

from __future__ import annotations

from pathlib import Path

from ...files import atomic_files
from .plan import PhasePeak, Plan
from .table import PHASE_NAMES, adapters_of, short_name

__all__ = ["plot_plan"]

_GROUPS = (
    "weights",
    "embedding, head",
    "gathered",
    "adapters",
    "gradients",
    "optimizer",
    "driver",
    "checkpoints",
    "saved activations",
    "the layer at work",
    "loss",
    "scratch",
    "other",
)


def plot_plan(plan: Plan, path: Path) -> None:
    """Write the picture to `path`, whose ending says the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    names, left = [PHASE_NAMES[peak.phase] for peak in plan.peaks], [0.0] * len(plan.peaks)
    for place, group in enumerate(_GROUPS):
        sizes = [_of_group(peak, group) / 2**30 for peak in plan.peaks]
        if max(sizes) > 0:
            axes.barh(names, sizes, left=left, label=group, color=colours[place % len(colours)])
            left = [before + size for before, size in zip(left, sizes, strict=True)]
    limit = plan.limits.gpu / 2**30
    axes.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"may be used: {limit:.1f} GiB")
    axes.invert_yaxis()
    axes.set_xlabel(f"GiB on {plan.card.name}, planned")
    axes.set_title(_title(plan), fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    path = path.resolve()
    with atomic_files(path.parent) as temporary:
        figure.savefig(temporary / path.name, dpi=150)
    plt.close(figure)


def _of_group(peak: PhasePeak, group: str) -> int:
    known = [part.group if part.group in _GROUPS else "other" for part in peak.parts]
    return sum(part.nbytes for part, of in zip(peak.parts, known, strict=True) if of == group)


def _title(plan: Plan) -> str:
    options, peak = plan.options, plan.peak
    room = plan.limits.gpu - plan.device_bytes
    verdict = f"fits with {room / 2**30:.1f} GiB to spare" if room >= 0 else f"lacks {-room / 2**30:.1f} GiB"
    run = (
        f"{short_name(plan.shape.name)}, {options.batch} × {options.length:,} tokens, {adapters_of(options)}"
    )
    return f"{run}:\n{verdict}; {PHASE_NAMES[peak.phase]} sets the peak"
