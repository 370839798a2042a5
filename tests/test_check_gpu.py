"""scripts/check_gpu.py at toy sizes on a CPU: it runs, and what it looks for it finds."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import ROOT, environment


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def check_gpu(*words: str, timeout: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "check_gpu.py"), "--toy", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(), check=False)


def report(folder: Path) -> Any:
    from gpu_checks.report import Report

    return Report(toy=True, seconds=60, facts=folder / "facts")


def test_two_stages_print_what_they_append(tmp_path: Path) -> None:
    output = tmp_path / "found.md"
    output.write_text("what was there before\n")
    done = check_gpu("--stages", "versions,empty", "--output", str(output), timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert output.read_text() == "what was there before\n" + done.stdout
    assert f"| torch | {torch.__version__} |" in done.stdout
    assert "| versions | done |" in done.stdout
    assert "not measured: no card was at hand" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_stages(tmp_path: Path) -> None:
    done = check_gpu("--output", str(tmp_path / "found.md"), timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    from gpu_checks.stages import STAGES

    for name in STAGES:
        assert f"| {name} | done |" in done.stdout


def test_wrong_stage_is_the_users_mistake(tmp_path: Path) -> None:
    done = check_gpu("--stages", "versions,trems", "--output", str(tmp_path / "found.md"), timeout=60)
    assert done.returncode == 2
    assert "no stage 'trems'; there are versions," in done.stderr


def test_a_slow_stage_is_stopped_and_a_broken_one_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import check_gpu

    with (tmp_path / "found.md").open("w") as file:
        output = check_gpu.Output(file)
        assert check_gpu.run_stage("terms", True, 0.5, tmp_path / "facts", output) == "stopped"
        monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # Python can't start
        assert check_gpu.run_stage("terms", True, 20, tmp_path / "facts", output) == "failed"
    shown = capsys.readouterr().out
    assert "**Stopped after its 0 s.**" in shown
    assert "**Failed with status 1:**" in shown


def test_an_error_of_a_thousandth_is_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of terms sees a weight that is wrong by 1e-3 on the device, and nothing when none is."""
    from gpu_checks import terms

    good, bad = report(tmp_path), report(tmp_path)
    terms.check(good, "z", terms.MODEL, "z", {"weight": 1.0})
    assert good.status == 0
    build = terms.build

    def wrong(settings, name, options, dtype, device):  # type: ignore[no-untyped-def]
        model = build(settings, name, options, dtype, device)
        if dtype == torch.float32:
            model.layers["0"].attention_norm.weight.data *= 1.001
        return model

    monkeypatch.setattr(terms, "build", wrong)
    terms.check(bad, "z", terms.MODEL, "z", {"weight": 1.0})
    from gpu_checks.report import DIFFERENT

    assert bad.status == DIFFERENT


def test_every_choice_of_every_term_is_compared() -> None:
    from gpu_checks import terms

    labels = [label for label, _, _ in terms.variants()]
    assert {"lb", "z", "sp", "cp", "o", "v", "erc"} <= set(labels)
    assert {"sp, method = sketch", "cp, source = transition", "o, variant = code", "lb, scope = sequence"} <= set(
        labels
    )
    assert not [label for label, count in Counter(labels).items() if count > 1]


def test_host_waits_are_counted(tmp_path: Path) -> None:
    from gpu_checks.syncs import counted

    x = torch.arange(4.0)
    with counted(report(tmp_path)) as found:
        x.sum().item()
        x.nonzero()
        x.tolist()
        x.repeat_interleave(torch.tensor([1, 2, 3, 4]))
        x.repeat_interleave(torch.tensor([1, 2, 3, 4]), output_size=10)
        x.exp().sum()
    assert found == {"_local_scalar_dense": 1, "nonzero": 1, "tolist": 1, "repeat_interleave": 1}


def test_an_unwritten_gradient_of_an_unused_expert_is_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_checks import empty_experts
    from gpu_checks.report import DIFFERENT

    class Unwritten(torch.autograd.Function):
        """The product, but the gradient of an expert without rows is not zero."""

        @staticmethod
        def forward(ctx, x, weight, offsets):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, weight, offsets)
            return empty_experts.expected(x, weight, offsets.tolist())

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            x, weight, offsets = ctx.saved_tensors
            with torch.enable_grad():
                own = [t.detach().requires_grad_() for t in (x, weight)]
                out = empty_experts.expected(own[0], own[1], offsets.tolist())
            grad_x, grad_weight = torch.autograd.grad(out, own, grad)
            grad_weight[offsets.diff(prepend=offsets.new_zeros(1)) == 0] = float("nan")
            return grad_x, grad_weight, None

    broken = report(tmp_path)
    monkeypatch.setattr(empty_experts, "grouped_linear", Unwritten.apply)
    empty_experts.stage(broken)
    assert broken.status == DIFFERENT


def test_stages_find_packages_that_the_user_has_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_checks.report import python_path

    monkeypatch.setenv("PYTHONPATH", "/brought")
    assert python_path().split(":") == [str(ROOT / "scripts"), str(ROOT), "/brought"]
    monkeypatch.delenv("PYTHONPATH")
    assert python_path().split(":") == [str(ROOT / "scripts"), str(ROOT)]


def test_an_arm_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process of a side, in this process: its lines name the error, and the stage's row repeats it."""
    from gpu_checks import kernels
    from gpu_checks.report import FAILED

    monkeypatch.setattr(kernels, "ARMS", {"no such option": {"sp": {"wieght": 1.0}}, "no term": {}})
    monkeypatch.setattr(kernels, "TOLERANCE", {torch.float32: 1e-5})
    kernels.measure(report(tmp_path), tmp_path)
    _, broken, good = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert "wieght" in broken["error"]
    assert good == {"label": "no term", "dtype": "torch.float32", "measured": None}
    stage = report(tmp_path)
    with stage.trial("no such option"):
        kernels.compare(stage, broken, good, (tmp_path, tmp_path))
    kernels.compare(stage, good, good, (tmp_path, tmp_path))
    shown = capsys.readouterr().out
    assert "| no such option | **failed: RuntimeError: kernels on: ValidationError" in shown
    assert "| no term | float32 | 0.0e+00 |" in shown
    assert stage.status == FAILED


def test_goals_are_judged() -> None:
    from gpu_checks.goals import GOALS, rows

    assert {row[2] for row in rows({}, "")} == {"not measured: no card was at hand"}
    good = {"sp and cp/eager": 0.03, "sp and cp/compiled": 0.004, "step/TorchTitan": 1.6, "step/Transformers": 3.1}
    good |= {"layer/small": 0.8, "layer/medium": 0.9, "layer/large": 0.7, "waits beyond TorchTitan's": 0}
    assert [row[3] for row in rows(good, "H100")] == ["yes"] * len(GOALS)
    bad = good | {"sp and cp/compiled": 0.006, "layer/large": 1.1, "step/TorchTitan": 1.4, "step/Transformers": 2.0}
    bad |= {"waits beyond TorchTitan's": 1}
    assert [row[3] for row in rows(bad, "H100")] == ["no"] * len(GOALS)
    assert rows({"step/Transformers": 3.1}, "H100")[0][2].startswith("not measured: no sp and cp/eager")
