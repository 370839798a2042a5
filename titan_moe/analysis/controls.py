"""Two control experiments for sp and cp, as loss terms: `extensions.modules = ["titan_moe.analysis.controls"]`.

regularizers.entropy.weight     entropy of the routing scores: sharpens routing as cp does, without coupling layers
regularizers.shuffled.weight    sp between experts of different tokens: pushes experts apart, co-activated or not
"""

import torch
from torch import Tensor

from titan_moe.extend import LayerView, Needs, Term, register
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.metrics import token_entropy
from torchtitan_ext.ops.gram import row_scales, squares_limit
from torchtitan_ext.ops.routing import weighted_sum


@register
class Entropy(Term):
    """Mean entropy of the routing scores in nats."""

    name = "entropy"
    title = "routing entropy (control)"

    def value(self, view: LayerView) -> Tensor:
        return weighted_sum(token_entropy(view.scores_TE), view.weights_T)


@register
class ShuffledSpecialization(Term):
    """Squared cosines between a token's expert activations and those of the token half a microbatch later.

    Only pairs of different experts count; their mean is multiplied by k(k-1), sp's number of pairs. A zero vector has
    cosine 0 with every other."""

    name = "shuffled"
    title = "sp of shuffled tokens (control)"
    needs = Needs(activations=True)

    def value(self, view: LayerView) -> Tensor:
        assert view.z_RF is not None
        z_RF = view.z_RF.to(accumulation_dtype(view.z_RF.dtype))
        z_RF = z_RF * row_scales(z_RF, squares_limit(z_RF.dtype) ** 0.5).unsqueeze(1)
        norms_R = z_RF.norm(dim=1, keepdim=True)
        z_RF = z_RF / torch.where(norms_R > 0, norms_R, 1.0)
        rows_TK, ids_TK = view.rows_TK, view.topk_ids_TK
        tokens, k = rows_TK.shape
        other_TK, other_ids_TK = rows_TK.roll(tokens // 2, 0), ids_TK.roll(tokens // 2, 0)
        cosines_TKK = z_RF[rows_TK] @ z_RF[other_TK].transpose(1, 2)
        different_TKK = ids_TK.unsqueeze(2) != other_ids_TK.unsqueeze(1)
        pairs_T = different_TKK.sum((1, 2)).clamp(min=1)
        values_T = (cosines_TKK.square() * different_TKK).sum((1, 2)) * (k * (k - 1) / pairs_T)
        return weighted_sum(values_T, view.weights_T)
