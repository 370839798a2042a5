"""How FSDP shards experts, what each rank draws of the initial weights, and that neither changes a result."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.layouts import assert_equal
from tests.helpers.ranks import SharedRanks, launch
from tests.helpers.steps import VOCABULARY, Outcome, config_of, mesh_of, train, whole
from titan_moe.model import init
from titan_moe.parallel import fsdp
from titan_moe.train.build import build_model

# name -> (ranks, layout, options of the model, dimension that FSDP shards of gate and up (E, 2, F, D) and of down (E, D, F))
LAYOUTS = {
    "whole experts": (4, [], [], 0, 0),
    "whole experts beside ep": (4, ["--parallelism.ep=2"], [], 0, 0),
    "hidden units": (4, [], ["--model.moe.experts=6"], 2, 1),
    "hidden units beside ep": (4, ["--parallelism.ep=2"], ["--model.moe.experts=6"], 2, 1),
    "hidden units beside tp": (4, ["--parallelism.tp=2"], ["--model.moe.experts=7"], 2, 1),
    "model width": (4, [], ["--model.moe.experts=6", "--model.moe.hidden_dim=6"], 3, 1),
    "none": (
        4,
        [],
        ["--model.moe.experts=6", "--model.moe.hidden_dim=6", "--model.dim=14", "--model.head_dim=8"],
        0,
        0,
    ),
}
SCOPE = "--regularizers.lb.scope=sequence"


def dimensions(words: list[str], world: int) -> list[int]:
    """Of the first layer's two weights; FSDP's mesh dimension is the first one."""
    config = config_of(words, world)
    experts: Any = build_model(config, VOCABULARY, mesh_of(config, world)).moe_modules()[0].experts
    return [experts.gate_up.placements[0].dim, experts.down.placements[0].dim]


@pytest.mark.parametrize("name", LAYOUTS)
def test_dimension_and_result(name: str) -> None:
    """Two steps with all seven terms are those of one process."""
    world, layout, model, gate_up, down = LAYOUTS[name]
    words = [*layout, *model]
    ranks = SharedRanks(world, {"dimensions": (dimensions, words, world), "steps": (train, [*words, SCOPE], world, 2)})
    assert ranks["dimensions"][0] == [gate_up, down]
    wanted = train([*model, SCOPE], 1, 2)
    for found in ranks["steps"]:
        assert_equal(found, wanted)


def save_sharded_along_width(words: list[str], world: int, folder: Path) -> Outcome:
    """Two steps and a checkpoint, with experts sharded as in earlier versions: along the model's width."""

    def along_width(experts: Any, _: int) -> dict[Any, int]:
        return {experts.gate_up: 3, experts.down: 1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "expert_dimensions", along_width)
        return train(words, world, 2, save_to=folder)


def test_a_checkpoint_of_other_shards_goes_on(tmp_path: Path) -> None:
    """Step 3 from a checkpoint whose experts were sharded along the width equals step 3 of one process."""
    words = ["--model.moe.experts=6", SCOPE]
    launch(2, save_sharded_along_width, words, 2, tmp_path)
    wanted = train(words, 1, 3)
    wanted = wanted._replace(rows=wanted.rows[2:], counts=wanted.counts[2:], routing=wanted.routing[2:])
    for found in launch(4, train, words, 4, 3, 3, tmp_path):
        assert_equal(found, wanted)


def initial(words: list[str], world: int) -> tuple[dict[str, torch.Tensor], int]:
    """The initial weights with tiles so small that every matrix has many, and how many values this rank drew."""
    config, drawn = config_of(words, world), 0

    def counting(key: str, shape: Any, std: float) -> torch.Tensor:
        nonlocal drawn
        values = draw(key, shape, std)
        drawn += values.numel()
        return values

    draw = init.draw
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"EXPERT_VALUES": 64, "MATRIX_VALUES": 64, "TILE": (2, 4), "draw": counting}.items():
            patch.setattr(init, name, value)
        model = build_model(config, VOCABULARY, mesh_of(config, world))
    return {name: whole(p) for name, p in model.named_parameters()}, drawn


@pytest.mark.parametrize(
    "layout",
    [
        ["--model.moe.experts=6"],
        ["--parallelism.ep=2", "--model.moe.experts=6"],
        ["--parallelism.tp=2"],
        ["--parallelism.pp=2", "--training.microbatch_size=2", "--model.tie_embeddings=false"],
    ],
    ids=["fsdp", "ep", "tp", "pp"],
)
def test_initial_weights_on_ranks_are_those_of_one_process_and_each_draws_its_part(layout: list[str]) -> None:
    """Bitwise. A rank draws also routers in full, and tiles that it shares with another rank."""
    model = [word for word in layout if word.startswith("--model")]
    wanted, all_values = initial([*model, "--model.layers=4"], 1)
    results = launch(4, initial, [*layout, "--model.layers=4"], 4)
    for found, drawn in results:
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
        assert drawn < 0.45 * all_values
    assert set().union(*(found for found, _ in results)) == wanted.keys()


@pytest.mark.parametrize("shape", [(2, 5, 9), (7, 9)])
def test_a_part_is_that_of_the_whole(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of a tensor drawn in tiles; tiles do not repeat; and a small tensor is one draw, as in earlier versions."""
    monkeypatch.setattr(init, "TILE", (2, 4))
    corner = [0] * len(shape)
    tensor = init.draw_part("key", shape, 0.1, corner, shape, 10)
    assert tensor.unique().numel() == tensor.numel()
    for last in range(1, shape[-1]):
        first = [1] * (len(shape) - 1) + [last - 1]
        size = [n - 1 for n in shape[:-1]] + [shape[-1] - last]
        part = init.draw_part("key", shape, 0.1, first, size, 10)
        assert torch.equal(part, tensor[tuple(slice(f, f + n) for f, n in zip(first, size, strict=True))])
    assert torch.equal(init.draw_part("key", shape, 0.1, corner, shape), init.draw("key", shape, 0.1))
