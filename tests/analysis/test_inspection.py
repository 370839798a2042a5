"""`inspect`: its accumulated sums give the library's measures on all tokens, for any number of ranks and any batch
size."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import ROOT
from tests.helpers.ranks import launch
from tests.helpers.runs import Make, train
from tests.helpers.spy import spy_on
from titan_moe.analysis.inspect.inspection import Options, inspect
from titan_moe.checkpoint.chosen import chosen_checkpoints
from titan_moe.checkpoint.dcp import load_checkpoint
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.checkpoint.state import read_state
from titan_moe.config.degrees import resolve
from titan_moe.config.load import saved_config
from titan_moe.data.loader import Windows
from titan_moe.data.prepare import prepare
from titan_moe.data.shards import TokenStream
from titan_moe.errors import UserError
from titan_moe.parallel.mesh import Mesh, single
from titan_moe.train.build import build_model
from titan_moe.train.inputs import to_inputs
from torchtitan_ext import metrics
from torchtitan_ext.losses import routing_variance_loss

RESET = ("parallelism",)
OPTIONS = Options(sequences=0, cluster_tokens=100, examples=3)


def inspect_run(run: Path, words: list[str], options: Options = OPTIONS, world: int = 1) -> list[dict[str, Any]]:
    checkpoints = chosen_checkpoints([run], every=True)[-2:]
    state = read_state(checkpoints[0], "")
    config = saved_config(state.config, "", words, world_size=world, reset=RESET, trust=True)
    degrees = resolve(config.parallelism, world, str)
    return inspect(checkpoints, config, Mesh(degrees, torch.device("cpu")), options)


def assert_same_result(a: Any, b: Any, where: str = "") -> None:
    """Floats equal to 1e-6, all else exactly."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_result(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_result(x, y, f"{where}/{index}")
    else:
        assert a == (pytest.approx(b, rel=1e-6, abs=1e-9) if isinstance(b, float) else b), where


def test_the_microbatch_size_does_not_change_the_measures(run: Path) -> None:
    one_batch = inspect_run(run, ["--training.batch_size=8"])
    assert [result["step"] for result in one_batch] == [4, 6]
    for size in (1, 2):
        assert_same_result(
            inspect_run(run, ["--training.batch_size=8", f"--training.microbatch_size={size}"]), one_batch
        )


