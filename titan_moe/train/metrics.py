"""Where numbers go: metrics.jsonl, TensorBoard, the console, and the user's own trackers. All get the same rows."""

import json
import math
import sys
import threading
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from titan_moe.model.gemm import local
from titan_moe.train.validation import Validation
from torchtitan_ext.carry import Carry
from torchtitan_ext.metrics import dead_share, max_vio
from torchtitan_ext.terms import Terms


def routing_row(carry: Carry, terms: Terms) -> dict[str, float]:
    """The `reg/*` and `moe/*` fields of a row, from the carry summed over the step's micro-batches."""
    row = {f"reg/{name}": value for name, value in zip(terms.names, carry.terms.tolist(), strict=True)}
    if carry.counts.shape[0] == 0:
        return row
    row["moe/max_vio"] = max_vio(carry.counts).mean().item()
    row["moe/dead"] = dead_share(carry.counts).mean().item()
    means = dict(zip(terms.measures, carry.sums.mean(0).tolist(), strict=True))
    return row | {f"moe/{name}": value for name, value in means.items()}


class JsonLines:
    """One JSON object a line, flushed as it is written."""

    def __init__(self, path: Path) -> None:
        self.file: IO[str] = path.open("a")

    def log(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _quiet_about_files(failure: threading.ExceptHookArgs) -> None:
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


class TensorBoard:
    """Scalars every `interval` steps, heat maps at every validation, the configuration as text."""

    def __init__(self, folder: Path, interval: int, purge_step: int, config_toml: str) -> None:
        """purge_step: points from this step on, which an earlier process wrote, are dropped."""
        # The writing thread's own traceback is noise: tensorboard raises its error again in the next call here.
        threading.excepthook = _quiet_about_files
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        self.interval = interval
        self.writer.add_text("config", f"```toml\n{config_toml}```", purge_step)

    def log(self, row: dict[str, Any]) -> None:
        step, kind = row["step"], row["kind"]
        if kind == "train" and step % self.interval and step != 1:
            return
        for name, value in row.items():
            if name not in ("step", "kind", "data_crc"):
                tag = f"validation/{name}" if kind == "validation" else name if "/" in name else f"train/{name}"
                self.writer.add_scalar(tag, value, step)

    def routing(self, step: int, validation: Validation) -> None:
        """Load per layer and expert (a row is a layer) and cond[e, v] of each pair of layers."""
        if validation.load.numel():
            relative = validation.load * validation.load.shape[1]
            self.writer.add_image("routing/load", heat_map(relative, 2.0), step, dataformats="HWC")
        for pair, cond in enumerate(validation.cond):
            name = f"routing/cond_{pair}_{pair + 1}"
            self.writer.add_image(name, heat_map(cond, float(cond.max())), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


# Five points of the perceptually uniform map "viridis", dark to bright.
VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)


def heat_map(values: Tensor, highest: float, least_pixels: int = 256) -> npt.NDArray[np.uint8]:
    """A matrix as an RGB picture (H, W, 3): 0 is dark, `highest` and above are bright."""
    scaled = np.clip(values.double().numpy() / (highest or 1.0), 0.0, 1.0) * (len(VIRIDIS) - 1)
    places = np.arange(len(VIRIDIS))
    picture = np.stack([np.interp(scaled, places, VIRIDIS[:, channel]) for channel in range(3)], axis=-1)
    zoom = max(1, -(-least_pixels // max(picture.shape[:2])))
    return picture.astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)


class Console:
    """A line that a person can read every `interval` steps, and a progress bar on a terminal."""

    def __init__(self, log: Any, steps: int, start: int, interval: int) -> None:
        self.log_line, self.steps, self.interval = log, steps, interval
        self.recent: list[float] = []
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not sys.stderr.isatty(), leave=False)

    def log(self, row: dict[str, Any]) -> None:
        if row["kind"] == "validation":
            self.line(
                f"validation at step {row['step']}: loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}  "
                f"bits per byte {row['bits_per_byte']:.4f}"
            )
            return
        self.bar.update(1)
        self.recent = [*self.recent[-49:], row["step_seconds"]]
        if row["step"] % self.interval and row["step"] not in (1, self.steps):
            return
        left = (self.steps - row["step"]) * sorted(self.recent)[len(self.recent) // 2]
        terms = "  ".join(f"{name[4:]} {row[name]:.4g}" for name in row if name.startswith("reg/"))
        self.line(
            f"step {row['step']}/{self.steps}  {short(row['tokens'])} tokens  loss {row['loss']:.4f}  ce {row['ce']:.4f}  "
            f"{terms}  ppl {math.exp(min(row['ce'], 700)):.4g}  {short(row['tokens_per_second'])} tok/s  left {duration(left)}"
        )

    def line(self, text: str) -> None:
        self.bar.clear()
        self.log_line(text)
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


def short(number: float) -> str:
    """1234567 as 1.2M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def first_non_finite(values: dict[str, float]) -> str | None:
    """Name of the first value that is not a number or infinite."""
    return next((name for name, value in values.items() if not math.isfinite(value)), None)


def non_finite_gradient(model: torch.nn.Module) -> str:
    """Name of the first parameter whose gradient is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(local(parameter.grad)).all()):
            return name
    return "another rank's part, or their norm overflows"
