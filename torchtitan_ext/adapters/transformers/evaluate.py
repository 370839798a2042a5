"""From what a forward pass left and the token weights to the values of the terms.

T tokens of a micro-batch (B rows of S), N documents of up to M tokens, L MoE layers.
"""

import torch
from torch import Tensor

from torchtitan_ext.adapters.transformers.record import Seen, layer_view, proportional
from torchtitan_ext.adapters.transformers.structure import SCORES
from torchtitan_ext.adapters.transformers.tokens import Documents
from torchtitan_ext.carry import Carry, empty_carry
from torchtitan_ext.terms import Terms, Tokens


def evaluate(
    terms: Terms, layers: list[Seen], given: Tokens, found: Documents | None, score: str
) -> tuple[Tensor, Carry]:
    """The terms by layer (L, terms), and the carry with counts and measures. given: the tokens. found: the order of `given`,
    where it is not the layers'."""
    dtype, device, experts = given.weights.dtype, given.weights.device, layers[0].logits_TE.shape[1]
    sizes = (given.weights.numel(), len(layers), experts, dtype, device)
    carry = empty_carry(
        len(terms.names), *sizes, terms.carried_width(experts), len(terms.measures), terms.sums_width(experts)
    )
    values = []
    for number, seen in enumerate(layers):
        ordered = seen
        if found is not None:
            order = found.tokens.flatten()
            ordered = seen._replace(
                logits_TE=seen.logits_TE[order], topk_ids_TK=seen.topk_ids_TK[order], gates_TK=seen.gates_TK[order]
            )
        view = layer_view(ordered, number, score, given)
        carry = terms.add(view, seen.observed, seen.responses, carry._replace(terms=torch.zeros_like(carry.terms)))
        values.append(carry.terms)
    return torch.stack(values) + terms.totals_by_layer(carry), carry


def sequence_tokens(weights_BS: Tensor, found: Documents | None, step: Tensor) -> Tokens:
    """One row per document, (N, M), for terms that are formed per sequence; the rows of the batch where none is packed."""
    weights = weights_BS if found is None else weights_BS.flatten()[found.tokens] * found.real
    rows, length = weights.shape
    device = weights.device
    return Tokens(weights, torch.arange(rows, device=device), step, torch.arange(length, device=device))


def checked_score(layers: list[Seen], score: str | None, kind: str) -> str:
    """The score function, found if it is None. Raises RuntimeError if the gate weights are not proportional to its scores."""
    fitting = [name for name in SCORES if all(proportional(seen, name) for seen in layers)]
    if score is None and len(fitting) == 1:
        return fitting[0]
    if score is None and fitting:
        raise RuntimeError(f"attach: {kind}: scores may be softmax or sigmoid: call attach with score=")
    if score not in fitting:
        raise RuntimeError(f"attach: {kind}: gate weights are not proportional to {score or 'known'} scores")
    return score
