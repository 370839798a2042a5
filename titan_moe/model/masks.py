"""Which tokens attend to which, and attention for each form in which that is said.

A CPU has a dense mask wherever attention is not simply causal. A GPU never has one: a mask of S x S would be large, and turns
its fast kernels off. There, documents are a block mask for flex_attention, which skips blocks without a pair, and under
context parallelism without documents a rank's two pieces of a sequence are attended to one after the other.

B sequences, s queries and S keys of each (s < S under context parallelism), H query heads, G key-value heads, d head width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


class Pieces(NamedTuple):
    """The queries are two pieces of a sequence, of equal length; a piece attends to all keys up to its own end, causally."""

    ends: tuple[int, int]
    """Number of keys from the start of the sequence to each piece's end."""


Mask: TypeAlias = Any
"""None: causal. A bool tensor (1 or B, s, S): which pairs may attend. `Pieces`, or flex_attention's BlockMask."""


def is_dense(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether masks are tensors of all pairs: on a CPU, and in float64, which a GPU's fast kernels don't have."""
    return device.type != "cuda" or dtype == torch.float64


def make_mask(indices_S: Tensor, document_ids: Tensor | None, dtype: torch.dtype) -> Mask:
    """Causal attention, inside each document if their ids (B, S) are given. indices_S: the tokens' places in their sequence.
    dtype: of the computation."""
    if document_ids is None:
        return None
    if not is_dense(document_ids.device, dtype):
        return document_blocks(indices_S, document_ids, document_ids)
    seq = document_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=document_ids.device).tril()
    return (document_ids.unsqueeze(2) == document_ids.unsqueeze(1)) & causal


def document_blocks(indices_s: Tensor, document_ids_Bs: Tensor, document_ids_BS: Tensor) -> Mask:
    """The block mask of causal attention inside documents. indices_s: the queries' places in their sequence."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - flex_attention's signature
        return (key <= indices_s[query]) & (document_ids_Bs[b, query] == document_ids_BS[b, key])

    batch, queries = document_ids_Bs.shape
    # Compiled, it makes no tensor of all pairs.
    create: Any = _compiled(create_block_mask) if document_ids_Bs.is_cuda else create_block_mask
    return create(allowed, batch, None, queries, document_ids_BS.shape[1], device=document_ids_Bs.device)


def attend(q_BHsd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, mask: Mask) -> Tensor:
    """Scaled dot-product attention: (B, H, s, d)."""
    gqa = q_BHsd.shape[1] != k_BGSd.shape[1]
    if isinstance(mask, Pieces):
        halves = zip(q_BHsd.chunk(2, dim=2), mask.ends, strict=True)
        return torch.cat(
            [lower_right(q, k_BGSd.narrow(2, 0, end), v_BGSd.narrow(2, 0, end)) for q, end in halves], dim=2
        )
    if mask is None or isinstance(mask, Tensor):
        dense = None if mask is None else mask.unsqueeze(1)
        return F.scaled_dot_product_attention(
            q_BHsd, k_BGSd, v_BGSd, attn_mask=dense, is_causal=mask is None, enable_gqa=gqa
        )
    from torch.nn.attention.flex_attention import flex_attention

    # Outside of a compiled block flex_attention is compiled by itself: uncompiled it would form all scores.
    alone = q_BHsd.is_cuda and not torch.compiler.is_compiling()
    flex: Any = _compiled(flex_attention) if alone else flex_attention
    out_BHsd: Tensor = flex(q_BHsd, k_BGSd, v_BGSd, block_mask=mask, enable_gqa=gqa)
    return out_BHsd


def lower_right(q_BHsd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
    """Causal attention of the last s of S tokens: query i attends to keys 0 to S - s + i."""
    queries, keys = q_BHsd.shape[2], k_BGSd.shape[2]
    if q_BHsd.is_cuda and q_BHsd.dtype in (torch.bfloat16, torch.float16) and q_BHsd.shape[3] % 8 == 0:
        # This operation aligns `is_causal` so; scaled_dot_product_attention aligns it to the first keys.
        out_BHsd: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q_BHsd, k_BGSd, v_BGSd, is_causal=True)[0]
        return out_BHsd
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BHsd.device).tril(keys - queries)
    gqa = q_BHsd.shape[1] != k_BGSd.shape[1]
    return F.scaled_dot_product_attention(q_BHsd, k_BGSd, v_BGSd, attn_mask=mask, enable_gqa=gqa)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
