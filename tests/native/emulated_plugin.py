"""A pytest plugin (-p tests.native.emulated_plugin) that loads the extension PEFTKERN_TEST_EXTENSION names in
peftkern._C's place."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch  # noqa: F401  first, so that the extension takes its OpenMP runtime

_spec = importlib.util.spec_from_file_location("peftkern._C", os.environ["PEFTKERN_TEST_EXTENSION"])
assert _spec is not None and _spec.loader is not None
sys.modules["peftkern._C"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["peftkern._C"])
