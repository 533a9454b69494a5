"""Words that options of a run take."""

from __future__ import annotations

__all__ = ["ALL", "ALL_LINEAR", "COMPLETIONS", "FILTERS", "SAMPLE"]

SAMPLE = "sample"  # of --model and --data: the one that the package brings
ALL_LINEAR = "all-linear"  # of --targets
COMPLETIONS, ALL = "completions", "all"  # what the loss covers
FILTERS = ("duplicates", "overlap")  # of --filter-data
