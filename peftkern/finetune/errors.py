"""The errors of `peftkern.errors`, under the name that they had here first."""

from __future__ import annotations

from ..errors import InputError, exit_status, require

__all__ = ["InputError", "exit_status", "require"]
