"""The forms of attention masks that only a GPU is given, against a dense mask."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from titan_moe.model.masks import Pieces, attend, document_blocks, is_dense, lower_right
from titan_moe.parallel.context import pieces, token_indices

BATCH, SEQ, HEADS, KV_HEADS, WIDTH = 2, 48, 4, 2, 8


def heads(count: int, tokens: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, count, tokens, WIDTH, dtype=torch.float64, generator=source)


def dense(q: Tensor, k: Tensor, v: Tensor, mask_BsS: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BsS.unsqueeze(1), enable_gqa=True)


@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (3, 1), (3, 2)])
def test_pieces_of_a_sequence(ranks: int, rank: int) -> None:
    """Values and gradients of the two pieces that a context-parallel rank has. On a GPU `lower_right` is one operation of
    PyTorch's; here it has a dense mask of its own, per piece."""
    indices = token_indices(SEQ, ranks, rank)
    q, k, v = heads(HEADS, SEQ, 0)[:, :, indices], heads(KV_HEADS, SEQ, 1), heads(KV_HEADS, SEQ, 2)
    for x in (q, k, v):
        x.requires_grad_()
    mask = (torch.arange(SEQ) <= indices.unsqueeze(1)).unsqueeze(0)
    found, wanted = attend(q, k, v, pieces(SEQ, ranks, rank)), dense(q, k, v, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    slopes = heads(HEADS, len(indices), 3)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), slopes), torch.autograd.grad(wanted, (q, k, v), slopes), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_document_blocks(ranks: int) -> None:
    """flex_attention on a CPU has values only, no gradients."""
    indices = token_indices(SEQ, ranks, 0)
    ids = torch.tensor([[0] * 7 + [1] * 30 + [2] * 11, [5] * 40 + [6] * 8])
    q, k, v = heads(HEADS, SEQ, 0)[:, :, indices], heads(KV_HEADS, SEQ, 1), heads(KV_HEADS, SEQ, 2)
    mask = (torch.arange(SEQ) <= indices.unsqueeze(1)) & (ids[:, indices].unsqueeze(2) == ids.unsqueeze(1))
    found = attend(q, k, v, document_blocks(indices, ids[:, indices], ids))
    torch.testing.assert_close(found, dense(q, k, v, mask), rtol=1e-12, atol=1e-13)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_on_a_gpu_pieces_make_no_mask() -> None:
    """Traced without a device, the forward pass only: per piece one flash attention, and no tensor of all pairs."""
    with FakeTensorMode():
        q = torch.empty(BATCH, HEADS, SEQ, WIDTH, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(BATCH, KV_HEADS, 2 * SEQ, WIDTH, dtype=torch.bfloat16, device="cuda")
        with Operations() as seen:
            out = attend(q, k, k, Pieces((SEQ // 2, 2 * SEQ)))
    assert out.shape == q.shape
    assert seen.names.count("aten::_scaled_dot_product_flash_attention") == 2
    assert not [name for name in seen.names if "tril" in name or "ones" in name]


def test_where_masks_are_dense() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert is_dense(cpu, torch.bfloat16)
    assert is_dense(gpu, torch.float64)
    assert not is_dense(gpu, torch.bfloat16)


def test_lower_right_of_equal_lengths_is_causal() -> None:
    q, k = heads(HEADS, 6, 0), heads(HEADS, 6, 1)
    torch.testing.assert_close(lower_right(q, k, k), F.scaled_dot_product_attention(q, k, k, is_causal=True))
