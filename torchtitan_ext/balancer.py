"""Auxiliary-loss-free load balancing: a bias per expert that affects the top-k choice only, no gate and no loss."""

import torch
from torch import Tensor


@torch.no_grad()
def update_expert_bias(bias: Tensor, counts: Tensor, rate: float, center: bool = False) -> None:
    """`b_e += rate * sign(mean(c) - c_e)`, in place.

    bias: (E,) float32. counts: (E,) assignments of the global batch, summed over ranks and microbatches. center:
    subtract the mean of the bias afterwards. Source: Wang et al. 2408.15664, Algorithm 1.
    """
    counts = counts.to(torch.float64)
    bias += rate * torch.sign(counts.mean() - counts).to(bias.dtype)
    if center:
        bias -= bias.mean()
