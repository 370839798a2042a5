"""Permutes the experts of MoE layers, which does not change the network's outputs."""

import json
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from titan_moe.errors import UserError
from titan_moe.model.gemm import full
from titan_moe.model.init import local_part
from titan_moe.model.transformer import Transformer
from titan_moe.runtime.files import read_file, write_file

FORMAT = 1
Order = npt.NDArray[np.int64]


@torch.no_grad()
def permute_experts(model: Transformer, order: Order) -> None:
    """Moves expert `order[layer, e]` of every MoE layer to index e, in place: router rows, weights and balancing bias.

    order: (L, E). A collective when experts are sharded; each rank temporarily holds the full experts of one layer."""
    for moe in model.moe_modules():
        indices = torch.from_numpy(order[moe.layer])
        for parameter in (moe.router.weight, *moe.experts.parameters()):
            reorder(parameter, indices)
        moe.router.expert_bias.copy_(moe.router.expert_bias[indices.to(moe.router.expert_bias.device)])


def reorder(parameter: Tensor, indices: Tensor) -> None:
    """Permutes dimension 0 of a (sharded) parameter: new row i is old row indices[i]."""
    all_rows = full(parameter)
    shard, offset = local_part(parameter)
    rows = indices.to(all_rows.device)[offset[0] : offset[0] + shard.shape[0]]
    rest = tuple(map(slice, offset[1:], map(add, offset[1:], shard.shape[1:])))
    shard.copy_(all_rows[rows][(slice(None), *rest)].clone())


def write_order(path: Path, order: Order, **facts: Any) -> None:
    """Writes the JSON file that `checkpoint.expert_order` and `--placement` name. facts: further keys; `ranks` among them:
    the ranks that the order was made for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps({"format": FORMAT, **facts, "order": order.tolist()}))


def read_order(
    path: Path, layers: int, experts: int, origin: str = "checkpoint.expert_order", ranks: int | None = None
) -> Order:
    """The order (L, E) from a file. origin: the option that named it, for messages. ranks: over which the experts will be
    spread. Raises UserError when it is not such a file, of another model, or made for another number of ranks."""
    try:
        raw = json.loads(read_file(path))
        order = np.array(raw["order"], dtype=np.int64)
        right_format, made_for = raw["format"] == FORMAT, raw.get("ranks")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{origin}: {path}: not an order of experts: {error}") from error
    if not right_format or order.shape != (layers, experts) or (np.sort(order, axis=1) != np.arange(experts)).any():
        raise UserError(f"{origin}: {path}: not an order of {experts} experts in {layers} layers")
    if ranks is not None and isinstance(made_for, int) and made_for != ranks:
        raise UserError(
            f"{origin}: {path}: made for {made_for} ranks, and parallelism.ep is {ranks}; run `titan-moe place --ranks {ranks}`"
        )
    return order
