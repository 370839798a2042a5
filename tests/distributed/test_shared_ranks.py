"""The tests' own ranks: every case has its own result or failure, a stuck one ends in time, and no process stays."""

import os
import time

import pytest
import torch.distributed as dist

from tests.helpers.ranks import SharedRanks, launch_each


def case(what: str) -> tuple[int, int]:
    if what == "fails" and dist.get_rank() == 1:
        raise ValueError("my mistake")
    if what == "hangs":
        time.sleep(1000)
    if what == "dies" and dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()
    return dist.get_rank(), os.getpid()


def exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_case_has_its_own_result_or_failure() -> None:
    names = ("works", "fails", "works after a failure", "dies", "works at the end")
    shared = SharedRanks(2, {name: (case, name) for name in names})
    first = shared["works"]
    assert [rank for rank, _ in first] == [0, 1]
    with pytest.raises(AssertionError, match=r"(?s)case 'fails': rank 1:\nTraceback.*ValueError: my mistake"):
        shared["fails"]
    with pytest.raises(AssertionError, match="case 'dies': rank 1 ended with exit code 3"):
        shared["dies"]
    after, last = shared["works after a failure"], shared["works at the end"]
    assert not {pid for _, pid in first} & {pid for _, pid in after}
    assert not any(exists(pid) for _, pid in [*first, *after, *last])


@pytest.mark.slow
def test_a_case_that_does_not_end_fails_alone() -> None:
    """Ranks start within the limit too, also on a busy machine."""
    shared = SharedRanks(2, {name: (case, name) for name in ("works", "hangs", "works at the end")}, seconds=15.0)
    first = shared["works"]
    with pytest.raises(AssertionError, match="case 'hangs': no end after 15"):
        shared["hangs"]
    last = shared["works at the end"]
    assert not any(exists(pid) for _, pid in [*first, *last])


def test_cases_share_their_processes() -> None:
    first, second = launch_each(2, case, ("one",), ("two",))
    assert first == second
    assert not any(exists(pid) for _, pid in first)
