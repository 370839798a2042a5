"""What the launcher reports of failed ranks, from the exit statuses and error files that it may see."""

import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from titan_moe.errors import LostRanksError, TrainingError
from titan_moe.runtime import launch, rendezvous, stopping
from titan_moe.runtime.launch import record_error, report_failure


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a rank's failure: the exit code that torchrun saw, and the error and exit status that the rank recorded."""

    def make(rank: int, code: int, error: Exception | None = None, status: int = 1) -> ProcessFailure:
        path = tmp_path / f"error-{rank}.json"
        if error is not None:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
            record_error(error, status)
            time.sleep(0.01)  # the next one fails later
        return ProcessFailure(rank, 1000 + rank, code, str(path))

    return make


@pytest.mark.parametrize("code", [1, -signal.SIGTERM, 143])
def test_sigterm_while_a_failed_rank_exits_does_not_hide_its_error(
    failed, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ranks fail; torchrun sees rank 1 exit first and ends rank 0, which had recorded its error before."""
    failures = {0: failed(0, code, TrainingError("step 5: loss is not finite")), 1: failed(1, 1, TrainingError("same"))}
    assert report_failure(failures) == 1
    assert "rank 0 failed, status 1: step 5: loss is not finite" in capsys.readouterr().err


def test_a_killed_rank_comes_before_the_collective_that_failed_for_it(
    failed, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = failed(1, -signal.SIGKILL)
    assert report_failure({0: failed(0, 1, LostRanksError("a collective failed")), 1: killed}) == 137
    assert "rank 1 died of SIGKILL\n" in capsys.readouterr().err


def test_a_stuck_rank_that_torchrun_kills_in_the_end_comes_last(failed, capsys: pytest.CaptureFixture[str]) -> None:
    lost = failed(0, 1, LostRanksError("a collective failed: node b is gone"))
    stuck = failed(1, -signal.SIGKILL)
    stuck.timestamp += 30  # torchrun's patience after the SIGTERM
    assert report_failure({0: lost, 1: stuck}) == 1
    assert "rank 0 failed, status 1: a collective failed: node b is gone" in capsys.readouterr().err


def test_ranks_that_exit_because_another_one_failed_come_last(failed, capsys: pytest.CaptureFixture[str]) -> None:
    failures = {0: failed(0, 2), 1: failed(1, 2, TrainingError("data.corpus = 'x' is no file"), 2)}
    assert report_failure(failures) == 2
    assert "rank 1 failed, status 2: data.corpus = 'x' is no file" in capsys.readouterr().err


def test_nothing_is_reported_when_ranks_saved_after_a_signal(failed, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_failure({0: failed(0, 143), 1: failed(1, 143)}) == 143
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ended", [0, 1])
def test_a_rank_that_torchrun_ends_after_another_stopped_is_not_reported(
    failed, capsys: pytest.CaptureFixture[str], ended: int
) -> None:
    """Rank 0's stdout had no reader any more; both ranks agreed to stop, and one was faster."""
    assert report_failure({ended: failed(ended, -signal.SIGTERM), 1 - ended: failed(1 - ended, 129)}) == 129
    assert capsys.readouterr().err == ""


def test_the_launcher_forwards_the_signals_that_stop_a_run() -> None:
    assert launch.STOPPING == stopping.STOPPING


@pytest.mark.parametrize(
    ("met", "status", "advice"), [(False, 2, "start the same command on each"), (True, 1, "is gone")]
)
def test_a_lost_store_is_a_mistake_only_before_the_nodes_have_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], met: bool, status: int, advice: str
) -> None:
    monkeypatch.setattr(rendezvous.SeveralNodes, "met", met)
    options = Namespace(rdzv_endpoint="node0:29500", nnodes="2")
    assert launch.report_lost_store("Broken pipe", options) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: RDZV_ENDPOINT = node0:29500: Broken pipe; ")
    assert advice in line
