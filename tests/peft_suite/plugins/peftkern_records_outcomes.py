"""A pytest plugin: the outcome of every test, with what was patched in it, as JSON in $PEFTKERN_SUITE_OUT;
and no waiting for the hub."""

from __future__ import annotations

import json
import os
import types

import pytest
from huggingface_hub.utils import _http

outcomes: dict[str, dict[str, object]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    entry = outcomes.setdefault(report.nodeid, {"outcome": "passed", "modules": 0, "message": ""})
    if report.failed:
        entry["outcome"] = "failed" if report.when == "call" else "error"
        entry["message"] = str(getattr(report.longrepr, "reprcrash", "") or report.longrepr)[-500:]
    elif report.skipped and entry["outcome"] == "passed":
        entry["outcome"] = "xfailed" if hasattr(report, "wasxfail") else "skipped"
    modules = dict(report.user_properties).get("peftkern_modules")
    entry["modules"] = modules if isinstance(modules, int) else entry["modules"]


def pytest_configure(config: pytest.Config) -> None:
    """PEFT's tests switch the hub on for themselves; where it cannot be reached each would wait a minute for
    its retries."""
    if hasattr(_http, "time"):
        _http.time = types.SimpleNamespace(**vars(_http.time) | {"sleep": lambda seconds: None})


def pytest_sessionfinish(session: pytest.Session) -> None:
    with open(os.environ["PEFTKERN_SUITE_OUT"], "w") as file:
        json.dump(outcomes, file)
