"""Initial weights, the same on any layout: every parameter, and every expert of one, is drawn from a generator of its own,
keyed by (seed, global name, expert) and on the CPU, so that a rank draws only its share.

Matrices are normal with variance 1 / fan-in, cut off at three deviations, so that a layer's outputs start near unit scale
at any width (the router's logits too: a small constant would leave the routing of a narrow model uniform). What adds to the
residual stream is divided by sqrt(2 * layers), as in GPT-2. The embedding has variance 1 / D: tied, it makes logits of
unit scale. Norms start at 1, biases at 0.
"""

import hashlib
import math
from operator import add

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_moe.model.transformer import Transformer

RESIDUAL_OUTPUTS = ("attention.wo.weight", "feed_forward.down.weight", "shared.down.weight", "experts.down")


def init_weights(model: Transformer, seed: int) -> None:
    """Fills every parameter and buffer, in place."""
    depth_scale = 1.0 / math.sqrt(2.0 * model.settings.layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            std = parameter.shape[-1] ** -0.5
            if name.endswith(RESIDUAL_OUTPUTS):
                std *= depth_scale
            own, (first, *corner) = local_part(parameter)
            if ".experts." in name:
                for expert, part in enumerate(own, start=first):
                    whole = draw(f"{seed}/{name}/{expert}", parameter.shape[1:], std)
                    part.copy_(whole[tuple(map(slice, corner, map(add, corner, part.shape)))])
            elif own.numel():
                whole = draw(f"{seed}/{name}/0", parameter.shape, std)
                own.copy_(whole[tuple(map(slice, (first, *corner), map(add, (first, *corner), own.shape)))])
        for moe in model.moe_modules():
            moe.router.expert_bias.zero_()


def local_part(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this rank holds of a parameter, and where its first element stands in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offset)


def keyed_generator(key: str) -> torch.Generator:
    """A CPU generator whose state depends on the key alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def draw(key: str, shape: torch.Size, std: float) -> Tensor:
    """A truncated normal in float32, from the key's own generator."""
    values = torch.empty(shape, dtype=torch.float32)
    torch.nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=keyed_generator(key))
    return values
