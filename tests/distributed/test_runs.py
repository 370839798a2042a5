"""Runs on several ranks equal the run on one process, and continue from one layout to another."""

from pathlib import Path

import pytest

from tests.helpers.rank_runs import EXACT, TERMS, assert_same_rows, rows, run_train
from tests.helpers.runs import Make, train


@pytest.mark.slow
def test_a_run_continues_on_other_numbers_of_ranks_and_layouts(
    tiny_options: list[str], tiny_config: Make, tmp_path: Path
) -> None:
    """1, 2, 4 and 1 ranks; dp, ep, tp, cp, pp; checkpoints written in the background: the same tokens and numbers."""
    exact = [*EXACT, *TERMS, "--regularizers.lb.scope=sequence", "--model.tie_embeddings=false"]
    train(tiny_config(*exact, "--training.steps=40", "--job.name=reference"))
    words = [*tiny_options, *exact, "--checkpoint.async_save=true", "--checkpoint.interval=5"]
    stages = [
        (1, 6, []),
        (2, 12, []),
        (2, 18, ["--parallelism.ep=2"]),
        (4, 24, ["--parallelism.tp=2", "--parallelism.cp=2"]),
        (2, 30, ["--training.microbatch_size=1", "--parallelism.pp=2"]),
        (2, 36, ["--training.microbatch_size=1", "--parallelism.dp_replicate=2"]),
        (1, 40, []),
    ]
    for processes, steps, layout in stages:
        part = run_train(processes, *words, *layout, f"--training.steps={steps}", "--job.name=parts")
        assert part.returncode == 0, part.stderr
        assert part.stdout.count(f"step {steps}/{steps}") == 1  # only one rank prints
    runs = tmp_path / "runs"
    ends = {steps for _, steps, _ in stages}  # a part validates at its end, where the reference run did not
    ours, theirs = (
        [row for row in rows(runs / name) if row["kind"] == "train" or row["step"] not in ends]
        for name in ("parts", "reference")
    )
    assert_same_rows(ours, theirs)
    assert [row.get("data_crc") for row in ours] == [row.get("data_crc") for row in theirs]
    assert sorted(path.name for path in (runs / "parts" / "logs").iterdir()) == [f"rank-{n}.log" for n in range(4)]
    again = run_train(2, *words, "--training.steps=40", "--job.name=parts")
    assert again.returncode == 0
    assert "is finished: 40 steps" in again.stdout


def test_mistakes_are_reported_in_one_line_before_ranks_start(tiny_options: list[str]) -> None:
    done = run_train(3, *tiny_options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    done = run_train(2, *tiny_options, "--parallelism.tp=2", "--model.vocab_size=513", "--tokenizer.vocab_size=512")
    assert done.returncode == 2
    assert "parallelism.tp = 2 must divide model.vocab_size = 513" in done.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MAX_RESTARTS": "one"}, "MAX_RESTARTS = 'one' is not a number"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0:29500"}, "NODE_RANK = '' must be this node's number, 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK = '2' must be this node's number, 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "node0"}, "RDZV_ENDPOINT = 'node0' must be host:port"),
    ],
)
def test_mistakes_in_the_environment(environment: dict[str, str], message: str) -> None:
    done = run_train(2, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
