"""Experts held by the ranks that a placement file names: results do not change, and texts go to the ranks of their experts."""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.commands import ROOT, TINY, environment, titan_moe
from tests.helpers.ranks import NEEDS_NEWER, launch
from tests.helpers.runs import DEEPSEEK, train
from titan_moe.analysis.evaluate.scores import Batches, Scored, log_likelihoods
from titan_moe.checkpoint.chosen import from_checkpoint
from titan_moe.checkpoint.expert_order import write_order
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.degrees import Degrees, resolve
from titan_moe.config.load import load_config
from titan_moe.generate.buckets import WINDOW, assign_texts, first_router_counts, own_batches, rows_on_rank
from titan_moe.generate.cache import inference_inputs
from titan_moe.generate.load import Loaded, load_model
from titan_moe.generate.loop import Options
from titan_moe.generate.ranks import inference_mesh
from titan_moe.generate.sampling import Sampling
from titan_moe.generate.shared import complete_on_ranks
from titan_moe.model.gemm import local
from titan_moe.parallel.mesh import Mesh, single

CPU = torch.device("cpu")
LAYERS, EXPERTS = 2, 8
ORDER = np.stack([np.random.default_rng(layer).permutation(EXPERTS) for layer in range(LAYERS)])
PROMPTS = [[1, 5, 9, 14, 3], [1, 7], [1, 300, 31, 32, 33, 34, 35, 36, 2], [1, 7], [1, 60, 61]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> Path:
    """A short run in float64 with a dense first layer and a balancing bias that is not zero."""
    folder = tmp_path_factory.mktemp("runs")
    places = [f"--data.corpus={corpus_dir}", f"--data.cache_dir={cache_dir}", f"--job.output_dir={folder}"]
    words = ["--training.dtype=float64", "--training.steps=2", "--validation.interval=0", *DEEPSEEK]
    config = load_config("debug", [*TINY, *places, *words, "--model.moe.first_dense_layers=1"])
    train(config)
    path = RunDir(config).path
    write_order(path / "order.json", ORDER, ranks=2)
    return path


def requests() -> list[Scored]:
    source = torch.Generator().manual_seed(0)
    sizes = [(1 + n % 13, (n * 7) % 19) for n in range(59)] + [(20, 25), (40, 2)]
    return [Scored(*(torch.randint(0, 512, (n,), generator=source).tolist() for n in pair)) for pair in sizes]


def evaluated(run: Path, world: int, words: list[str], placement: Path | None) -> dict[str, Any]:
    """Log-likelihoods as `eval` takes them."""
    (checkpoint,), config = from_checkpoint([run], False, words, world)
    mesh = Mesh(resolve(config.parallelism, world, str), CPU)
    loaded = load_model(checkpoint, config, mesh, placement=placement)
    scores = log_likelihoods(loaded.model, requests(), Batches(3, 32, mesh, by_router=loaded.placed))
    return {"scores": scores, "placed": loaded.placed}


LAYOUTS = {  # ranks and options; the last one also shards each rank's experts by FSDP
    "ep": (2, ["--parallelism.ep=2"]),
    "ep tp": (4, ["--parallelism.ep=2", "--parallelism.tp=2"]),
    "ep fsdp": (4, ["--parallelism.ep=2", "--training.batch_size=4"]),
}


@pytest.mark.parametrize(
    "layout", ["ep", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ep tp", "ep fsdp"))]
)
def test_scores_with_placed_experts_are_those_of_one_process(run: Path, layout: str) -> None:
    """In float64, up to the order of sums."""
    one = evaluated(run, 1, [], None)["scores"]
    world, words = LAYOUTS[layout]
    for two in launch(world, evaluated, run, world, words, run / "order.json"):
        assert two["placed"]
        assert [greedy for _, greedy in two["scores"]] == [greedy for _, greedy in one]
        assert [value for value, _ in two["scores"]] == pytest.approx([value for value, _ in one], rel=1e-10)


def written(run: Path, world: int, words: list[str], placement: Path | None) -> dict[str, Any]:
    """Greedy and drawn texts as `generate --share-prompts` makes them, and this rank's experts of both layers."""
    (checkpoint,), config = from_checkpoint([run], False, [*words, f"--training.batch_size={world}"], world)
    mesh = inference_mesh(config, world, CPU)
    loaded = load_model(checkpoint, config, mesh, placement=placement)
    texts = []
    for temperature in (0.0, 1.0):
        options = Options(12, (), 3, Sampling(temperature=temperature, repetition_penalty=1.2))
        texts += complete_on_ranks(loaded, PROMPTS, options, size=2)
    down = [local(moe.experts.down).clone() for moe in loaded.model.moe_modules()]
    return {"texts": texts, "down": down}


def test_shared_prompts_give_the_texts_of_one_process_and_ranks_hold_the_experts_of_the_file(run: Path) -> None:
    one = written(run, 1, [], None)
    drawn = one["texts"][len(PROMPTS) :]
    assert drawn[1] != drawn[3]  # equal prompts, which may be on different ranks, have different draws
    words = ["--parallelism.ep=2"]
    for placement in (None, run / "order.json"):
        for rank, two in enumerate(launch(2, written, run, 2, words, placement)):
            assert two["texts"] == one["texts"]
            for layer, down in enumerate(two["down"]):
                held = np.arange(EXPERTS) if placement is None else ORDER[layer]
                here = held[rank * EXPERTS // 2 : (rank + 1) * EXPERTS // 2]
                assert torch.equal(down, one["down"][layer][torch.from_numpy(here)])


def loaded_alone(run: Path) -> Loaded:
    (checkpoint,), config = from_checkpoint([run], False, [], 1)
    return load_model(checkpoint, config, single(CPU))


def test_first_router_counts_are_the_choices_of_the_first_layer_in_a_full_pass(run: Path) -> None:
    loaded = loaded_alone(run)
    counts = first_router_counts(loaded.model, PROMPTS, 2, loaded.mesh)
    for ids, row in zip(PROMPTS, counts, strict=True):
        inputs = inference_inputs(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0))
        with torch.no_grad():
            first = loaded.model.evaluate(inputs)[2][0]
        assert row.tolist() == torch.bincount(first.flatten(), minlength=EXPERTS).tolist()


def parts_of(run: Path, count: int) -> list[list[int]]:
    """This rank's batches of `count` texts, with placed experts."""
    (checkpoint,), config = from_checkpoint([run], False, ["--parallelism.ep=2"], 2)
    mesh = Mesh(resolve(config.parallelism, 2, str), CPU)
    loaded = load_model(checkpoint, config, mesh, placement=run / "order.json")
    texts = [request.context for request in requests()[:count]]
    return [*own_batches(texts, range(count), 3, mesh, loaded.model)]


@pytest.mark.parametrize("count", [1, 6 * WINDOW + 7])
def test_every_text_is_on_one_rank_and_goes_to_the_best_of_all_equal_distributions(run: Path, count: int) -> None:
    first, second = launch(2, parts_of, run, count)
    assert len(first) == len(second)
    assert sorted(itertools.chain(*first, *second)) == [*range(count)]
    assert all(len(batch) <= 3 for batch in [*first, *second])
    loaded = loaded_alone(run)
    window = sorted(n for batch in [*first[:WINDOW], *second[:WINDOW]] for n in batch)
    counts = first_router_counts(loaded.model, [requests()[n].context for n in window], 8, loaded.mesh)
    on_first = np.isin(np.arange(EXPERTS), ORDER[0][: EXPERTS // 2])
    # Two ranks: the best distribution in equal numbers gives the first rank the half with the largest difference.
    difference = counts[:, on_first].sum(1) - counts[:, ~on_first].sum(1)
    ours = sum(difference[window.index(n)] for batch in first[:WINDOW] for n in batch)
    halves = [len(window) // 2, -(-len(window) // 2)]
    assert ours == max(np.sort(difference)[::-1][:half].sum() for half in halves)


def test_rows_on_rank_adds_the_blocks_of_ranks_and_repeats_them_for_further_data_ranks() -> None:
    mesh = single(CPU)
    mesh.degrees = Degrees(dp_replicate=1, dp_shard=4, cp=1, ep=2, tp=1, pp=1)
    assert rows_on_rank(np.array([[1, 2, 3, 5], [4, 0, 0, 1]]), mesh).tolist() == [[3, 8, 3, 8], [4, 1, 4, 1]]


def test_assign_texts_has_the_largest_gain_of_all_equal_distributions() -> None:
    gain = np.random.default_rng(2).integers(0, 50, (5, 2))
    rank_of = assign_texts(gain)
    possible = [p for p in itertools.product([0, 1], repeat=5) if sum(p) in (2, 3)]
    assert tuple(rank_of) in possible
    assert gain[np.arange(5), rank_of].sum() == max(sum(gain[n, r] for n, r in enumerate(p)) for p in possible)


@pytest.mark.parametrize(
    ("verb", "words", "expected"),
    [
        ("eval", ["--text=README.md"], "parallelism.ep is 1, so every rank has all experts"),
        ("generate", ["--prompt=a", "--share-prompts"], "--share-prompts: needs ranks with experts of their own"),
        ("generate", ["--interactive", "--share-prompts"], "with --interactive there is one prompt at a time"),
    ],
)
def test_a_placement_and_shared_prompts_are_refused_where_they_mean_nothing(
    run: Path, verb: str, words: list[str], expected: str
) -> None:
    done = titan_moe(verb, str(run), *words, f"--placement={run / 'order.json'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert expected in done.stderr


def refusal(run: Path, order: Path, words: list[str]) -> str:
    (checkpoint,), config = from_checkpoint([run], False, words, 2)
    try:
        load_model(checkpoint, config, Mesh(resolve(config.parallelism, 2, str), CPU), placement=order)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_placements_of_other_ranks_or_models_are_refused(run: Path, tmp_path: Path) -> None:
    write_order(tmp_path / "four.json", ORDER, ranks=4)
    write_order(tmp_path / "small.json", ORDER[:, :3])
    write_order(tmp_path / "any.json", ORDER)
    expected = {
        "four": "UserError: --placement: .*: made for 4 ranks, and parallelism.ep is 2",
        "small": "UserError: --placement: .*: not an order of 8 experts in 2 layers",
        "any": "^$",  # a file by paths names no ranks
    }
    for name, message in expected.items():
        found = launch(2, refusal, run, tmp_path / f"{name}.json", ["--parallelism.ep=2"])
        if any(NEEDS_NEWER in one for one in found):
            pytest.skip(found[0])
        assert all(re.search(message, one) for one in found), found


@pytest.mark.slow
def test_the_verbs_on_two_ranks_print_what_one_process_prints(run: Path) -> None:
    words = ["--temperature=0", "--tokens=8", "--prompt=import", "--prompt=class", "--prompt=def"]
    alone = titan_moe("generate", str(run), *words)
    assert alone.returncode == 0, alone.stderr
    placed = [f"--placement={run / 'order.json'}", "--parallelism.ep=2"]
    for more in ([], ["--share-prompts"]):
        two = on_two_ranks("generate", str(run), *words, *placed, *more)
        assert (two.returncode, two.stdout) == (0, alone.stdout), two.stderr
    text = ["--text=README.md", "--batch-size=2"]
    alone = titan_moe("eval", str(run), *text)
    two = on_two_ranks("eval", str(run), *text, *placed)
    tables = [done.stdout.splitlines()[:3] for done in (alone, two)]
    assert alone.returncode == two.returncode == 0, two.stderr
    assert tables[0] == tables[1]


def on_two_ranks(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "titan_moe.cli", *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.slow
def test_the_benchmark_measures_both_sides_with_the_same_results(run: Path) -> None:
    words = ["--ranks", "2", "--samples=4", "--pairs=1", "--prompt=8", "--tokens=4"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/bench_paths.py"), str(run), *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith(f"| {run.name} ")]
    assert [(row[1], row[2], row[-1]) for row in rows] == [("2", "score", "1.000"), ("2", "generate", "1.000")]
    assert all(float(rate) > 0 for row in rows for rate in row[3:5])
