import pytest

from .. import stock


@pytest.fixture(autouse=True)
def stock_bitsandbytes():
    """bitsandbytes' own ops, and such as are right on this CPU, stand for what is not patched."""
    with stock.right():
        yield
