"""A file per finished cell of a sweep, by which results move between machines without their run directories.

    SWEEP/cells/CELL.json     the cell's numbers, and a key: a digest of everything that decides them

A row counts as the result of a cell if its key is that of the cell: the resolved configuration, the runs that it needs and
`BEHAVIOUR`. Settings that say where files lie or how the work is divided do not enter it, so that another machine's rows
count. A row also says what was measured on its run. When the sweep's file asks for other measures than that, the cell is
not finished: its run, if it is there, is measured again.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from titan_moe.analysis.sweep.grid import Cell, Sweep
from titan_moe.checkpoint.changes import within
from titan_moe.checkpoint.state import dump
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from titan_moe.runtime.files import write_file
from titan_moe.runtime.json_file import read_object

BEHAVIOUR = 1
"""Version of what training computes. Raise it with a change of the code that changes the numbers of a run beyond rounding."""
FOLDER = "cells"
ROW_BYTES = 1 << 20
MEASURED = ("validations", "inspect", "inspect_options", "eval", "eval_options")
"""Keys of a sweep's file that say what is measured on its runs."""
ELSEWHERE = (
    "job.name",
    "job.output_dir",
    "data.cache_dir",
    "training.gc_freq",
    "training.deterministic",
    "parallelism",
    "compile",
    "activation_checkpoint",
    "metrics",
    "profiling",
    "checkpoint.async_save",
    "checkpoint.allow_new_data",
    "checkpoint.start_over",
)
"""Keys that change no result but by rounding."""


class CellRow(BaseModel):
    """The content of a row's file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    key: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    cell: str
    measured: dict[str, Any]
    """The values of `MEASURED` in the sweep's file."""
    result: dict[str, float]


def measured(sweep: Sweep) -> dict[str, Any]:
    """What the file of a sweep asks to measure on every run."""
    return sweep.model_dump(mode="json", include={*MEASURED})


def cell_keys(cells: Iterable[Cell], configs: Mapping[str, Config], runs: Path) -> dict[str, str]:
    """The key of every cell, by name. cells: those that others need come first. runs: the folder of the run directories."""
    keys: dict[str, str] = {}
    folders = {str(runs / name): name for name in configs}
    for cell in cells:
        content = {
            "behaviour": BEHAVIOUR,
            "needs": [keys[need] for need in cell.needs],
            "config": _deciding(dump(configs[cell.name]), folders, keys),
        }
        keys[cell.name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return keys


def _deciding(values: Any, folders: Mapping[str, str], keys: Mapping[str, str], prefix: str = "") -> Any:
    """The part of a configuration that decides results, with keys in place of the directories of other cells."""
    if isinstance(values, dict):
        names = {name: f"{prefix}.{name}" if prefix else name for name in values}
        return {
            name: _deciding(values[name], folders, keys, full)
            for name, full in names.items()
            if not within(full, ELSEWHERE)
        }
    return keys[folders[values]] if isinstance(values, str) and folders.get(values) in keys else values


def write_row(folder: Path, row: CellRow) -> None:
    """Writes the row of a finished cell. folder: the sweep's."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_file(folder / FOLDER / f"{row.cell}.json", json.dumps(row.model_dump(), indent=1) + "\n")


def read_row(path: Path) -> CellRow:
    """Raises UserError for a file that can't be read or is no row."""
    return read_object(
        path,
        CellRow.model_validate,
        missing=UserError(f"{path}: there is no such file"),
        unreadable=UserError,
        invalid=lambda what: UserError(f"{path}: is not a row of a sweep: {what}"),
        limit=ROW_BYTES,
    )


def read_rows(folder: Path, keys: Mapping[str, str], measures: Mapping[str, Any]) -> dict[str, CellRow]:
    """The rows of a sweep's cells, by name, but those with other measures. Raises UserError for a row that was made with
    other settings. measures: what the sweep asks for."""
    rows = {}
    for cell, key in keys.items():
        path = folder / FOLDER / f"{cell}.json"
        if path.exists():
            row = read_row(path)
            if row.key != key:
                raise UserError(f"{path}: was made with other settings; take another --output, or delete it")
            if row.measured == measures:
                rows[cell] = row
    return rows


def merge(folder: Path, sources: Iterable[Path], keys: Mapping[str, str], measures: Mapping[str, Any]) -> int:
    """Copies rows of other directories of the same sweep that this one lacks. Returns how many.

    sources: directories of sweeps, or directories of row files. Raises UserError when one has no row of this sweep, or has a
    row of other settings or with other measures."""
    copied = 0
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for source in sources:
        inside = source / FOLDER if (source / FOLDER).is_dir() else source
        found = [cell for cell in keys if (inside / f"{cell}.json").exists()]
        if not found:
            raise UserError(f"--merge: {source} has no row of this sweep ({FOLDER}/CELL.json)")
        for cell in found:
            path, own = inside / f"{cell}.json", folder / FOLDER / f"{cell}.json"
            row = read_row(path)
            if row.key != keys[cell]:
                raise UserError(f"--merge: {path}: was made with other settings or by another version")
            if row.measured != measures:
                differing = ", ".join(name for name in MEASURED if row.measured.get(name) != measures[name])
                raise UserError(f"--merge: {path}: was measured with another {differing}")
            if not own.exists():
                shutil.copyfile(path, own)
                copied += 1
    return copied
