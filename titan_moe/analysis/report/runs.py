"""Run directories, read for a report."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli

from titan_moe.checkpoint.run_dir import read_rows
from titan_moe.errors import UserError


class Run:
    """What a run directory holds of numbers."""

    def __init__(self, path: Path, name: str) -> None:
        """Raises UserError for what is no run directory, or has no training step."""
        self.path, self.name = path, name
        try:
            self.config: dict[str, Any] = tomli.loads((path / "config.toml").read_text(encoding="utf-8"))
            self.all_rows = read_rows(path / "metrics.jsonl")
        except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
            raise UserError(f"{path}: not a run directory: {error}") from error
        if not self.rows("train"):
            raise UserError(f"{path}: has no training step yet")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl: "train" or "validation"."""
        return [row for row in self.all_rows if row["kind"] == kind]

    @cached_property
    def inspections(self) -> list[dict[str, Any]]:
        """What `inspect` found at each checkpoint, by step."""
        found = []
        for path in sorted((self.path / "inspect").glob("step-????????.json")):
            try:
                found.append(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise UserError(f"{path}: can't be read: {error}; delete it and inspect the run again") from error
        return sorted(found, key=lambda one: int(one["step"]))

    @property
    def newest(self) -> dict[str, Any]:
        """The newest inspection."""
        return self.inspections[-1]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs named by their directories, with as much of the path as tells them apart."""
    for depth in range(1, 8):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return [Run(path, name) for path, name in zip(paths, names, strict=True)]
    raise UserError("report: the same run is given twice")
