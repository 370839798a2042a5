"""An export does not depend on the ranks of the checkpoint, needs memory for a layer, and leaves nothing when it is stopped."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.commands import environment, start
from tests.helpers.random_runs import random_model, settings, tokenizer, write_run
from tests.helpers.ranks import launch
from tests.helpers.steps import config_of, mesh_of
from tests.helpers.strangers import verb
from titan_moe.train.build import build_model

for package in ("safetensors", "tokenizers", "gguf"):
    pytest.importorskip(package)

OPTIONS = ["--model.moe.score=sigmoid", "--model.moe.shared_experts=1", "--training.dtype=float32"]


def save(folder: Path, world: int, options: list[str]) -> None:
    """Writes a run with a model of initial weights, which are the same on any layout, and balancing biases that are not 0."""
    config = config_of([*OPTIONS, *options], world)
    model = build_model(config, tokenizer().vocab_size, mesh_of(config, world))
    for layer, moe in enumerate(model.moe_modules()):
        moe.router.expert_bias.copy_(torch.arange(8) / 100 + layer)
    write_run(folder, model, rank=dist.get_rank() if dist.is_initialized() else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "options"), [(2, ["--parallelism.ep=2"]), (2, ["--parallelism.tp=2"])])
def test_files_of_two_ranks_are_those_of_one_bit_by_bit(world: int, options: list[str], tmp_path: Path) -> None:
    save(tmp_path / "one", 1, [])
    launch(world, save, tmp_path / "two", world, options)
    shards = [path.name for path in (tmp_path / "two").glob("run/checkpoints/*/*.distcp")]
    assert len(shards) == world
    for form in ("hf", "gguf"):
        for name in ("one", "two"):
            words = [str(tmp_path / name / "run"), "--format", form, "--output", str(tmp_path / f"{form}-{name}")]
            assert verb("export", *words) == 0
    assert (tmp_path / "gguf-one").read_bytes() == (tmp_path / "gguf-two").read_bytes()
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf-one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "hf-two").iterdir()}
    assert len(files) > 8


PEAK = """
import resource, sys
from pathlib import Path
from titan_moe.weights.gguf_file import export_file
from titan_moe.weights.source import open_source
from titan_moe.weights.transformers_folder import export_folder
import gguf, safetensors.torch, tokenizers  # their own memory does not count
run, form, out = sys.argv[1:]
source = open_source(Path(run), 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((export_folder if form == "hf" else export_file)(source, Path(out), "float32" if form == "hf" else "f32"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_memory_is_that_of_a_layer(form: str, tmp_path: Path) -> None:
    """A model of 12 layers of 13 MiB each. Three layers are allowed: a layer, what of it is written, and the allocator's."""
    network = random_model(settings({"experts": 32, "hidden_dim": 256}, dim=128, layers=12), biased=False)
    layer = sum(value.nbytes for value in network.layers["0"].parameters())
    run = write_run(tmp_path, network)
    command = [sys.executable, "-c", PEAK, str(run), form, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert int(done.stdout.splitlines()[-1]) * 1024 < 3 * layer


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_signal_in_the_middle_leaves_nothing(form: str, number: int, status: int, tmp_path: Path) -> None:
    network = random_model(settings({"experts": 32, "hidden_dim": 256}, dim=128, layers=12), biased=False)
    run, out = write_run(tmp_path / "runs", network), tmp_path / "new" / "out"
    out.parent.mkdir()
    process = start("export", str(run), "--format", form, "--output", str(out))
    while not list(out.parent.iterdir()):  # the temporary name
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert not list(out.parent.iterdir())
