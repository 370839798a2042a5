"""The kernels' tests: on a CPU in Triton's interpreter, which must be told how a GPU computes with bfloat16."""

import pytest

from tests.helpers import interpreter
from torchtitan_ext.ops import select


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels compute on this machine's tensors."""
    if not interpreter.available():
        pytest.skip(interpreter.REASON)
    monkeypatch.setattr(select, "TRITON_DEVICES", (interpreter.DEVICE,))
    if interpreter.INTERPRETED:
        interpreter.exact_bfloat16(monkeypatch)
