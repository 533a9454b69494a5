"""For which versions of transformers the tests hold exact numbers of fused modules. With others they ask for
"fused, or refused with a reason": how a new version writes its models must turn no test red."""

from __future__ import annotations

import pytest
import transformers

# Minor versions with which the suite has run. Add one when it has, with the counts that it changes.
HELD = ("5.17", "5.24")
COUNTED = ".".join(transformers.__version__.split(".")[:2]) in HELD

exact = pytest.mark.skipif(
    not COUNTED, reason=f"exact numbers of fused modules are held for transformers {', '.join(HELD)}"
)
