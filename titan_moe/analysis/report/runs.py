"""Reads run directories for a report."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from titan_moe.analysis.evaluate.results import TaskRow, newest_results
from titan_moe.analysis.report.schema import Inspection, RunConfig
from titan_moe.checkpoint.run_dir import read_rows
from titan_moe.errors import UserError
from titan_moe.runtime.files import read_file
from titan_moe.runtime.json_file import first_mistake, one_line, read_json


class Run:
    """The configuration, metrics and inspections of a run directory."""

    def __init__(self, path: Path, name: str) -> None:
        """Raises UserError when `path` is not a run directory or has no training step."""
        self.path, self.name = path, name
        try:
            values = tomli.loads(read_file(path / "config.toml").decode("utf-8"))
            self.config = RunConfig.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{path / 'config.toml'}: not a run's configuration: {first_mistake(error)}") from error
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "it has no config.toml" if path.is_dir() else "there is no such directory"
            raise UserError(f"{path}: not a run directory: {what}; give the directory of a run") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a run directory: {one_line(error)}") from error
        self.all_rows = read_rows(path / "metrics.jsonl")
        if not self.rows("train"):
            raise UserError(f"{path}: has no training step yet")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl of a kind: "train", "validation" or "eval"."""
        return [row for row in self.all_rows if row["kind"] == kind]

    @cached_property
    def inspections(self) -> list[dict[str, Any]]:
        """The results of `inspect`, in the order of their steps. Raises UserError for a broken file."""
        results = []
        for path in sorted((self.path / "inspect").glob("step-????????.json")):
            try:
                results.append(Inspection.model_validate(read_json(path)).model_dump())
            except ValidationError as error:
                raise UserError(
                    f"{path}: damaged: {first_mistake(error)}; delete it and inspect the run again"
                ) from error
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path}: can't be read: {one_line(error)}; delete it and inspect the run again"
                ) from error
        return sorted(results, key=lambda one: int(one["step"]))

    @cached_property
    def evaluations(self) -> dict[tuple[str, str], tuple[int, TaskRow]]:
        """By task and measure, the step and the result of the newest checkpoint that `eval` was run on. Raises UserError."""
        return newest_results(self.path)

    @property
    def newest(self) -> dict[str, Any]:
        """The newest inspection."""
        return self.inspections[-1]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads runs; each is named by as many last parts of its path as make the names distinct. Raises UserError."""
    for depth in range(1, 8):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return [Run(path, name) for path, name in zip(paths, names, strict=True)]
    raise UserError("report: the same run is given twice")
