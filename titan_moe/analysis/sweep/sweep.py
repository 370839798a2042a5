"""Runs the cells of a sweep, several at a time, each in its own process, and rewrites the tables after each.

    runs/sweeps/NAME/   results.md  results.csv  comparisons.csv  cells/CELL.json  runs/CELL/  configs/CELL.toml
                        logs/CELL.log

A finished cell is not run again; an interrupted one resumes from its newest checkpoint. So a sweep that is killed and
started again ends with the same tables as one that was not. A cell whose file in cells/ is there counts as finished, also
when another machine made it. Cells of the first seed run first, at all grid points, so that there are pairs early.
"""

import contextlib
import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable

from titan_moe.analysis.sweep.grid import Cell, cell_config, cells_of, read_sweep
from titan_moe.analysis.sweep.rows import FOLDER, CellRow, cell_keys, measured, merge, read_rows, write_row
from titan_moe.analysis.sweep.sequential import FINAL, decision
from titan_moe.analysis.sweep.tables import (
    Group,
    anytime_columns,
    evaluated,
    grouped,
    inspected,
    result_of,
    spread,
    while_running,
    write_tables,
)
from titan_moe.checkpoint.changes import changed_keys
from titan_moe.checkpoint.run_dir import RunDir, read_row
from titan_moe.checkpoint.state import dump
from titan_moe.config.describe import to_toml
from titan_moe.config.load import merge_file
from titan_moe.config.tables import Config
from titan_moe.data.prepare import prepare
from titan_moe.errors import TrainingError, UserError
from titan_moe.runtime.cpus import available_cpus
from titan_moe.runtime.files import own_folder, write_file
from titan_moe.runtime.lock import FileLock, wait_for
from titan_moe.runtime.scheduler import number

POLL_SECONDS = 0.2
LOCK_SECONDS = 120  # to wait for a process of a killed sweep to save and exit
STOP_SECONDS = 300  # to wait for running cells to save and exit after SIGTERM
PR_SET_PDEATHSIG = 1


class Running(NamedTuple):
    cell: Cell
    process: subprocess.Popen[bytes]
    command: list[str]


