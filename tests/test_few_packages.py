"""Training needs few packages: those that only other verbs or options use are imported where they are used."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import complaints, environment
from titan_moe.errors import pip_install

REFUSED = (
    "torchao",
    "pymetis",
    "matplotlib",
    "rich",
    "scipy",
    "sklearn",
    "jinja2",
    "pandas",
    "transformers",
    "pyarrow",
)
PILLOW = "PIL"  # a requirement of tensorboard's own, which encodes images with it
RUN = """
import sys
from importlib.machinery import PathFinder

refused, find = set(sys.argv.pop(1).split(",")), PathFinder.find_spec
assert not refused & set(sys.modules)

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in refused else find(name, path, target)

PathFinder.find_spec = classmethod(find_spec)
from titan_moe.cli import main
main()
"""


def run(refused: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, ",".join(refused), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_training_without_the_packages_of_other_verbs(
    tensorboard: bool, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, "--training.steps=2", f"--metrics.tensorboard={str(tensorboard).lower()}"]
    done = run([*REFUSED, *([] if tensorboard else [PILLOW, "tensorboard"])], "train", *words)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "debug"
    assert (run_dir / "metrics.jsonl").read_text().count("\n") >= 2
    assert any((run_dir / "tensorboard").glob("events*")) is tensorboard


def test_a_missing_package_is_one_line(tiny_options: list[str], tmp_path: Path) -> None:
    words = [*tiny_options, "--float8.enable=true", "--training.dtype=bfloat16", "--model.moe.hidden_dim=32"]
    for command, package in ((["train", *words], "torchao"), (["report", str(tmp_path)], "matplotlib")):
        done = run([package], *command)
        assert done.returncode == 2
        assert complaints(done.stderr) == [
            f"error: this needs the package {package}, which is not installed: {pip_install(package)}"
        ]
