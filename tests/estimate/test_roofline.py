"""`titan-moe plan --card`: the predicted time of a step, against totals by hand for a tiny model."""

import pytest

from tests.helpers.commands import titan_moe
from tests.helpers.ranks import launch
from titan_moe.config.degrees import resolve
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from titan_moe.estimate.plan import sharded_model
from titan_moe.estimate.roofline import StepTime, step_time, wire_bytes
from titan_moe.estimate.traffic import numbers
from titan_moe.runtime.cards import CARDS, Card, card_named, find_card

CARD = Card(bfloat16=1e9, memory=1e9, link=1e6, network=1e3)
TINY = [
    "--model.vocab_size=32",
    "--model.dim=16",
    "--model.layers=2",
    "--model.heads=2",
    "--model.moe.experts=4",
    "--model.moe.top_k=2",
    "--model.moe.hidden_dim=8",
    "--training.batch_size=2",
    "--training.seq_len=8",
    "--training.dtype=bfloat16",
]
# By hand. 16 tokens, 32 rows. A block: norms 2 x 16, attention 4 x 16 x 16, router 4 x 16, experts 4 x 3 x 8 x 16.
EXPERTS = 2 * 4 * 3 * 8 * 16
ROUTERS = 2 * 4 * 16
ROOT = 32 * 16 + 16
PARAMETERS = ROOT + 2 * (2 * 16 + 4 * 16 * 16) + ROUTERS + EXPERTS
NORMS = 2 * 2 * 16 + 16
# 6 per active parameter of a product (half of the experts), and attention over 8 tokens, 6 x 8 x 16 in each of two layers.
FLOPS = 16 * (6 * (PARAMETERS - EXPERTS // 2 - NORMS) + 2 * 6 * 8 * 16)
LAYER = (8 * 32 * 8 + 6 * 32 * 16) * 2  # SwiGLU, then gather and combine; bfloat16
BLOCK = (16 * 16 * 16 + 20 * 16 * 16) * 2  # norms and residual additions, then attention
HEAD = 4 * 16 * 32 * 4  # logits in float32


def prediction(words: list[str], world: int, card: Card = CARD) -> StepTime:
    config, degrees, model = planned(words, world)
    return step_time(model, config, degrees, card)


def planned(words: list[str], world: int):  # type: ignore[no-untyped-def]
    config: Config = load_config(None, [*TINY, *words], world_size=world)
    degrees = resolve(config.parallelism, world, str)
    return config, degrees, sharded_model(config, degrees)


def test_products_and_memory_of_one_process() -> None:
    time = prediction([], 1)
    assert time.products == pytest.approx(FLOPS / 1e9)
    assert time.memory == pytest.approx((2 * (LAYER + BLOCK) + HEAD + 10 * PARAMETERS * 4) / 1e9)
    assert (time.node, time.network, time.bubble) == (0, 0, 0)
    assert time.hidden == time.exposed == pytest.approx(time.products + time.memory)


def test_products_are_bound_by_reading_weights_where_memory_is_slow() -> None:
    """Read once forward and twice backward in bfloat16, and the gradient written in float32."""
    slow = CARD._replace(memory=1e3)
    assert prediction([], 1, slow).products == pytest.approx(PARAMETERS * (3 * 2 + 4) / 1e3)


def test_recomputation_and_microbatches() -> None:
    full = ["--activation_checkpoint.mode=full"]
    assert prediction(full, 1).products == pytest.approx(4 / 3 * FLOPS / 1e9)
    memory = (1.5 * 2 * (LAYER + BLOCK) + HEAD + 10 * PARAMETERS * 4) / 1e9
    assert prediction(full, 1).memory == pytest.approx(memory)
    assert prediction(["--training.microbatch_size=1"], 1).memory == pytest.approx(prediction([], 1).memory)


def two_ranks() -> tuple[StepTime, float]:
    config, degrees, model = planned([], 2)
    (report,) = numbers(model, config, degrees)
    return step_time(model, config, degrees, CARD), wire_bytes("all-reduce", report.bytes, 2)


@pytest.mark.slow
def test_fsdp_on_two_ranks() -> None:
    """Blocks are gathered twice, the rest once, in bfloat16; gradients are reduced in float32, half of each sent."""
    time, report = launch(1, two_ranks, group=False)[0]
    sharded = PARAMETERS - ROUTERS
    gathered = (2 * (sharded - ROOT) + ROOT) / 2 * 2
    reduced = sharded * 4 / 2
    loads = 2 * 4 * 8  # lb: assignments to four experts in two layers, int64
    assert time.node == pytest.approx((gathered + reduced + ROUTERS * 4 + loads + report) / 1e6)
    assert time.network == 0
    assert time.products == pytest.approx(FLOPS / 2 / 1e9)
    assert time.exposed == pytest.approx(time.products + time.memory + time.node)
    assert time.hidden == pytest.approx(time.node)  # the links of this card are slow


def sixteen_ranks() -> StepTime:
    words = ["--training.batch_size=16", "--parallelism.ep=2", "--parallelism.dp_replicate=2"]
    return prediction(words, 16)


@pytest.mark.slow
def test_groups_of_more_ranks_than_a_node_has_use_the_network() -> None:
    time = launch(1, sixteen_ranks, group=False)[0]
    assert time.node > 0  # the all-to-all of two ranks, FSDP over eight
    assert time.network > 0  # the replicas


def pipeline() -> list[float]:
    words = ["--parallelism.pp=2", "--training.batch_size=8", "--training.microbatch_size=1"]
    return [prediction(words, 2).bubble]


@pytest.mark.slow
def test_a_pipeline_waits_for_its_first_and_last_microbatch() -> None:
    assert launch(1, pipeline, group=False)[0] == [pytest.approx(1 / 9)]


WIRE = {"all-gather": 300, "reduce-scatter": 75, "all-reduce": 150, "all-to-all": 75, "send": 100}


@pytest.mark.parametrize(("collective", "wire"), WIRE.items())
def test_bytes_on_the_wire_of_four_ranks(collective: str, wire: float) -> None:
    assert wire_bytes(collective, 100, 4) == pytest.approx(wire)


def test_cards_are_found_by_the_names_that_drivers_report() -> None:
    assert find_card("NVIDIA H100 80GB HBM3") is CARDS["H100"]
    assert find_card("NVIDIA H100 PCIe") is CARDS["H100 PCIe"]
    assert find_card("NVIDIA GeForce RTX 4090") is None
    assert card_named("h100 pcie") is CARDS["H100 PCIe"]
    with pytest.raises(UserError, match="--card = 'H300' is not in the table; there are H100 PCIe, H100"):
        card_named("H300")


def test_command_line() -> None:
    large = ["--config", "large", "--model.vocab_size=32000", "--parallelism.ep=8", "--training.microbatch_size=1"]
    done = titan_moe("plan", *large, "--world", "512", "--card", "H100")
    assert done.returncode == 0, done.stderr
    assert "a step by the data sheet of H100" in done.stdout
    assert "assumed: 8 cards per node" in done.stdout
    wrong = titan_moe("plan", "--card", "H100")
    assert wrong.returncode == 2
    assert "add --training.dtype=bfloat16" in wrong.stderr
