"""What the losses send: the formulas of docs/parallelism.md, counted by wrapping the collectives."""

import functools

import pytest

from tests.helpers.counting import counted
from tests.helpers.ranks import launch, launch_each
from tests.helpers.steps import BATCH, SEQ, VOCABULARY, batch_of, config_of, mesh_of, rank_part, train
from titan_moe.optim import build_optimizer
from titan_moe.parallel.parallelize import build_runner
from titan_moe.train.build import build_model
from titan_moe.train.step import train_step

OFF = [f"--regularizers.{name}.weight=0" for name in ("z", "sp", "cp", "o", "v", "erc")]
WORLD, LAYERS, TOP_K, HIDDEN, DIM = 2, 3, 3, 8, 16
ROWS = BATCH * SEQ // WORLD * TOP_K


def bytes_sent(words: list[str]) -> dict[str, int]:
    """Bytes that this rank hands to each collective in one training step."""
    config = config_of([*OFF, "--parallelism.ep=2", *words], WORLD)
    mesh = mesh_of(config, WORLD)
    model = build_model(config, VOCABULARY, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    with counted() as sent:
        train_step(
            build_runner(model, config, mesh), optimizer, rank_part(batch_of(1), config, mesh), config, mesh, 1, {}
        )
    return sent


@functools.cache
def sent_without_terms() -> list[dict[str, int]]:
    return launch(WORLD, bytes_sent, [])


def extra(words: list[str]) -> dict[str, int]:
    """What one step sends with these words beyond one without, mean over ranks: what leaves one for an expert comes home from
    another, so only together do they send as many rows there as back."""
    plain, more = sent_without_terms(), launch(WORLD, bytes_sent, words)
    return {name: sum(b[name] - a[name] for a, b in zip(plain, more, strict=True)) // WORLD for name in plain[0]}


def test_exact_sp_sends_every_activation_home_and_its_gradient_back() -> None:
    found = extra(["--regularizers.sp.weight=0.1"])
    assert found["all-to-all"] == LAYERS * 2 * ROWS * HIDDEN * 8
    assert found["all-reduce"] == (1 + LAYERS) * 8  # the step's sum has the term, and the overlap of each layer


def test_sketches_send_their_numbers_a_length_and_a_key() -> None:
    words = ["--regularizers.sp.weight=0.1", "--regularizers.sp.method=sketch", "--regularizers.sp.sketch_dim=4"]
    assert extra(words)["all-to-all"] == LAYERS * ROWS * (2 * (4 * 8 + 8) + 4)


def test_sketches_at_medium_are_less_than_15_percent_of_combine() -> None:
    dim, sketch_dim, bfloat16, float32, key = 512, 64, 2, 4, 4
    combine = 2 * dim * bfloat16  # a row of y, and its gradient
    assert (2 * (sketch_dim * bfloat16 + float32) + key) / combine < 0.15


@pytest.mark.parametrize("source", ["all", "activated"])
def test_cp_sends_nothing(source: str) -> None:
    found = extra(["--regularizers.cp.weight=0.1", f"--regularizers.cp.source={source}"])
    assert found["all-to-all"] == 0
    assert found["all-reduce"] == 8


def test_a_sample_sends_the_rows_of_its_tokens_and_a_mask() -> None:
    words = ["--regularizers.sp.weight=0.1", "--regularizers.sp.method=sample", "--regularizers.sp.sample_fraction=0.4"]
    mask = LAYERS * (ROWS + 8 * 8)  # a byte per row, and the number of wanted rows of each expert
    rows = extra(words)["all-to-all"] - mask
    assert rows % (HIDDEN * 8) == 0
    assert 0.2 * LAYERS * 2 * ROWS < rows / (HIDDEN * 8) < 0.6 * LAYERS * 2 * ROWS


def test_what_the_plain_layer_sends() -> None:
    """Rows to the experts and back, forward and backward; a gate weight with each row; and the counts, 8 experts in int64."""
    total = sum(found["all-to-all"] for found in sent_without_terms())
    assert total == WORLD * LAYERS * (4 * ROWS * DIM * 8 + 2 * ROWS * 8 + 8 * 8)


@pytest.mark.parametrize(("mode", "trips"), [("selective", 1), ("full", 2)])
def test_recomputation_sends_rows_again_only_if_all_is_recomputed(mode: str, trips: int) -> None:
    """The counts are sent again in both modes."""
    found = launch(WORLD, bytes_sent, [f"--activation_checkpoint.mode={mode}"])
    rows = 2 * (trips + 1) * ROWS * DIM * 8 + (trips + 1) * ROWS * 8
    assert sum(one["all-to-all"] for one in found) == WORLD * LAYERS * (rows + 2 * 8 * 8)


def test_bfloat16_on_ranks() -> None:
    """bfloat16 travels as such. One rounding is 2^-9 relative; through three layers a loss of order log V moves by well under
    1%, as in the test of bfloat16 against float32 on one process."""
    words = ["--training.dtype=bfloat16", *OFF, "--regularizers.sp.weight=0.1"]
    alone = train(words, 1, 2)
    layouts = ("--parallelism.ep=2", "--parallelism.tp=2", "--parallelism.cp=2")
    for found, *_ in launch_each(WORLD, train, *(([*words, layout], WORLD, 2) for layout in layouts)):
        for row, wanted in zip(found.rows, alone.rows, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-2)
            assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=5e-2)