class SweepState:
    """A sweep's cells: which are finished, running, failed or waiting."""

    def __init__(
        self, name: str, base: str, folder: Path | None, words: list[str], processes: int, trust: bool = False
    ) -> None:
        path, self.sweep = read_sweep(name, base)
        stem = f"{path.stem}-{Path(base).stem}" if base else path.stem
        self.folder = folder or Path("runs") / "sweeps" / stem
        self.cells = cells_of(path, self.sweep)
        self.world = number(os.environ, "NPROC", 1) if os.environ.get("NPROC") else 1
        self.configs = {
            cell.name: cell_config(cell, self.sweep, self.folder / "runs", words, self.world, trust)
            for cell in self.cells
        }
        self.processes = processes
        self.running: list[Running] = []
        self.failed: dict[str, str] = {}
        """Reasons, by cell name."""
        self.results: dict[str, dict[str, float]] = {}
        self.keys = cell_keys(self.cells, self.configs, self.folder / "runs")
        self.order = sorted(self.cells, key=lambda cell: self.sweep.seeds.index(cell.seed))

    def complete(self, cell: Cell) -> bool:
        return self.command(cell) is None

    def command(self, cell: Cell) -> list[str] | None:
        """The next command of a cell: training, then inspection, then evaluation; None when all are done."""
        config = self.configs[cell.name]
        steps = RunDir(config).saved_steps()
        if not steps or steps[-1] < config.training.steps:
            launcher = ["titan_moe.runtime.launch", "--nproc-per-node", str(self.world), "-m"] if self.world > 1 else []
            module = [*launcher, "titan_moe.cli", "train"]
            # The cell's file was written by this sweep, from files that the user named or trusts.
            return [
                sys.executable,
                "-m",
                *module,
                "--trust",
                "--config",
                str(self.folder / "configs" / f"{cell.name}.toml"),
            ]
        run = self.folder / "runs" / cell.name
        sparse = config.model.layers > config.model.moe.first_dense_layers
        # Without --trust, since the run may be someone else's; its text is in the cache.
        modules = [f"--extensions.modules={','.join(config.extensions.modules)}"] if config.extensions.modules else []
        if self.sweep.inspect and sparse and any(not inspected(run, step).exists() for step in steps):
            words = [str(run), "--all", *self.sweep.inspect_options, *modules]
            return [sys.executable, "-m", "titan_moe.cli", "inspect", *words]
        if self.sweep.eval and not evaluated(run, steps[-1], self.sweep.eval).exists():
            words = [str(run), f"--tasks={self.sweep.eval}", *self.sweep.eval_options, *modules]
            return [sys.executable, "-m", "titan_moe.cli", "eval", *words]
        return None

    def open(self) -> None:
        """Makes the directories, writes the cells' configurations and reads the results of finished cells. Raises
        UserError when a cell was run with other settings."""
        for name in ("runs", "configs", "logs"):
            own_folder(self.folder, name)
        for cell in self.cells:
            config = self.configs[cell.name]
            file = self.folder / "configs" / f"{cell.name}.toml"
            if file.exists():
                self.check_same(cell, file, config)
            write_file(file, to_toml(config))
        own_folder(self.folder, FOLDER)
        rows = read_rows(self.folder, self.keys, measured(self.sweep))
        for cell in self.cells:
            if cell.name in rows:
                self.results[cell.name] = rows[cell.name].result
            elif self.complete(cell):
                self.gather(cell)

    def check_same(self, cell: Cell, file: Path, now: Config) -> None:
        """Raises UserError when a cell was run with other settings. file: its configuration, which is only compared: it may be
        someone else's."""
        values: dict[str, Any] = {}
        merge_file(values, {}, file)
        with contextlib.suppress(ValidationError):  # then the comparison names what differs
            values = dump(type(now).model_validate(values))
        changed = changed_keys(values, dump(now))
        if changed and (self.folder / "runs" / cell.name / "metrics.jsonl").exists():
            raise UserError(
                f"{changed[0]}: has changed since {cell.name} was run; take another --output, or delete that run"
            )

    def gather(self, cell: Cell) -> None:
        try:
            result = result_of(self.folder / "runs" / cell.name, self.sweep.validations)
        except ValueError as error:
            raise UserError(f"validation.interval: {error}") from error
        if cell.name not in self.results:
            self.results[cell.name] = result
            row = CellRow(key=self.keys[cell.name], cell=cell.name, measured=measured(self.sweep), result=result)
            write_row(self.folder, row)
            if self.sweep.discard and cell.arm not in self.sweep.before:
                shutil.rmtree(RunDir(self.configs[cell.name]).checkpoints)

    def start(self) -> None:
        """Starts cells while there is room."""
        busy = {running.cell.name for running in self.running}
        waiting = self.waiting()
        unfinished = {cell.name for cell in waiting} | busy
        for cell in waiting:
            if len(self.running) >= self.processes:
                return
            if cell.name in busy:
                continue
            failed_need = next((need for need in cell.needs if need in self.failed), None)
            if failed_need is not None:
                self.failed[cell.name] = f"{failed_need} failed"
            elif not unfinished & {*cell.needs}:
                self.launch(cell)

    def waiting(self) -> list[Cell]:
        """Cells that are still to be run, in that order. A cell that others need runs also when another machine has made its
        row, since they need its directory."""
        decided, ends = self.decided(), {*self.results, *self.failed}

        def is_open(cell: Cell) -> bool:
            return cell.name not in ends and Group(cell.grid_point, cell.arm) not in decided

        needed = {
            need for cell in self.cells if cell.arm not in self.sweep.before and is_open(cell) for need in cell.needs
        }

        def is_waiting(cell: Cell) -> bool:
            if cell.arm not in self.sweep.before:
                return is_open(cell)
            if cell.name in self.failed:
                return False
            if cell.name in self.results:
                return cell.name in needed and not self.complete(cell)
            return cell.name in needed or not self.sweep.sequential

        return [cell for cell in self.order if is_waiting(cell)]

    def decided(self) -> set[Group]:
        """Arms that get no more seeds: those of a sequential sweep whose difference is decided, and baselines of such arms
        only."""
        if not self.sweep.sequential:
            return set()
        groups, found = grouped(self.cells, self.results), set()
        for grid_point in dict.fromkeys(cell.grid_point for cell in self.cells):
            arms = [Group(grid_point, arm) for arm in self.sweep.arms if arm != self.sweep.baseline]
            done = {
                arm for arm in arms if decision(while_running(groups, arm, self.sweep), self.sweep.equivalence) in FINAL
            }
            found |= done if len(done) < len(arms) else {*done, Group(grid_point, self.sweep.baseline)}
        return found

    def launch(self, cell: Cell) -> None:
        command = self.command(cell)
        assert command is not None
        run = self.folder / "runs" / cell.name
        if not wait_for(run / ".lock", LOCK_SECONDS, POLL_SECONDS):
            raise TrainingError(f"{run}: another process is training there")
        threads = max(1, available_cpus() // (self.processes * self.world))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with (self.folder / "logs" / f"{cell.name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self.running.append(Running(cell, process, command))

    def collect_ended(self, stopped: bool = False) -> bool:
        """Records results and failures of processes that ended, and starts their next commands. Whether any ended.

        stopped: they were told to save and end, and no command starts after them."""
        ended = [running for running in self.running if running.process.poll() is not None]
        for running in ended:
            self.running.remove(running)
            cell, status = running.cell, running.process.returncode
            next_command = self.command(cell)
            if stopped and next_command is not None:
                continue
            # A process that had done all when the signal came may end by it.
            failed = status != 0 and not (stopped and status == -signal.SIGTERM)
            if failed or next_command == running.command:
                self.failed[cell.name] = f"status {status}: {last_line(self.folder / 'logs' / f'{cell.name}.log')}"
            elif next_command is not None:
                self.launch(cell)
            else:
                self.gather(cell)
                write_tables(self.folder, self.sweep, self.cells, self.results)
        return bool(ended)

    def finished(self) -> bool:
        return not self.running and not self.waiting()

    def stop(self) -> None:
        """Sends SIGTERM to the running cells and waits while they save."""
        for running in self.running:
            with contextlib.suppress(ProcessLookupError):
                running.process.terminate()
        for running in self.running:
            running.process.wait(STOP_SECONDS)

    def table(self) -> RichTable:
        """Every arm at every grid point: finished seeds, running cells, and results so far."""
        table = RichTable(title=f"{self.folder}: {len(self.results)} of {len(self.cells)} runs")
        columns = ("arm", "seeds", "running", "loss", f"to {self.sweep.baseline}", "interval at any time", "more seeds")
        for column in (*self.sweep.grid, *columns):
            table.add_column(column)
        groups = grouped(self.cells, self.results)
        for group in dict.fromkeys(Group(cell.grid_point, cell.arm) for cell in self.cells):
            mine = [cell for cell in self.cells if Group(cell.grid_point, cell.arm) == group]
            done = groups.get(group, {})
            now = while_running(groups, group, self.sweep)
            failed = sum(cell.name in self.failed for cell in mine)
            running = [self.progress(r.cell) for r in self.running if Group(r.cell.grid_point, r.cell.arm) == group]
            table.add_row(
                *group.grid_point,
                group.arm,
                f"{len(done)}/{len(mine)}{f', {failed} failed' if failed else ''}",
                "; ".join(running),
                spread([row["loss"] for row in done.values()]),
                *(anytime_columns(now, self.sweep) if group.arm != self.sweep.baseline else ("", "", "")),
            )
        return table

    def progress(self, cell: Cell) -> str:
        line = last_line(self.folder / "runs" / cell.name / "metrics.jsonl")
        row = read_row(f"{line}\n".encode())
        return f"seed {cell.seed}: {row['step'] if row else 0}/{self.configs[cell.name].training.steps}"


def run_sweep(
    name: str,
    base: str,
    folder: Path | None,
    words: list[str],
    processes: int,
    only_tables: bool = False,
    trust: bool = False,
    minutes: float | None = None,
    sources: Sequence[Path] = (),
) -> int:
    """Runs the unfinished cells and writes the tables. Returns the exit status, 1 when a cell failed. Raises UserError.

    base: replaces the sweep's `config`. only_tables: run nothing. trust: import modules that the sweep's files name.
    minutes: after these, running cells save and stop. sources: directories whose rows are merged first."""
    state = SweepState(name, base, folder, words, processes, trust)
    state.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(state.folder / ".lock")
    if not lock.acquire():
        raise UserError(f"--output: another sweep is running in {state.folder}")
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        if sources:
            print(f"--merge: {merge(state.folder, sources, state.keys, measured(state.sweep))} rows copied")
        state.open()
        if not only_tables and state.waiting():
            prepare_once(state.configs.values())
            run_all(state, minutes)
        if state.results:
            write_tables(state.folder, state.sweep, state.cells, state.results)
        elif only_tables:
            raise UserError(f"--tables: no run of {state.folder} is finished")
    print(f"{state.folder / 'results.md'}: {len(state.results)} of {len(state.cells)} runs")
    for cell, reason in state.failed.items():
        print(f"failed: {cell}: {reason}", file=sys.stderr)
    return 1 if state.failed else 0


def run_all(state: SweepState, minutes: float | None = None) -> None:
    """Runs cells until each has finished or failed, or the minutes are over."""
    end = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    console = Console()
    live = Live(state.table(), console=console, auto_refresh=False) if console.is_terminal else None
    shown = time.monotonic()
    with live or contextlib.nullcontext():
        try:
            while not state.finished():
                if time.monotonic() >= end:
                    state.stop()
                    state.collect_ended(stopped=True)
                    console.print(f"--minutes={minutes:g} are over; the same command goes on")
                    break
                state.start()
                changed = state.collect_ended()
                if live is not None and (changed or time.monotonic() - shown > 1.0):
                    live.update(state.table(), refresh=True)
                    shown = time.monotonic()
                elif live is None and changed:
                    console.print(f"{len(state.results)} of {len(state.cells)} runs, {len(state.failed)} failed")
                time.sleep(POLL_SECONDS)
        except BaseException:
            state.stop()
            raise
    console.print(state.table())


def prepare_once(configs: Iterable[Config]) -> None:
    """Makes all tokenizers and token shards in this process, since several cells may need the same ones."""
    distinct = {(config.data.model_dump_json(), config.tokenizer.model_dump_json()): config for config in configs}
    for config in distinct.values():
        prepare(config)


def last_line(path: Path) -> str:
    """The last line of a file; empty when there is no file."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _end_with_parent() -> None:
    """Runs in a child on Linux: has the kernel send it SIGTERM when the sweep's process dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
