"""What the launcher says of the processes it lost, as they may lie before it."""

import signal
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from titan_moe.errors import LostRanksError, TrainingError
from titan_moe.runtime.launch import first_failure
from titan_moe.runtime.lifesigns import record_failure


@pytest.fixture
def lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the failure of a rank: the exit code its parent saw, and what it wrote before (an error and the status to be)."""

    def make(rank: int, code: int, error: Exception | None = None, status: int = 1) -> ProcessFailure:
        path = tmp_path / f"error-{rank}.json"
        if error is not None:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
            record_failure(error, status)
            time.sleep(0.01)  # the next one fails later
        return ProcessFailure(rank, 1000 + rank, code, str(path))

    return make


@pytest.mark.parametrize("code", [1, -signal.SIGTERM, 143])
def test_a_signal_on_the_way_out_does_not_hide_the_error(lost, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """All ranks found the bad number; the first to leave made the launcher end the others, one of which had failed before."""
    failures = {0: lost(0, code, TrainingError("step 5: loss is not finite")), 1: lost(1, 1, TrainingError("the same"))}
    assert first_failure(failures) == 1
    assert "rank 0 failed, status 1: step 5: loss is not finite" in capsys.readouterr().err


def test_who_was_killed_comes_before_who_missed_it(lost, capsys: pytest.CaptureFixture[str]) -> None:
    failures = {0: lost(0, 1, LostRanksError("a collective failed")), 1: lost(1, -signal.SIGKILL)}
    assert first_failure(failures) == 137
    assert "rank 1 died of SIGKILL\n" in capsys.readouterr().err


def test_who_saved_on_a_signal_has_said_so(lost, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_failure({0: lost(0, 143), 1: lost(1, 143)}) == 143
    assert capsys.readouterr().err == ""
