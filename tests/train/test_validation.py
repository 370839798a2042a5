"""The numbers of a validation."""

import math

import torch

from titan_moe.parallel.mesh import single
from titan_moe.train.validation import LossSums


def test_tokens_that_stand_for_no_bytes_have_no_bits_per_byte() -> None:
    """Validation text of nothing but characters that a given tokenizer does not know."""
    sums = LossSums()
    sums.nats, sums.tokens = 6.0, 3
    losses = sums.over_ranks(single(torch.device("cpu")))
    assert losses.loss == 2.0
    assert math.isnan(losses.bits_per_byte)
