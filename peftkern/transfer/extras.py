"""What these measurements need beyond PyTorch, named where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["require_transfer"]

_PACKAGES = {"sklearn": "scikit-learn", "scipy": "scipy"}


def require_transfer(*also: str) -> None:
    """Raise ModuleNotFoundError with the remedy where scikit-learn, scipy or a package of `also` is missing;
    imports none.
    """
    missing = [_PACKAGES.get(name, name) for name in (*_PACKAGES, *also) if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"peftkern.transfer needs {', '.join(missing)}: run pip install 'peftkern[transfer]'"
        )
