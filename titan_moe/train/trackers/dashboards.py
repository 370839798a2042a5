"""TensorBoard, Weights & Biases and Trackio: scalars every `metrics.interval` steps, heat maps at every validation."""

import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from titan_moe.config.describe import to_toml
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from titan_moe.train.validation import Validation

PROJECT = "titan_moe"
Image = npt.NDArray[np.uint8]
# Five points of the perceptually uniform colour map "viridis", dark to bright.
VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)


def routing_images(validation: Validation) -> dict[str, Image]:
    """Load per MoE layer (row) and expert (column); P(expert v in the next layer given e in this one) per pair of layers."""
    images = {f"routing/cond_{n}_{n + 1}": heat_map(cond, float(cond.max())) for n, cond in enumerate(validation.cond)}
    if validation.load.numel():
        images["routing/load"] = heat_map(validation.load * validation.load.shape[1], 2.0)
    return images


def heat_map(values: Tensor, highest: float, least_pixels: int = 256) -> Image:
    """A matrix as an RGB image (H, W, 3): 0 is dark, `highest` and above are bright."""
    scaled = np.clip(values.double().numpy() / (highest or 1.0), 0.0, 1.0) * (len(VIRIDIS) - 1)
    points = np.arange(len(VIRIDIS))
    image = np.stack([np.interp(scaled, points, VIRIDIS[:, channel]) for channel in range(3)], axis=-1)
    zoom = max(1, -(-least_pixels // max(image.shape[:2])))
    return image.astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)


class Dashboard:
    """Which rows all three show, and under which names. `show` is each one's own; `image` is its class of images."""

    image: Callable[[Image], Any]

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir, self.interval = config, run_dir, config.metrics.interval

    def log(self, row: dict[str, Any]) -> None:
        step, kind = row["step"], row["kind"]
        if kind != "train" or step == 1 or step % self.interval == 0:
            scalars = {name: value for name, value in row.items() if name not in ("step", "kind", "data_crc")}
            self.show(step, {name if "/" in name else f"{kind}/{name}": value for name, value in scalars.items()})

    def log_images(self, step: int, images: dict[str, Image]) -> None:
        self.show(step, {name: self.image(image) for name, image in images.items()})

    def show(self, step: int, values: dict[str, Any]) -> None:
        raise NotImplementedError


def _skip_file_errors(failure: threading.ExceptHookArgs) -> None:
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


class TensorBoard(Dashboard):
    """Files in the run directory's `tensorboard/`, with the configuration as text."""

    def start(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard raises an error of its writing thread again in the next call; the thread need not print it too.
        threading.excepthook = _skip_file_errors
        purge_step = step + 1 if step else 0  # hides what an earlier process wrote from there on
        self.writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge_step)
        self.writer.add_text("config", f"```toml\n{to_toml(self.config)}```", purge_step)

    def show(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_images(self, step: int, images: dict[str, Image]) -> None:
        for name, image in images.items():
            self.writer.add_image(name, image, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB(Dashboard):
    """Weights & Biases: project `titan_moe` or $WANDB_PROJECT, run `job.name`. A resumed run keeps its id."""

    def start(self, step: int) -> None:
        import wandb

        self.image, known = wandb.Image, self.run_dir / "wandb-id"
        if not (step and known.exists()):
            known.write_text(uuid.uuid4().hex)
        where: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": self.config.job.name,
            "dir": self.run_dir,
        }
        config = self.config.model_dump(mode="json")
        try:
            self.run = wandb.init(**where, id=known.read_text(), resume="allow", config=config)
        except wandb.Error as error:  # no account, say
            text = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"metrics.trackers: wandb: {text}; set WANDB_MODE=offline to go without") from error
        # On W&B's own axis, steps that are logged again after a resumption would be dropped as out of order.
        self.run.define_metric("*", step_metric="step")

    def show(self, step: int, values: dict[str, Any]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class Trackio(Dashboard):
    """Trackio: project `titan_moe`, run `job.name`, in the local $TRACKIO_DIR. A resumed run keeps its name."""

    def start(self, step: int) -> None:
        import trackio

        self.image, self.finish = trackio.Image, trackio.finish
        options = {"config": self.config.model_dump(mode="json"), "resume": "allow" if step else "never"}
        self.run = trackio.init(PROJECT, self.config.job.name, embed=False, **options)

    def show(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step)

    def close(self) -> None:
        self.finish()
