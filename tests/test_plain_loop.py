"""docs/library.md: its training loop is scripts/plain_loop.py, which runs and shows what the page says."""

import re
import subprocess
import sys

import pytest
import torch

from tests.helpers.commands import ROOT, environment
from torchtitan_ext.losses import specialization_loss

SCRIPT, PAGE = ROOT / "scripts/plain_loop.py", ROOT / "docs/library.md"


def test_page_and_script_are_the_same() -> None:
    first, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert first == SCRIPT.read_text()


@pytest.mark.slow
def test_loop_shows_what_the_page_says() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [dict(zip(("overlap", "mass"), map(float, found), strict=True)) for found in numbers(done.stdout)]
    plain, with_sp, with_cp = rows
    # Independent directions have 1/64 = 0.016.
    assert with_sp["overlap"] < 0.05 < 0.2 < plain["overlap"]
    assert with_cp["mass"] > plain["mass"] + 0.05
    # The page shows lines of the same form.
    assert len(numbers(PAGE.read_text())) == 3


def numbers(text: str) -> list[tuple[str, str]]:
    form = r"^sp [\d.]+ +cp [\d.]+ +cross-entropy [\d.]+  overlap ([\d.]+)  top-k mass ([\d.]+)  max_vio [\d.]+$"
    return re.findall(form, text, re.MULTILINE)


def test_weighted_microbatches_add_up_to_the_batch() -> None:
    """As the page says, with its own line of code."""
    torch.manual_seed(0)
    labels, z = torch.where(torch.rand(4, 8) < 0.3, -100, 1), torch.randn(32, 3, 16, dtype=torch.float64)
    labelled_tokens_of_the_global_batch = (labels != -100).sum()
    whole = specialization_loss(z[labels.flatten() != -100])
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith("weights = "))
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        names = {"labels": labels[part], "labelled_tokens_of_the_global_batch": labelled_tokens_of_the_global_batch}
        exec(line, names)
        parts.append(specialization_loss(z[part.start * 8 : part.stop * 8], weights=names["weights"]))
    assert torch.allclose(sum(parts), whole, rtol=1e-6)
