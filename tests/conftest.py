"""Shared fixtures: threads, a small corpus, and configurations that train in seconds."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import interpreter  # noqa: F401 - before anything imports triton
from tests.helpers.commands import THREADS, TINY
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config
from torchtitan_ext.terms import REGISTRY

FOLDER = Path(__file__).parent
# scripts/mark_slow.py writes both files.
SLOW = frozenset((FOLDER / "slow.txt").read_text(encoding="utf-8").splitlines())
SECONDS = {
    file: int(seconds)
    for seconds, file in map(str.split, (FOLDER / "seconds.txt").read_text(encoding="utf-8").splitlines())
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of slow.txt, before `-m` selects. And starts with the files that take longest: a long file at the end
    would run on one worker while the others have nothing left to do."""
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: -SECONDS.get(item.nodeid.partition("::")[0], 0))


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of forty small text files: modules of the standard library."""
    import sysconfig

    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    for source in sources:
        (folder / source.name).write_bytes(source.read_bytes()[:12_000])
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_options(corpus_dir: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    """Options that make `debug` a job of seconds."""
    return [
        *TINY,
        f"--data.corpus={corpus_dir}",
        f"--data.cache_dir={cache_dir}",
        f"--job.output_dir={tmp_path / 'runs'}",
    ]


@pytest.fixture
def tiny_config(tiny_options: list[str]) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        return load_config("debug", [*tiny_options, *overrides])

    return make


BUILT_IN_TERMS = dict(REGISTRY)


@pytest.fixture(autouse=True)
def _built_in_terms_only() -> Iterator[None]:
    """Forgets terms that a test's extension modules registered: other tests' configurations must not have their tables."""
    yield
    if dict(REGISTRY) != BUILT_IN_TERMS:
        REGISTRY.clear()
        REGISTRY.update(BUILT_IN_TERMS)
        for name in [*sys.modules]:  # so that a later test that loads the module registers its terms again
            if name == "titan_moe.analysis.controls" or name.startswith("titan_moe_extension_"):
                del sys.modules[name]
