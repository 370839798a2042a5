"""Generation on tensor- and expert-parallel ranks: texts and log-probabilities of one process, with a part of the weights."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import TINY, environment, titan_moe
from tests.helpers.ranks import launch
from tests.helpers.runs import DEEPSEEK, train
from titan_moe.checkpoint.chosen import from_checkpoint
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.load import load_config
from titan_moe.generate.cache import KeyValueCache, extend
from titan_moe.generate.load import load_model
from titan_moe.generate.loop import Options, generate
from titan_moe.generate.ranks import SameOnAllRanks, inference_mesh
from titan_moe.generate.sampling import Sampling
from titan_moe.model.gemm import local

PROMPTS = [[1, 5, 9, 14, 3], [1, 7], [1, 300, 31, 32, 33, 34, 35, 36, 2]]
LAYOUTS = [
    ["--parallelism.tp=2"],
    ["--parallelism.ep=2"],
    ["--parallelism.tp=2", "--parallelism.ep=2"],
]
MODELS = {
    "deepseek": [*DEEPSEEK, "--model.qk_norm=projection", "--model.tie_embeddings=false", "--model.qkv_bias=true"],
    "dense first": [
        "--model.moe.first_dense_layers=1",
        "--model.heads=4",
        "--model.kv_heads=2",
        "--model.qk_norm=true",
    ],
}


@pytest.fixture(scope="module", params=MODELS)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path
) -> Path:
    places = [f"--data.corpus={corpus_dir}", f"--data.cache_dir={cache_dir}"]
    folder = tmp_path_factory.mktemp("runs")
    options = [*TINY, *MODELS[request.param], *places, "--training.steps=2", "--validation.interval=0"]
    config = load_config("debug", [*options, f"--job.output_dir={folder}"])
    train(config)
    return RunDir(config).path


def results(run: Path, words: list[str], world: int) -> dict[str, Any]:
    """Log-probabilities along fixed tokens, greedy and drawn texts, and this rank's numbers of weights."""
    words = [*words, f"--training.batch_size={world}"]
    (checkpoint,), config = from_checkpoint([run], False, words, world)
    device = torch.device("cpu")
    loaded = load_model(checkpoint, config, inference_mesh(config, world, device), same_tokens=True)
    model, source = loaded.model, torch.Generator().manual_seed(2)
    cache, new, found = KeyValueCache(3, device), [list(prompt) for prompt in PROMPTS], []
    for step in range(6):
        found.append(extend(model, cache, new).log_softmax(1))
        if step == 3:
            cache.keep([0, 2])
            new = new[:2]
        new = [torch.randint(3, 500, (1,), generator=source).tolist() for _ in new]
    texts = []
    for temperature in (0.0, 1.0):
        options = Options(12, (), 3, Sampling(temperature=temperature, repetition_penalty=1.2))
        pieces = generate(model, loaded.tokenizer, PROMPTS, options, SameOnAllRanks().tokens)
        texts.append([(piece.text_number, piece.text, piece.ended) for piece in pieces])
    sizes = {name: local(parameter).numel() for name, parameter in model.named_parameters()}
    return {"logs": torch.cat(found), "texts": texts, "sizes": sizes}


@functools.cache
def one_process(run: Path, dtype: str) -> dict[str, Any]:
    return results(run, [f"--training.dtype={dtype}"], 1)


@functools.cache
def on_ranks(run: Path, dtype: str, *layout: str) -> list[dict[str, Any]]:
    world = 2 ** len(layout)
    return launch(world, results, run, [f"--training.dtype={dtype}", *layout], world)


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_texts_and_log_probabilities_are_those_of_one_process(
    run: Path, layout: list[str], dtype: str, tolerance: float
) -> None:
    alone, ranks = one_process(run, dtype), on_ranks(run, dtype, *layout)
    for rank in ranks:
        torch.testing.assert_close(rank["logs"], alone["logs"], rtol=0, atol=tolerance)
        assert torch.equal(rank["logs"], ranks[0]["logs"])
        assert rank["texts"] == ranks[0]["texts"]
    if dtype == "float64":
        assert ranks[0]["texts"] == alone["texts"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_a_rank_has_its_shard_of_the_weights(run: Path, layout: list[str]) -> None:
    degrees = {word[14:16]: 2 for word in layout}
    alone = one_process(run, "float32")["sizes"]
    for rank in on_ranks(run, "float32", *layout):
        for name, size in rank["sizes"].items():
            parts = degrees.get("tp", 1)
            if ".experts." in name:
                parts *= degrees.get("ep", 1)
            elif "norm" in name and not (name.endswith(("q_norm.weight", "k_norm.weight")) and size * 2 == alone[name]):
                parts = 1  # of whole tokens or single heads; a norm over all heads is spread over tp
            elif "router" in name or "shared_gate" in name:
                parts = 1
            assert size * parts == alone[name], name


def started(run: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "titan_moe.cli", "generate", str(run), *words]
    return subprocess.Popen(
        command,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


WORDS = ["--temperature=0", "--training.dtype=float64", "--tokens=8"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp", "ep"])
def test_the_verb_prints_once_what_one_process_prints(run: Path, layout: str) -> None:
    alone = titan_moe("generate", str(run), "--prompt=import", "--prompt=class", *WORDS)
    two = started(run, "--prompt=import", "--prompt=class", *WORDS, f"--parallelism.{layout}=2")
    out, err = two.communicate(timeout=240)
    assert two.returncode == 0, err
    assert (out, [line for line in err.splitlines() if line.startswith("---")]) == (
        alone.stdout,
        alone.stderr.splitlines(),
    )
    session = started(run, "--interactive", *WORDS, f"--parallelism.{layout}=2")
    out, err = session.communicate("import\nclass\n", timeout=240)
    assert session.returncode == 0, err
    assert out == alone.stdout


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["--interactive", "--prompt=import"])
def test_ctrl_c_ends_all_ranks(run: Path, asked: str) -> None:
    process = started(run, asked, "--parallelism.tp=2", "--max-tokens=100000", "--temperature=1.5")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("import\n")
    process.stdin.flush()
    process.stdout.read(1)
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - began < 45
    assert "interrupted" in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_ranks_that_are_neither_tp_nor_ep_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = titan_moe("generate", str(run), "--prompt=a")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: parallelism: generate spreads a model over tp * ep ranks, and there are 2; give"
    )
    assert done.stderr.count("\n") == 1
