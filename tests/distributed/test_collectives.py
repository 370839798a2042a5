"""The collectives with a gradient, and what experts and attention make of them, against one process."""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.ranks import launch
from titan_moe.parallel.context import Context, token_indices
from titan_moe.parallel.experts import AllToAll
from torchtitan_ext.collectives import all_sum, exchange, gather_columns

TOKENS, EXPERTS, WIDTH = 5, 6, 3


def group() -> dist.ProcessGroup:
    found = dist.group.WORLD
    assert found is not None
    return found


def tokens_of(rank: int) -> tuple[Tensor, Tensor]:
    """Rank 0's tokens all go to expert 5, and nobody's to expert 0; rank 1 has none at all."""
    source = torch.Generator().manual_seed(rank)
    x = torch.randn(0 if rank == 1 else TOKENS, WIDTH, dtype=torch.float64, generator=source)
    ids = torch.rand(len(x), EXPERTS - 2, generator=source).topk(2).indices + 1
    if rank == 0:
        ids[:, 0] = 5
    return x, ids


def through_experts() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with gate weights 1/2 go to experts that multiply by their number plus 1, and back. Returns the errors of the
    output, of the gradients of tokens and gates for a sum of squares, and the number of rows here."""
    dispatcher = AllToAll(group())
    x, ids = tokens_of(dist.get_rank())
    x.requires_grad_()
    gates = torch.full(ids.shape, 0.5, dtype=torch.float64, requires_grad=True)
    routed = dispatcher.dispatch(x, ids, gates, EXPERTS)
    own = EXPERTS // group().size()
    starts = [0, *routed.offsets_E.tolist()]
    factors = [torch.full((b - a, 1), dist.get_rank() * own + e + 1.0) for e, (a, b) in enumerate(pairwise(starts))]
    assert len(routed.x_RD) == starts[-1]
    out = dispatcher.combine(routed.x_RD * torch.cat(factors).double(), routed)
    out.square().sum().backward()
    assert x.grad is not None
    assert gates.grad is not None
    weight = 0.5 * (ids + 1.0).sum(1, keepdim=True)
    wanted = x.detach() * weight
    gates_wanted = 2 * (ids + 1.0) * (wanted * x.detach()).sum(1, keepdim=True)
    errors = torch.cat([(x.grad - 2 * wanted * weight).flatten(), (gates.grad - gates_wanted).flatten()])
    return out.detach() - wanted, errors, torch.tensor(len(routed.x_RD))


def test_uneven_routes_with_an_empty_rank_and_an_empty_expert() -> None:
    results = launch(3, through_experts)
    for error, gradient_error, _ in results:
        assert not error.numel() or error.abs().max() < 1e-13
        assert not gradient_error.numel() or gradient_error.abs().max() < 1e-12
    assert sum(int(rows) for _, _, rows in results) == 2 * 2 * TOKENS


def columns_and_sums() -> None:
    rank = dist.get_rank()
    x = torch.full((2, 3), float(rank), dtype=torch.float64, requires_grad=True)
    gathered = gather_columns(x, group())
    assert gathered.tolist() == [[0.0] * 3 + [1.0] * 3] * 2
    (gathered * (rank + 1.0)).sum().backward()  # J = sum over ranks, so a column's gradient is 1 + 2
    assert x.grad is not None
    assert x.grad.tolist() == [[3.0] * 3] * 2
    assert all_sum(torch.tensor([1, rank]), group()).tolist() == [2, 1]
    sent = torch.arange(3.0, requires_grad=True)
    got = exchange(sent, [1, 2], [1, 1] if rank == 0 else [2, 2], group())
    assert got.tolist() == ([0.0, 0.0] if rank == 0 else [1.0, 2.0, 1.0, 2.0])
    (got * (rank + 1.0)).sum().backward()
    assert sent.grad is not None
    assert sent.grad.tolist() == [1.0, 2.0, 2.0]


def test_gathering_summing_and_exchanging() -> None:
    launch(2, columns_and_sums)


def gathered_sequence() -> None:
    ranks, rank, seq = group().size(), dist.get_rank(), 8
    mine = token_indices(seq, ranks, rank)
    context = Context(group())
    x = mine.double().reshape(1, -1, 1).requires_grad_()
    whole = context.gather(x)
    assert whole.flatten().tolist() == list(range(seq))
    (whole.flatten() * torch.arange(seq) * (rank + 1.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [3.0 * place for place in mine.tolist()]
    mask = context.mask(mine, None)
    assert torch.equal(mask[0], torch.ones(seq, seq, dtype=torch.bool).tril()[mine])
    documents = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    same = documents.unsqueeze(1) == documents
    assert torch.equal(context.mask(mine, documents[mine].unsqueeze(0))[0], mask[0] & same[mine])


def test_a_sequence_in_parts() -> None:
    assert torch.cat([token_indices(12, 3, rank) for rank in range(3)]).sort().values.tolist() == list(range(12))
    launch(2, gathered_sequence)
