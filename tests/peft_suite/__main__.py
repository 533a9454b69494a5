"""`python -m tests.peft_suite`: PEFT's own LoRA tests, stock and with every LoRA model patched; fails where
only the patched one fails.

The source distribution of the installed PEFT is downloaded and unpacked in a temporary folder (or --source
names an unpacked one); nothing reaches the model hub, so that tests which need it fail in both runs, and a
stock failure stays a stock failure.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
# What PEFT's tests import beside PEFT's own requirements: import name, distribution.
REQUIREMENTS = {
    "parameterized": "parameterized",
    "scipy": "scipy",
    "diffusers": "diffusers",
    "importlib_metadata": "importlib_metadata",
    "zipp": "zipp",
    "attr": "attrs",
}
# The files whose LoRA tests run without the hub, and the tests in them that concern LoRA.
FILES = (
    "test_custom_models",
    "test_initialization",
    "test_lora_conversion",
    "test_lora_ga",
    "test_lora_variants",
    "test_lorafa",
    "test_loraplus",
    "test_low_level_api",
    "test_mixed",
    "test_other",
    "test_riemannian_lora",
    "test_trainable_tokens",
    "test_tuners_utils",
    "test_velora",
    "test_helpers",
    "test_integrations",
    "test_bdlora",
)
OTHERS = ("randlora", "adalora", "vblora", "xlora", "gralora", "tinylora", "delora", "unilora", "glora")
KEYWORD = " and ".join(["lora", *(f"not {name}" for name in OTHERS)])

Outcomes = dict[str, dict[str, object]]


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 where every test that passes stock passes patched too."""
    options = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as folder:
        source = Path(options.source).resolve() if options.source else _download(Path(folder))
        (
            source / "tests" / "__init__.py"
        ).touch()  # the distribution leaves it out; the tests import each other relatively
        extra = Path(folder) / "site"
        _install_missing(extra)
        environment = _environment(extra)
        chosen = [f"tests/{name}.py" for name in options.files or FILES]
        stock, patched = (
            _run(source, chosen, options.keyword, environment, Path(folder), mode)
            for mode in ("stock", "patched")
        )
        suspects = _regressions(stock, patched)
        if suspects:  # once more on their own: what draws without a seed may fail either way
            again = [
                _run(source, suspects, "", environment, Path(folder), mode) for mode in ("stock", "patched")
            ]
            suspects = [name for name in suspects if name in _regressions(*again)]
    text = _summary(stock, patched, suspects)
    print(text)
    if options.out:
        Path(options.out).write_text(
            json.dumps({"stock": stock, "patched": patched, "regressions": suspects}, indent=1)
        )
    return 1 if suspects or not _modules(patched) else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.peft_suite", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "files",
        nargs="*",
        help="test files by name, as test_mixed; default: all LoRA tests that run without the hub",
    )
    parser.add_argument(
        "--source",
        help="an unpacked source distribution of PEFT, with tests/ in it; default: it is downloaded",
    )
    parser.add_argument(
        "-k", dest="keyword", default=KEYWORD, help="pytest's expression for the tests to run"
    )
    parser.add_argument("--out", help="a JSON file for every outcome of both runs")
    return parser.parse_args(argv)


def _download(folder: Path) -> Path:
    """The installed version's source, unpacked."""
    version = importlib.metadata.version("peft")
    wanted = [
        "--no-binary",
        ":all:",
        "--no-deps",
        "--no-build-isolation",
        "--dest",
        str(folder),
        f"peft=={version}",
    ]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *wanted], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(path for path in folder.glob("peft-*") if path.is_dir())
    return source


def _install_missing(folder: Path) -> None:
    missing = [
        distribution
        for module, distribution in REQUIREMENTS.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *missing],
            check=True,
        )


def _environment(extra: Path) -> dict[str, str]:
    path = os.pathsep.join(map(str, (HERE / "plugins", REPOSITORY, extra)))
    nowhere = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }  # refused at once
    return os.environ | nowhere | {"PYTHONPATH": path, "PEFTKERN_BNB_BACKEND": "0"}


def _run(
    source: Path, tests: list[str], keyword: str, environment: dict[str, str], folder: Path, mode: str
) -> Outcomes:
    """One pytest process in PEFT's folder; its outcomes by test."""
    out = folder / f"{mode}.json"
    plugins = [
        "-p",
        "peftkern_records_outcomes",
        *(["-p", "peftkern_patches_lora_models"] if mode == "patched" else []),
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        *plugins,
    ]
    command += ["--continue-on-collection-errors", *(["-k", keyword] if keyword else []), *tests]
    print(f"{mode}: {' '.join(tests) if len(tests) < 30 else f'{len(tests)} tests'}", flush=True)
    done = subprocess.run(
        command,
        cwd=source,
        env=environment | {"PEFTKERN_SUITE_OUT": str(out)},
        capture_output=True,
        text=True,
    )
    if not out.exists():
        raise RuntimeError(
            f"pytest ended with {done.returncode} and no "
            f"outcomes:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    print(done.stdout.strip().rpartition("\n")[2], flush=True)
    found = json.loads(out.read_text())
    out.unlink()
    return found


def _regressions(stock: Outcomes, patched: Outcomes) -> list[str]:
    """Tests that pass stock and do not when patched, vanished ones included."""
    kept = {"passed", "xfailed"}
    return [
        name
        for name, entry in stock.items()
        if entry["outcome"] in kept
        and patched.get(name, {"outcome": "missing"})["outcome"] != entry["outcome"]
    ]


def _modules(patched: Outcomes) -> int:
    return sum(int(entry["modules"]) for entry in patched.values())


def _summary(stock: Outcomes, patched: Outcomes, suspects: list[str]) -> str:
    lines = ["", f"{'file':32}" + "".join(f"{head:>22}" for head in ("stock", "patched", "modules fused"))]
    files = sorted({name.partition("::")[0] for name in stock})
    for file in [*files, ""]:
        rows = [
            {name: entry for name, entry in run.items() if name.startswith(file)} for run in (stock, patched)
        ]
        lines.append(
            f"{file or 'all':32}"
            + "".join(f"{_counts(row):>22}" for row in rows)
            + f"{_modules(rows[1]):>22}"
        )
    lines += ["counts: passed/failed/skipped (failed: also errors; skipped: also expected failures)"]
    fixed = [
        name
        for name in stock
        if stock[name]["outcome"] == "failed" and patched.get(name, {}).get("outcome") == "passed"
    ]
    lines += [f"{len(suspects)} tests pass stock and fail patched, {len(fixed)} the other way round"]
    return "\n".join(
        lines + [f"  {name}: {patched.get(name, {}).get('message', 'missing')}" for name in suspects]
    )


def _counts(run: Outcomes) -> str:
    by = Counter(entry["outcome"] for entry in run.values())
    return f"{by['passed']}/{by['failed'] + by['error']}/{by['skipped'] + by['xfailed']}"


if __name__ == "__main__":
    sys.exit(main())
