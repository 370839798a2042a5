"""Two controls for sp and cp, as regularizers of their own: `extensions.modules = ["titan_moe.analysis.controls"]`.

regularizers.custom.entropy     the entropy of the routing scores: sharpness without any coupling of layers
regularizers.custom.shuffled    sp between experts of different tokens: repulsion without co-activation
"""

import torch
from torch import Tensor

from titan_moe.extend import register_regularizer
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.metrics import token_entropy
from torchtitan_ext.terms import LayerView


def entropy(view: LayerView) -> Tensor:
    """Entropy of each token's routing scores in nats: (T,)."""
    return token_entropy(view.scores_TE)


def shuffled_specialization(view: LayerView) -> Tensor:
    """Squared cosines of each token's expert activations with those of other experts on another token, half a micro-batch
    away; scaled to sp's k(k-1) pairs: (T,). A zero vector has cosine 0 with everything."""
    assert view.z_RF is not None
    z_RF = view.z_RF.to(accumulation_dtype(view.z_RF.dtype))
    lengths_R = z_RF.norm(dim=1, keepdim=True)
    z_RF = z_RF / torch.where(lengths_R > 0, lengths_R, 1.0)
    rows_TK, ids_TK = view.rows_TK, view.topk_ids_TK
    tokens, k = rows_TK.shape
    other_TK, other_ids_TK = rows_TK.roll(tokens // 2, 0), ids_TK.roll(tokens // 2, 0)
    cosines_TKK = z_RF[rows_TK] @ z_RF[other_TK].transpose(1, 2)
    different_TKK = ids_TK.unsqueeze(2) != other_ids_TK.unsqueeze(1)
    pairs_T = different_TKK.sum((1, 2)).clamp(min=1)
    return (cosines_TKK.square() * different_TKK).sum((1, 2)) * (k * (k - 1) / pairs_T)


register_regularizer("entropy", entropy)
register_regularizer("shuffled", shuffled_specialization)
