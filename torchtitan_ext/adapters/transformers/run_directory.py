"""A run directory that `titan-moe report` reads, written from any training loop around an attached model.

    run = RunDirectory("runs/tuned", attached, steps=100)
    for step in range(1, 101):
        attached.step = step
        ...
        run.log(step, tokens=seen, loss=loss)
    run.write_inspection(attached.inspect(validation_batches, step=100))

Files: config.toml (the settings that the report shows), metrics.jsonl, inspect/step-00000100.json.
"""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtitan_ext.adapters.transformers.attached import Attached

NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


class RunDirectory:
    """Call it on one rank only."""

    def __init__(
        self, path: str | Path, attached: Attached, steps: int, start: int = 0, seed: int = 0, text: str = "fine-tuning"
    ) -> None:
        """steps: of the whole run. start: the step from which a run goes on; later rows are removed. text: what the report
        calls the data. Raises FileExistsError if there is a run already and start is 0."""
        self.path, self.attached = Path(path), attached
        self.metrics = self.path / "metrics.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)
        rows = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        if rows and start == 0:
            raise FileExistsError(
                f"{self.path}: has a run already; choose another directory, or give the step to go on from"
            )
        kept = [line for line in rows if json.loads(line)["step"] <= start]
        write(self.metrics, "".join(f"{line}\n" for line in kept))
        write(self.path / "config.toml", toml(settings(attached, steps, seed, text)))

    def log(
        self, step: int, tokens: int, loss: float, metrics: Mapping[str, float] | None = None, **more: float
    ) -> None:
        """Adds a training row. tokens: so far. loss: with the terms. metrics: of `Attached.metrics`, summed over ranks where
        there are several; this rank's when not given. more: further numbers, such as lr and grad_norm."""
        values = dict(self.attached.metrics() if metrics is None else metrics)
        ce = loss - self.attached.objective(values)
        row = {"kind": "train", "step": step, "tokens": tokens, "loss": loss, "ce": ce, **values, **more}
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOFOLLOW
        with open(os.open(self.metrics, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def write_inspection(self, result: Mapping[str, Any]) -> Path:
        """Writes what `Attached.inspect` returned; returns the file."""
        folder = self.path / "inspect"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{result['step']:08d}.json"
        write(path, json.dumps(result, allow_nan=False))
        return path


def settings(attached: Attached, steps: int, seed: int, text: str) -> dict[str, dict[str, Any]]:
    """The tables of config.toml that a report shows."""
    config, found = attached.model.config.get_text_config(), attached.structure
    tables: dict[str, dict[str, Any]] = {
        "job": {"seed": seed},
        "model": {
            "dim": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "vocab_size": config.vocab_size,
        },
        "model.moe": {
            "experts": found.experts,
            "top_k": found.top_k,
            "hidden_dim": found.hidden_dim,
            "first_dense_layers": config.num_hidden_layers - len(found.layers),
            "score": attached.score or "softmax",
        },
        "data": {"corpus": text},
        "training": {"steps": steps},
    }
    for term in (*attached.terms.terms, *attached.sequence_terms.terms):
        tables[f"regularizers.{term.name}"] = term.options.model_dump()
    return tables


def toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of numbers, strings and booleans, all of which TOML spells as JSON does."""
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    )


def write(path: Path, content: str) -> None:
    """Writes a file completely or not at all: under another name, then renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o666), "w", encoding="utf-8"
        ) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
