"""The definition of a group of linears."""

from ..reference import group_backward as backward
from ..reference import group_forward as forward

__all__ = ["backward", "forward"]
