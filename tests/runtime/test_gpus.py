"""What is set where a GPU computes, as far as a machine without one can show."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import environment
from titan_moe.config.checks import check_grouped_products
from titan_moe.config.load import load_config
from titan_moe.errors import UserError
from titan_moe.runtime import gpus
from titan_moe.runtime.device import make_deterministic
from titan_moe.train.garbage import collected_every


def test_a_gpu_is_here_if_a_driver_is_and_nothing_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in gpus.HIDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpus, "DRIVERS", (tmp_path / "driver",))
    assert not gpus.gpu_here()
    (tmp_path / "driver").touch()
    assert gpus.gpu_here()
    for value, seen in (("0,1", True), ("", False), ("-1", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert gpus.gpu_here() is seen


@pytest.mark.parametrize(
    ("gpu", "given", "wanted"),
    [
        (True, {}, "expandable_segments:True"),
        (True, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
        (False, {}, None),
    ],
)
def test_allocators(gpu: bool, given: dict[str, str], wanted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("titan_moe.runtime.allocator.keep_freed_memory", lambda: called.append(1))
    monkeypatch.setattr(gpus, "gpu_here", lambda: gpu)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    gpus.prepare_process()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == wanted
    assert called == ([] if gpu else [1])


def test_rows_of_the_grouped_product() -> None:
    """bfloat16 rows of D and of F / tp numbers are multiples of 16 bytes."""

    def check(dim: int, hidden: int, tp: int = 1, dtype: str = "bfloat16") -> None:
        words = [
            f"--model.dim={dim}",
            f"--model.moe.hidden_dim={hidden}",
            "--model.heads=4",
            "--model.head_dim=16",
            "--tokenizer.vocab_size=512",
        ]
        config = load_config("debug", [*words, f"--parallelism.tp={tp}", f"--training.dtype={dtype}"], world_size=tp)
        check_grouped_products(config, str)

    check(64, 680)
    check(64, 672, tp=4)
    check(64, 676, dtype="float32")
    with pytest.raises(
        UserError, match=r"model\.moe\.hidden_dim = 676 / parallelism\.tp = 4: .* 704 or another multiple of 32"
    ):
        check(64, 676, tp=4)
    with pytest.raises(UserError, match=r"model\.dim = 60: .* 64 or another multiple of 8"):
        check(60, 64)


def test_deterministic_products_have_a_workspace_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_deterministic()
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


def test_garbage_is_collected_at_given_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(gc, "collect", calls.append)
    was_on = gc.isenabled()
    with collected_every(3) as after:
        assert not gc.isenabled()
        for step in range(1, 8):
            after(step)
    assert gc.isenabled() is was_on
    assert len(calls) == 3  # at the start, and after steps 3 and 6


def test_the_check_runs_where_a_gpu_is_here(tmp_path: Path) -> None:
    """By the command line, with a file in place of the driver's."""
    (tmp_path / "driver").touch()
    code = (
        "import sys, pathlib; from titan_moe.runtime import gpus; gpus.DRIVERS = (pathlib.Path(sys.argv.pop(1)),); "
        "from titan_moe.cli import main; main()"
    )
    words = [
        str(tmp_path / "driver"),
        "plan",
        "--config",
        "debug",
        "--model.moe.hidden_dim=36",
        "--training.dtype=bfloat16",
    ]
    variables = {name: value for name, value in environment().items() if name not in gpus.HIDING}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=variables, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "model.moe.hidden_dim" in done.stderr
    assert "need a multiple of 8" in done.stderr
