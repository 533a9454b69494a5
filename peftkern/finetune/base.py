"""What tells one base model from another: the files it is loaded from, by name and content."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from .constants import SAMPLE
from .sample import sample_model_file

__all__ = ["base_changes", "base_fingerprint"]

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_OTHERS = (".json", ".jinja", ".model", ".txt", ".py")
_IGNORED = ("generation_config.json", "LICENSE.txt", "README.txt")
_WHOLE = 64 << 20  # larger files are read in samples: a base of 140 GB is told from another within a second
_SAMPLES, _SAMPLE_BYTES = 256, 16 << 10


def base_fingerprint(model: str) -> dict[str, str]:
    """A short hash for each file that weights, configuration and tokenizer of --model come from.

    Files over 64 MiB are read at 256 places. Empty for a hub id that is not in the local cache yet.
    """
    return {path.name: _digest(path) for path in sorted(_files(model))}


def base_changes(stored: dict[str, str], model: str) -> list[str]:
    """What of the base that `stored` describes is not as it was; nothing where either is unknown."""
    now = base_fingerprint(model)
    if not now:
        return []
    missing = [name for name in stored if name not in now]
    changed = [name for name, digest in stored.items() if now.get(name, digest) != digest]
    return [f"{name} of the base {model} has changed" for name in changed] + [
        f"{name} of the base {model} is gone" for name in missing
    ]


def _files(model: str) -> list[Path]:
    path = Path(model)
    if model == SAMPLE:
        return [sample_model_file()]
    if path.suffix == ".gguf":
        in_parts = re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", path.name)
        return list(path.parent.glob(in_parts.replace("[", "[[]"))) if path.is_file() else []
    folder = path if path.is_dir() else _cached(model)
    names = folder.iterdir() if folder else ()
    return [
        path
        for path in names
        if path.suffix in (*_WEIGHTS, *_OTHERS) and path.name not in _IGNORED and path.is_file()
    ]


def _cached(model: str) -> Path | None:
    """The folder of the local cache that a hub id is loaded from."""
    from transformers.utils import cached_file

    try:
        config = cached_file(model, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(config).parent if config else None


def _digest(path: Path) -> str:
    if path.name == "config.json":
        return hashlib.sha256(_meaning(path)).hexdigest()[:16]
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for index in range(_SAMPLES):
                file.seek(index * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _meaning(config: Path) -> bytes:
    """A configuration without the version of the library that wrote it."""
    content = config.read_bytes()
    try:
        values = json.loads(content)
    except ValueError:
        return content
    if not isinstance(values, dict):
        return content
    return json.dumps({key: values[key] for key in sorted(values) if key != "transformers_version"}).encode()
