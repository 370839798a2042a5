"""Generation on ranks that share the texts: each data rank continues its own, and all ranks have all texts in the end."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from titan_moe.generate.buckets import own_batches
from titan_moe.generate.load import Loaded
from titan_moe.generate.loop import Options, Piece, complete
from titan_moe.generate.sampling import earlier_equal
from titan_moe.parallel.mesh import Mesh
from torchtitan_ext.collectives import all_sum


def complete_on_ranks(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    options: Options,
    size: int,
    progress: Callable[[], None] = lambda: None,
) -> list[str]:
    """The new part of each text, on all ranks. A collective that all ranks call with the same prompts.

    prompts: tokens. size: texts of a rank in a batch. progress: called before every batch. With placed experts, texts go to the
    ranks of their first router's experts."""

    def on_any_rank(here: bool) -> bool:
        return bool(all_sum(torch.tensor(int(here), device=loaded.mesh.device), loaded.mesh.everyone))

    texts, equal_before = [""] * len(prompts), earlier_equal(prompts)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for numbers in own_batches(prompts, order, size, loaded.mesh, loaded.model if loaded.placed else None):
        progress()
        rows = [prompts[number] for number in numbers]
        before = [equal_before[number] for number in numbers]
        made = complete(loaded.model, loaded.tokenizer, rows, options, on_any_rank, before)
        for number, text in zip(numbers, made, strict=True):
            texts[number] = text
    return of_all_ranks(texts, loaded.mesh)


def shared_pieces(loaded: Loaded, prompts: Sequence[Sequence[int]], options: Options) -> Iterator[Piece]:
    """The texts of `complete_on_ranks`, whole, in the order of the prompts; each rank has one batch."""
    size = -(-len(prompts) // loaded.mesh.degrees.data)
    texts = complete_on_ranks(loaded, prompts, options, size)
    return (Piece(number, text, 0, "whole") for number, text in enumerate(texts))


def of_all_ranks(texts: list[str], mesh: Mesh) -> list[str]:
    """The texts of all ranks, of which each has made some and left the others empty; a collective."""
    if mesh.everyone is None:
        return texts
    everyone: list[list[str]] = [[]] * mesh.degrees.world
    dist.all_gather_object(everyone, texts, group=mesh.everyone)
    return [next(filter(None, same), "") for same in zip(*everyone, strict=True)]
