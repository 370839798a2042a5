"""The vocabulary's cross-entropy by the kernel, compared with PyTorch's operations in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.interpreter import DEVICE
from titan_moe.model import head
from titan_moe.model.comm import TPComm
from titan_moe.model.head import chunked_cross_entropy, slice_tokens
from torchtitan_ext.ops import select

TOKENS, DIM = 9, 12


def inputs(vocabulary: int, dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, ...]:
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, generator=source).mul(spread).to(dtype)
    weight = torch.randn(vocabulary, DIM, generator=source)
    labels = torch.randint(vocabulary, (TOKENS,), generator=source)
    labels[:2] = torch.tensor([0, vocabulary - 1])
    weights = torch.rand(TOKENS, generator=source) / TOKENS * (torch.arange(TOKENS) != 4)  # one has no label
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE), weights.to(DEVICE)


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Value and gradients in float64, from the values that the kernel gets."""
    leaves = [hidden.double().requires_grad_(), weight.to(hidden.dtype).double().requires_grad_()]
    loss = (F.cross_entropy(leaves[0] @ leaves[1].t(), labels, reduction="none") * weights.double()).sum()
    return loss, *torch.autograd.grad(loss * 3, leaves)


def found(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = chunked_cross_entropy(*leaves, labels, weights)
    return loss, *torch.autograd.grad(loss * 3, leaves)


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["near", "far apart"])
@pytest.mark.parametrize("vocabulary", [17, 5000])
def test_value_and_gradients_in_float32(vocabulary: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits reach |h| |w| = 12 spread, and float32 rounds them to 2^-24 of that; their exponentials move by as much."""
    monkeypatch.setattr(head, "SLICE_LOGITS", 4 * vocabulary)  # three slices
    given = inputs(vocabulary, torch.float32, spread)
    assert select.fused(given[0])
    for ours, wanted in zip(found(*given), exact(*given), strict=True):
        assert (ours.double() - wanted).abs().max() <= 12 * spread * 2**-22 * wanted.abs().max()


def test_bfloat16_is_as_near_as_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same roundings in the same places as PyTorch's operations; so the same error, but for the order of sums."""
    given = inputs(500, torch.bfloat16)
    wanted = exact(*given)
    ours = found(*given)
    monkeypatch.setattr(select, "TRITON_DEVICES", ())
    for kernel, plain, true in zip(ours, found(*given), wanted, strict=True):
        assert kernel.dtype == plain.dtype
        assert (kernel.double() - true).norm() <= 1.1 * (plain.double() - true).norm() + 1e-6 * true.norm()


def test_only_the_value_leaves_the_logits_alone() -> None:
    hidden, weight, labels, weights = inputs(40, torch.float32)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels, weights)
    torch.testing.assert_close(loss.double(), exact(hidden, weight, labels, weights)[0], rtol=1e-6, atol=0)
    logits = hidden @ weight.t()
    before = logits.clone()
    torch.ops.torchtitan_ext.cross_entropy_(logits, labels, weights, False)
    assert torch.equal(logits, before)


class TwoParts(TPComm):
    """Two ranks, one after the other: collectives return what was found before, by call."""

    def __init__(self, rank: int, rows: int, others: list[Tensor]) -> None:
        self.rank, self.rows, self.seen, self.others = rank, rows, [], list(others)  # type: ignore[var-annotated]

    def _with_other(self, x: Tensor, join) -> Tensor:  # type: ignore[no-untyped-def]
        self.seen.append(x.clone())
        return join(x, self.others.pop(0)) if self.others else x

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return self._with_other(x, torch.add)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._with_other(x, torch.maximum)

    def shard_offset(self, size: int) -> int:  # noqa: ARG002 - the interface
        return self.rank * self.rows


def test_two_ranks_parts_of_the_vocabulary() -> None:
    """Each collective of one rank is given what the other sent; what they send depends on what they got before, so the
    exchange is repeated until it has settled: three collectives of one slice, and the hidden states' gradient."""
    hidden, weight, labels, weights = inputs(40, torch.float32)
    sent: list[list[Tensor]] = [[], []]
    results: list[tuple[Tensor, ...]] = [(), ()]
    for _ in range(6):
        for rank in (0, 1):
            comm = TwoParts(rank, 20, sent[1 - rank])
            leaves = [hidden.clone().requires_grad_(), weight[20 * rank : 20 * rank + 20].clone().requires_grad_()]
            loss = chunked_cross_entropy(*leaves, labels, weights, comm)
            results[rank] = (loss.detach(), *torch.autograd.grad(loss * 3, leaves))
            sent[rank] = comm.seen
    wanted = exact(hidden, weight, labels, weights)
    for rank in (0, 1):
        loss, to_hidden, to_weight = (x.double() for x in results[rank])
        for ours, true in ((loss, wanted[0]), (to_hidden, wanted[1]), (to_weight, wanted[2][20 * rank :][:20])):
            assert (ours - true).abs().max() <= 1e-5 * true.abs().max()


def test_slices_of_a_gpu_are_long() -> None:
    """4,096 tokens and more, and half a GiB of logits where that is more."""
    assert slice_tokens(256_000, torch.bfloat16, on_cpu=False) == 4096
    assert slice_tokens(32_000, torch.bfloat16, on_cpu=False) == (1 << 29) // 64_000
    assert slice_tokens(32_000, torch.float32, on_cpu=True) == (1 << 24) // 32_000
