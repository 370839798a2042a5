"""Distributes texts over ranks; with a placement of experts, by the experts that their first router chooses.

A text that is on the rank of most of its experts sends fewer rows to other ranks. Source: Hu et al., appendix F ("bucket
sequences according to early expert decisions").

N texts, R data ranks, E experts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from titan_moe.generate.cache import inference_inputs
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh
from torchtitan_ext.collectives import all_sum

WINDOW = 8
"""Batches whose texts are distributed together. More of them fit better, and differ more in length."""


def assign_texts(gain: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rank of every text, (N,), with the largest total gain, for a gain (N, R) of each text on each rank.

    Ranks get equally many texts, or one more: a transport problem."""
    texts, ranks = gain.shape
    variables = np.arange(texts * ranks)
    one_rank_each = coo_array((np.ones(len(variables)), (variables // ranks, variables)))
    rank_sizes = coo_array((np.ones(len(variables)), (variables % ranks, variables)))
    limits = [
        LinearConstraint(one_rank_each, 1, 1),
        LinearConstraint(rank_sizes, texts // ranks, -(-texts // ranks)),
    ]
    # The constraints are totally unimodular: the optimum of the linear program is integral.
    solution = milp(-gain.reshape(-1).astype(np.float64), constraints=limits, bounds=(0, 1))
    assert solution.x is not None, solution.message
    rank: npt.NDArray[np.int64] = solution.x.reshape(texts, ranks).argmax(1)
    return rank


def own_batches(
    texts: Sequence[Sequence[int]], order: Sequence[int], size: int, mesh: Mesh, by_router: Transformer | None = None
) -> Iterator[list[int]]:
    """The numbers of this rank's texts, batch by batch. Every text is in one batch of one data rank, and all ranks have equally
    many batches, of which the last ones may be empty.

    texts: their tokens. order: the numbers of those to take, in which they are cut into batches. size: texts of a rank in a
    batch. by_router: the model, with its experts placed: texts go to the ranks that hold the experts of their first router,
    among `WINDOW` batches. Then a collective."""
    ranks, whole = mesh.degrees.data, size * mesh.degrees.data
    if by_router is None:
        for start in range(0, len(order), whole):
            yield [*order[start : start + whole]][mesh.data_rank :: ranks]
        return
    for start in range(0, len(order), WINDOW * whole):
        part = order[start : start + WINDOW * whole]
        counts = first_router_counts(by_router, [texts[number] for number in part], size, mesh)
        rank_of = assign_texts(rows_on_rank(counts, mesh))
        own = [number for number, rank in zip(part, rank_of, strict=True) if rank == mesh.data_rank]
        for batch in range(-(-len(part) // whole)):
            yield own[batch * size : (batch + 1) * size]


def rows_on_rank(counts: npt.NDArray[np.int64], mesh: Mesh) -> npt.NDArray[np.int64]:
    """Of the rows (N, E) of texts at experts, how many have their expert on each data rank: (N, R).

    Rank r of `ep` has the r-th block of experts; ranks of `ep` are adjacent data ranks."""
    ep = mesh.degrees.ep
    by_holder = counts.reshape(len(counts), ep, -1).sum(2)
    return by_holder[:, np.arange(mesh.degrees.data) % ep]


@torch.no_grad()
def first_router_counts(
    model: Transformer, texts: Sequence[Sequence[int]], size: int, mesh: Mesh
) -> npt.NDArray[np.int64]:
    """How often the first router chooses each expert in each text, (N, E). A collective: the ranks share the texts."""
    ranks, experts = mesh.degrees.data, model.settings.moe.experts
    counts_NE = torch.zeros(len(texts), experts, dtype=torch.int64, device=mesh.device)
    for start in range(0, len(texts), size * ranks):
        numbers = [*range(len(texts))][start : start + size * ranks][mesh.data_rank :: ranks]
        tokens_BS, exists_BS = padded([texts[number] for number in numbers], mesh.degrees.tp)
        batch, longest = tokens_BS.shape
        inputs = inference_inputs(
            tokens_BS.to(mesh.device), torch.arange(longest, device=mesh.device).expand(batch, -1)
        )
        chosen_BX = model.first_choices(inputs).reshape(batch, -1)
        is_token_BX = exists_BS.to(mesh.device).repeat_interleave(chosen_BX.shape[1] // longest, 1)
        counts_BE = counts_NE.new_zeros(batch, experts).scatter_add(1, chosen_BX, is_token_BX.to(torch.int64))
        counts_NE[numbers] = counts_BE[: len(numbers)]
    counts: npt.NDArray[np.int64] = all_sum(counts_NE, mesh.ranks.data).cpu().numpy()
    return counts


def padded(texts: Sequence[Sequence[int]], multiple: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, S), and which of them are no padding. S is a multiple of `multiple`. Without texts, as on a rank that has none
    left: a row of padding, because the others wait in the model's collectives."""
    longest = -(-max(map(len, texts), default=1) // multiple) * multiple
    tokens_BS = torch.zeros(max(len(texts), 1), longest, dtype=torch.int64)
    exists_BS = torch.zeros(tokens_BS.shape, dtype=torch.bool)
    for row, ids in enumerate(texts):
        tokens_BS[row, : len(ids)] = torch.tensor(ids)
        exists_BS[row, : len(ids)] = True
    return tokens_BS, exists_BS
