"""Runs tests with the oldest and the newest PyTorch that pyproject.toml allows, each in a virtual environment of its own.

    python scripts/check_torch_versions.py                                  both, the everyday tests
    python scripts/check_torch_versions.py --versions 2.12.1 tests/model    one version, some tests; further words go to pytest

Environments are made in --folder and kept: the next run only installs what has changed. On Linux the registry's PyTorch is
its CUDA build, 3 GB to download and 5 GB on disk per version; where pip is set up to take a CPU build, that one is installed.
Prints a table at the end. Exit status: 0 when all tests pass with all versions, 1 when not, 2 for a wrong option.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from check_environment import list_in

ROOT = Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    version: str
    installed: str
    """What PyTorch itself says, or what failed."""
    tests: str
    minutes: float
    passed: bool


def packages(version: str) -> list[str]:
    """What pip is asked for: this PyTorch, and all that training and the tests need beside it, with any version of triton,
    which each PyTorch chooses."""
    text = (ROOT / "pyproject.toml").read_text()
    wanted = [
        line
        for line in list_in(text, "dependencies") + list_in(text, "dev")
        if not re.match("(torch|triton)[<>=]", line)
    ]
    return [f"torch=={version}", *wanted]


def interpreter(version: str, folder: Path) -> Path:
    """Python of the environment with this version; makes or completes it. Raises CalledProcessError."""
    environment = folder / f"torch-{version}"
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages(version)]
    subprocess.run(install, check=True, env={**os.environ, "PIP_CONSTRAINT": ""})
    return python


def check(version: str, folder: Path, words: list[str]) -> Outcome:
    """Installs, then runs the tests."""
    began = time.monotonic()

    def outcome(installed: str, tests: str, passed: bool = False) -> Outcome:
        return Outcome(version, installed, tests, (time.monotonic() - began) / 60, passed)

    try:
        python = interpreter(version, folder)
    except subprocess.CalledProcessError as error:
        return outcome(f"not installed: pip ended with status {error.returncode}", "")
    asked = [str(python), "-c", "import torch; print(torch.__version__)"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    if found.returncode:
        return outcome(f"cannot be imported: {found.stderr.strip().splitlines()[-1][:150]}", "")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    command = [str(python), "-m", "pytest", "--color=no", *words]
    done = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    lines = []
    for line in done.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    status = done.wait()
    return outcome(found.stdout.strip(), summary(lines, status), status == 0)


def summary(lines: list[str], status: int) -> str:
    """pytest's last line ("3 failed, 400 passed in 12 s"), or its exit status where there is none."""
    found = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error|deselected|skipped)", line)]
    return found[-1] if found else f"pytest ended with status {status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--versions", default="2.11.0,2.14.1", help="of torch, by commas (2.11.0,2.14.1)")
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache" / "titan-moe-torch", help="of environments"
    )
    arguments, words = parser.parse_known_args()
    for version in arguments.versions.split(","):
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            parser.error(f"--versions: {version!r} is no version of torch, such as 2.11.0")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    words = words or ["-n", "2", "--dist", "loadfile", "-m", "not slow"]
    outcomes = [
        check(version, arguments.folder, ["-o", "addopts=--strict-markers", *words])
        for version in arguments.versions.split(",")
    ]
    print("\n| torch asked for | installed | tests | minutes |\n|---|---|---|---|")
    for one in outcomes:
        print(f"| {one.version} | {one.installed} | {one.tests} | {one.minutes:.0f} |")
    return 0 if all(one.passed for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
