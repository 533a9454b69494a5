"""What the checks of the data need beyond PyTorch, named where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["require_data"]

_PACKAGES = {"cleanlab": "cleanlab", "datasketch": "datasketch", "sklearn": "scikit-learn"}


def require_data(*names: str) -> None:
    """Raise ModuleNotFoundError with the remedy where a package of `names` (as imported) is missing; imports
    none."""
    missing = [_PACKAGES[name] for name in names if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the checks of the data need {', '.join(missing)}: run pip install 'peftkern[data]'",
        )
