"""Log-likelihoods and generated text of two ranks that share a model are those of one rank."""

from pathlib import Path

import pytest
import torch

from tests.helpers.commands import TINY
from tests.helpers.ranks import launch
from tests.helpers.runs import train
from titan_moe.analysis.evaluate.scores import Batches, Scored, log_likelihoods
from titan_moe.checkpoint.chosen import from_checkpoint
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.degrees import resolve
from titan_moe.config.load import load_config
from titan_moe.generate.load import load_model
from titan_moe.generate.loop import Options, complete
from titan_moe.generate.sampling import Sampling
from titan_moe.parallel.mesh import Mesh
from torchtitan_ext.collectives import all_sum

PROMPTS = [[1], [1, 40, 41, 42], [1, 50], [1, 60, 61], [1, 70, 71]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> Path:
    """The directory of a short run in float64."""
    places = [f"--data.corpus={corpus_dir}", f"--data.cache_dir={cache_dir}"]
    folder = tmp_path_factory.mktemp("runs")
    words = ["--training.dtype=float64", "--training.steps=2", f"--job.output_dir={folder}"]
    config = load_config("debug", [*TINY, *places, *words])
    train(config)
    return RunDir(config).path


def requests() -> list[Scored]:
    """Fifty texts of many lengths, some without a token to score, some too long."""
    source = torch.Generator().manual_seed(0)
    sizes = [(1 + n % 13, (n * 7) % 19) for n in range(48)] + [(20, 25), (40, 2)]
    return [Scored(*(torch.randint(0, 512, (n,), generator=source).tolist() for n in pair)) for pair in sizes]


def scored(run: Path, world: int, words: list[str], full: bool = False) -> list[tuple[float, bool]]:
    (checkpoint,), config = from_checkpoint([run], False, words, world)
    mesh = Mesh(resolve(config.parallelism, world, str), torch.device("cpu"))
    loaded = load_model(checkpoint, config, mesh)
    return log_likelihoods(loaded.model, requests(), Batches(3, 32, mesh, full))


LAYOUTS = {"fsdp": [], "ep": ["--parallelism.ep=2"], "tp": ["--parallelism.tp=2"], "cp": ["--parallelism.cp=2"]}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name == "ep" else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_two_ranks_score_what_one_does(run: Path, layout: str) -> None:
    """In float64, up to the order of sums. The last batch has texts for one rank only."""
    one = scored(run, 1, [])
    for two in launch(2, scored, run, 2, LAYOUTS[layout], layout == "ep"):
        assert [greedy for _, greedy in two] == [greedy for _, greedy in one]
        assert [value for value, _ in two] == pytest.approx([value for value, _ in one], rel=1e-10)


def written(run: Path, world: int, words: list[str]) -> list[str]:
    """The texts that this rank continues: the first one all but one of the prompts."""
    (checkpoint,), config = from_checkpoint([run], False, words, world)
    mesh = Mesh(resolve(config.parallelism, world, str), torch.device("cpu"))
    loaded = load_model(checkpoint, config, mesh)

    def anywhere(here: bool) -> bool:
        return bool(all_sum(torch.tensor(int(here)), mesh.everyone))

    own = PROMPTS if world == 1 else [PROMPTS[:4], PROMPTS[4:]][mesh.data_rank]
    options = Options(max_tokens=12 + len(own), sampling=Sampling(temperature=0.0))
    return complete(loaded.model, loaded.tokenizer, own, options, anywhere)


def test_ranks_with_texts_of_different_lengths_write_what_one_rank_writes(run: Path) -> None:
    """A rank whose texts have ended takes part in the others' collectives until all have ended."""
    one = written(run, 1, [])
    first, second = launch(2, written, run, 2, ["--parallelism.ep=2"])
    for two, whole in zip([*first, *second], one, strict=True):
        assert two
        assert whole.startswith(two)
