"""How torch's allocator on a GPU takes memory, set before torch asks for any."""

from __future__ import annotations

import os
import platform

__all__ = ["grow_segments"]

# torch reads the first; the others are its older names, which it still takes.
_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def grow_segments() -> bool:
    """Let segments of GPU memory grow instead of being allocated anew for each larger batch: batches of
    many lengths otherwise leave pieces that no later one fits into.

    Nothing is changed where the user has set the allocator's options, and on Windows and WSL, where torch
    cannot do it. Returns whether it was set.
    """
    unable = platform.system() == "Windows" or "microsoft" in platform.release().lower()
    if unable or any(name in os.environ for name in _NAMES):
        return False
    os.environ[_NAMES[0]] = "expandable_segments:True"
    return True
