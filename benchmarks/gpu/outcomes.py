"""A pytest plugin (`-p benchmarks.gpu.outcomes`): each test's outcome is written when it is known, so that a
run that is stopped keeps its counts; and of each test function the first case alone may be run.

PEFTKERN_OUTCOMES=FILE       where outcomes go, a line each: passed, failed, skipped or error, and the test
PEFTKERN_FIRST_CASES=1       one case of a function, on a GPU one of each backend
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

__all__ = ["counts"]

KINDS = ("passed", "failed", "error", "skipped")


def counts(path: Path) -> dict[str, int]:
    """How many tests had which outcome so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = Counter(line.split(" ", 1)[0] for line in lines)
    return {kind: found[kind] for kind in KINDS}


@pytest.hookimpl(trylast=True)  # after what -m and -k deselect
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("PEFTKERN_FIRST_CASES") != "1":
        return
    seen: set[tuple[object, ...]] = set()
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        key = (item.path, getattr(item, "originalname", item.name), parameters.get("backend"))
        (left if key in seen else kept).append(item)
        seen.add(key)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


class _Writer:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._file.write(f"{report.outcome} {report.nodeid}\n")
        elif report.outcome != "passed":
            kind = "skipped" if report.outcome == "skipped" else "error"
            self._file.write(f"{kind} {report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("PEFTKERN_OUTCOMES")
    if path and not hasattr(config, "workerinput"):  # xdist's workers report to the process that started them
        config.pluginmanager.register(_Writer(Path(path)), "peftkern-outcomes")
