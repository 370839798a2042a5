"""The numbers of a validation."""

import pytest
import torch

from titan_moe.errors import UserError
from titan_moe.parallel.mesh import single
from titan_moe.train.validation import LossSums


def test_text_without_a_byte_has_no_bits_per_byte_and_is_refused() -> None:
    """Validation text of nothing but characters that a given tokenizer does not know."""
    sums = LossSums()
    sums.nats, sums.tokens = 6.0, 3
    with pytest.raises(UserError, match="not one byte"):
        sums.over_ranks(single(torch.device("cpu")))
