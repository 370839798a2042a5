"""scripts/check_torch_versions.py: what it installs, how it reads pytest, and a run in an environment that is there."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, environment


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "check_torch_versions.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)


def test_one_torch_and_no_other_triton_is_asked_for() -> None:
    from check_torch_versions import packages

    wanted = packages("2.11.0")
    assert wanted[0] == "torch==2.11.0"
    assert not [word for word in wanted[1:] if word.startswith(("torch>", "torch=", "triton"))]
    assert {"pytest>=8", "torchao>=0.18,<0.20"} <= set(wanted)


def test_a_wrong_version_is_the_users_mistake(tmp_path: Path) -> None:
    done = run("--versions", "2.11.0,newest", "--folder", str(tmp_path))
    assert done.returncode == 2
    assert "'newest' is no version of torch" in done.stderr


def test_a_failure_of_one_version_is_in_the_table(tmp_path: Path) -> None:
    """Environments whose Python is this one, with a pip that installs nothing or fails."""
    for version, status in (("2.11.0", 0), ("2.14.1", 3)):
        python = tmp_path / f"torch-{version}" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit {status}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    done = run("--folder", str(tmp_path), "-n", "0", "tests/test_torch_versions.py", "-k", "triton_is_asked_for")
    import torch

    assert done.returncode == 1
    assert f"| 2.11.0 | {torch.__version__} | 1 passed" in done.stdout
    assert "| 2.14.1 | not installed: pip ended with status 3 |  |" in done.stdout
