"""Experts under other numbers: the same network."""

import json
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from titan_moe.errors import UserError
from titan_moe.model.gemm import whole
from titan_moe.model.init import local_part
from titan_moe.model.transformer import Transformer

FORMAT = 1
Order = npt.NDArray[np.int64]


@torch.no_grad()
def permute_experts(model: Transformer, order: Order) -> None:
    """Gives expert `order[layer, e]` of every MoE layer the number e: router rows, weights and balancing bias, in place.

    order: (L, E). Collective where experts are on several ranks; one layer's experts are whole on each for a moment."""
    for moe in model.moe_modules():
        numbers = torch.from_numpy(order[moe.layer])
        for parameter in (moe.router.weight, *moe.experts.parameters()):
            reorder(parameter, numbers)
        moe.router.expert_bias.copy_(moe.router.expert_bias[numbers.to(moe.router.expert_bias.device)])


def reorder(parameter: Tensor, numbers: Tensor) -> None:
    """The rows of a (sharded) parameter in another order."""
    everything = whole(parameter)
    own, corner = local_part(parameter)
    rows = numbers.to(everything.device)[corner[0] : corner[0] + own.shape[0]]
    rest = tuple(slice(start, end) for start, end in zip(corner[1:], map(add, corner[1:], own.shape[1:]), strict=True))
    own.copy_(everything[rows][(slice(None), *rest)].clone())


def write_order(path: Path, order: Order, **facts: Any) -> None:
    """A mapping that `checkpoint.expert_order` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, **facts, "order": order.tolist()}), encoding="utf-8")


def read_order(path: Path, layers: int, experts: int) -> Order:
    """Raises UserError for a file that is none, or of another model."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        order = np.array(raw["order"], dtype=np.int64)
        known = raw["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"checkpoint.expert_order: {path}: not an order of experts: {error}") from error
    if not known or order.shape != (layers, experts) or (np.sort(order, axis=1) != np.arange(experts)).any():
        raise UserError(f"checkpoint.expert_order: {path}: not an order of {experts} experts in {layers} layers")
    return order