LAYOUTS = {
    "dp2": (2, []),
    "ep2": (2, ["--parallelism.ep=2"]),
    "tp2": (2, ["--parallelism.tp=2"]),
    "cp2": (2, ["--parallelism.cp=2"]),
    "pp2": (2, ["--parallelism.pp=2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_give_the_measures_of_one(run: Path, layout: str) -> None:
    world, words = LAYOUTS[layout]
    words = ["--training.batch_size=8", "--training.microbatch_size=2", *words]
    first, second = launch(world, inspect_run, run, words, OPTIONS, world)
    assert second == []
    assert_same_result(first, inspect_run(run, ["--training.batch_size=8"]))


def test_measures_from_accumulated_sums_equal_those_computed_on_all_tokens_at_once(run: Path) -> None:
    (_, result) = inspect_run(run, ["--training.batch_size=8", "--training.microbatch_size=2"])
    checkpoint = chosen_checkpoints([run], every=False)[0]
    config = saved_config(read_state(checkpoint, "").config, "", [], world_size=1, trust=True)
    prepared = prepare(config)
    stream = TokenStream(prepared.folder, prepared.manifest, "validation")
    windows = Windows(stream, config.training.seq_len, prepared.tokenizer.eos)
    batch = windows.batch(torch.arange(len(windows)).numpy())
    model = build_model(config, prepared.tokenizer.vocab_size, single(torch.device("cpu")))
    load_checkpoint(checkpoint, model, None)
    spy = spy_on(model)
    with torch.no_grad():
        out = model(to_inputs(batch, torch.float64, torch.device("cpu")))
    keep = batch.loss_mask.flatten()
    assert int((~keep).sum()) > 0
    assert result["loss"] == pytest.approx(out.ce.item(), rel=1e-12)
    assert result["tokens"] == int(keep.sum())
    domains = torch.from_numpy(stream.domains)[batch.document_ids.flatten()[keep]]
    assert len(domains.unique()) == 2
    experts = config.model.moe.experts
    for measured, view, moe in zip(result["layers"], spy.views, model.moe_modules(), strict=True):
        scores, ids = view.scores_TE[keep], view.topk_ids_TK[keep]
        counts = torch.bincount(ids.flatten(), minlength=experts)
        normalized = view.gates_TK[keep] / view.gates_TK[keep].sum(1, keepdim=True)
        gates = torch.zeros_like(scores).scatter(1, ids, normalized)
        load = metrics.domain_load(ids, domains, experts, 2)
        wanted = {
            "max_vio_global": metrics.max_vio(counts),
            "load_variation": metrics.load_variation(counts),
            "dead": metrics.dead_fraction(counts),
            "entropy": metrics.routing_entropy(scores),
            "topk_mass": metrics.topk_mass(scores, ids),
            "margin": metrics.routing_margin(scores, 2),
            "overlap": metrics.expert_overlap(view.z_RF, view.rows_TK[keep]),
            "overlap_y": metrics.expert_overlap(view.y_RD, view.rows_TK[keep]),
            "routing_variance": -routing_variance_loss(gates),
            "mean_gate_imbalance": metrics.mean_gate_imbalance(gates),
            "domain_information": metrics.domain_information(load),
        }
        for name, value in wanted.items():
            assert measured[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12), name
        assert measured["load"] == counts.tolist()
        assert measured["domain_load"] == load.tolist()
        matrix = metrics.expert_response(moe.router.weight, moe.experts.gate_up[:, 0])
        torch.testing.assert_close(torch.tensor(measured["erc_M"]).double(), matrix.detach(), rtol=1e-6, atol=0)
        best = gates.amax(0)
        assert all(len(row) == 3 for row, gate in zip(measured["examples"], best, strict=True) if gate > 0)
    for measured, (earlier, later) in zip(
        result["pairs"], itertools.pairwise(view.topk_ids_TK[keep] for view in spy.views), strict=True
    ):
        assert measured["kappa"] == pytest.approx(metrics.coupling_kappa(earlier[:, 0], later[:, 0], experts))
        cond = metrics.conditional_routing(earlier, later, experts)
        torch.testing.assert_close(torch.tensor(measured["cond"], dtype=torch.float64), cond, rtol=1e-6, atol=0)


def test_persistence_starts_with_the_second_checkpoint_and_is_1_for_the_same_one(run: Path) -> None:
    first, second = inspect_run(run, ["--training.batch_size=8"])
    assert "persistence_top1" not in first["layers"][0]
    assert 0 < second["summary"]["persistence_top1"] < 1
    checkpoint = chosen_checkpoints([run], every=False)[0]
    config = saved_config(read_state(checkpoint, "").config, "", [], world_size=1, trust=True)
    again = inspect([checkpoint, checkpoint], config, single(torch.device("cpu")), OPTIONS)
    assert again[1]["summary"]["persistence_top1"] == again[1]["summary"]["persistence_topk"] == 1.0


def test_examples_are_text_of_the_validation_split(run: Path) -> None:
    """So is the context before each example token."""
    (_, result) = inspect_run(run, [], OPTIONS._replace(cluster_tokens=0, sequences=2))
    assert "knn_overlap" not in result["layers"][0]
    config = saved_config(read_state(chosen_checkpoints([run], False)[0], "").config, "", [], world_size=1, trust=True)
    prepared = prepare(config)
    stream = TokenStream(prepared.folder, prepared.manifest, "validation")
    text = prepared.tokenizer.decode(stream.read(0, 2 * config.training.seq_len).tolist())
    examples = [example for row in result["layers"][0]["examples"] for example in row]
    assert examples
    for before, token in examples:
        assert before + token in text


@pytest.mark.slow
def test_inspect_on_the_command_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("violets are red\n" * 200)

    def run_inspect(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "titan_moe.cli", "inspect", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)

    done = run_inspect(
        str(run), "--text", str(tmp_path / "text"), "--output", str(tmp_path / "out.json"), "--examples=0"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["domains"] == ["text"]
    assert "kappa" in done.stdout
    done = run_inspect(str(run), "--all", "--cluster-tokens", "0")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (run / "inspect").iterdir()) == [f"step-0000000{n}.json" for n in (2, 4, 6)]
    for words, message in REFUSED.items():
        done = run_inspect(*words.format(run=run).split())
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr


REFUSED = {
    "": "error: the following arguments are required: RUN; see `titan-moe inspect --help`",
    "/nowhere": "error: /nowhere: neither a checkpoint nor a run directory with one",
    "{run} --text /nowhere": "error: --text = '/nowhere': neither a corpus",
    "{run} --sequences=-3": "error: --sequences = '-3': sequences of the text to read (0: all), 0 or more",
    "{run} --model.dimm=3": "error: command line: unknown key model.dimm",
}


def test_a_damaged_checkpoint_and_one_of_another_model_are_refused(run: Path, tiny_config: Make) -> None:
    other = tiny_config("--model.dim=16")
    train(other)
    checkpoint = chosen_checkpoints([run], every=False)[0]
    config = saved_config(read_state(checkpoint, "").config, "", [], world_size=1, trust=True)
    one_rank = single(torch.device("cpu"))
    with pytest.raises(UserError, match=r"another model: model\.dim differs"):
        inspect([checkpoint, RunDir(other).checkpoint(6)], config, one_rank, OPTIONS)
    path = RunDir(other).checkpoint(6)
    (path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        inspect([path], other, one_rank, OPTIONS)
