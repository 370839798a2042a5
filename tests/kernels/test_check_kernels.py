"""The kernels compile for GPUs that are not here, without spilling registers."""

import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT, environment


def check(*options: str) -> list[str]:
    """The rows that scripts/check_kernels.py prints."""
    command = [sys.executable, str(ROOT / "scripts" / "check_kernels.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=570, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[2:]


def test_three_kernels_compile_for_an_h100_without_spills() -> None:
    rows = check("--arch", "90", "--quick")
    assert len(rows) == 3
    assert all(row.split(" | ")[4] == "0" for row in rows)


@pytest.mark.slow
def test_all_kernels_compile_without_spills() -> None:
    rows = check()
    assert {row.split(" | ")[0] for row in rows} == {"| sm_80", "| sm_90", "| sm_100"}


@pytest.mark.slow
def test_a_spill_is_noticed() -> None:
    """With 32 registers the backward has to spill."""
    code = (
        "import scripts.check_kernels as c, triton\n"
        "job = c.jobs(quick=True)[1]\n"
        "compile = triton.compile\n"
        "triton.compile = lambda s, target, options: compile(s, target=target, options={**options, 'maxnreg': 32})\n"
        "assert c.usage(c.compiled(job, 90)).spills > 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
