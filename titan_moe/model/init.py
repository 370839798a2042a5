"""Initial weights, the same on any layout: every parameter, and every expert of one, is drawn from a generator of its own,
keyed by (seed, global name, expert) and on the CPU. Large ones are drawn in tiles of 64 x 512 values, each with a generator
of its own, and a rank draws only the tiles that it keeps values of: the more ranks, the less each draws.

Matrices are normal with variance 1 / fan-in, cut off at three deviations, so that a layer's outputs start near unit scale
at any width (the router's logits too: a small constant would leave the routing of a narrow model uniform). What adds to the
residual stream is divided by sqrt(2 * layers), as in GPT-2. The embedding has variance 1 / D: tied, it makes logits of
unit scale. Norms start at 1, biases at 0.
"""

import hashlib
import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_moe.model.transformer import Transformer

# An expert, or a matrix beside the experts, of more values than this is drawn in tiles. A rank may keep a part of every
# expert, but of few matrices.
EXPERT_VALUES, MATRIX_VALUES = 1 << 18, 1 << 20
TILE = (64, 512)

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
                    key = f"{seed}/{name}/{expert}"
                    part.copy_(draw_part(key, parameter.shape[1:], std, corner, part.shape, EXPERT_VALUES))
            else:
                key = f"{seed}/{name}/0"
                own.copy_(draw_part(key, parameter.shape, std, (first, *corner), own.shape, MATRIX_VALUES))
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


def draw_part(
    key: str, shape: Sequence[int], std: float, corner: Sequence[int], size: Sequence[int], limit: int = EXPERT_VALUES
) -> Tensor:
    """The values of a tensor of this shape (at least two dimensions) that begin at index `corner` and have the shape `size`.

    A truncated normal in float32, which depends on key, shape and std alone. limit: up to as many values are drawn at once,
    more in tiles of the last two dimensions, of which only those that have some of the part are drawn."""
    part = torch.empty(tuple(size), dtype=torch.float32)
    if not part.numel():
        return part
    tile = shape if math.prod(shape) <= limit else (*[1] * (len(shape) - 2), *TILE)
    tiles = (range(first // t, -(-(first + n) // t)) for first, n, t in zip(corner, size, tile, strict=True))
    for index in product(*tiles):
        start = [i * t for i, t in zip(index, tile, strict=True)]
        extent = [min(t, n - s) for t, n, s in zip(tile, shape, start, strict=True)]
        values = draw(key if tile is shape else f"{key}/{'.'.join(map(str, index))}", extent, std)
        to, source = [], []
        for first, n, s, e in zip(corner, size, start, extent, strict=True):
            low, high = max(first, s), min(first + n, s + e)
            to.append(slice(low - first, high - first))
            source.append(slice(low - s, high - s))
        part[tuple(to)] = values[tuple(source)]
    return part


def draw(key: str, shape: Sequence[int], std: float) -> Tensor:
    """A truncated normal in float32, from the key's own generator."""
    values = torch.empty(tuple(shape), dtype=torch.float32)
    torch.nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=keyed_generator(key))
    return values
