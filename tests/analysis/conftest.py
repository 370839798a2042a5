"""A trained run for the tests of `inspect` and `place`."""

from pathlib import Path

import pytest

from tests.helpers.commands import TINY
from tests.helpers.runs import train
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.load import load_config

WORDS = [
    "--training.dtype=float64",
    "--model.tie_embeddings=false",
    "--balancer.rate=0.05",
    "--model.moe.first_dense_layers=1",
    "--model.layers=4",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> Path:
    """The directory of a short run on two domains, in which the balancer has changed the experts' biases."""
    folder = tmp_path_factory.mktemp("inspected")
    for domain in ("code", "poems"):
        (folder / domain).mkdir()
    for source in sorted(corpus_dir.iterdir())[:10]:
        (folder / "code" / source.name).write_bytes(source.read_bytes()[:1500])
        (folder / "poems" / source.name).write_text(f"{source.stem}: roses are red, violets are blue and so on\n" * 30)
    words = [
        *TINY,
        f"--job.output_dir={folder}",
        f"--data.cache_dir={cache_dir}",
        f'--data.corpus=["{folder / "code"}", "{folder / "poems"}"]',
        "--data.validation_fraction=0.3",
        *WORDS,
    ]
    config = load_config("debug", words)
    train(config)
    return RunDir(config).path
