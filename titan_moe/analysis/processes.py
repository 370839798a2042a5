"""The processes, and the tables on the console, of verbs that run a trained model."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from titan_moe.config.degrees import resolve
from titan_moe.config.load import world_size_from_environment
from titan_moe.config.tables import Config
from titan_moe.parallel.mesh import Mesh, start_processes, stop_processes
from titan_moe.runtime.device import pick_device


@contextlib.contextmanager
def ranks_of(config: Config) -> Iterator[Mesh]:
    """The mesh of the process group that the environment describes; the group ends with the block."""
    device = pick_device()
    start_processes(device, config.parallelism.timeout_seconds)
    yield Mesh(resolve(config.parallelism, world_size_from_environment(), str), device)
    stop_processes()


def print_table(table: Table) -> None:
    """Prints a table, at least 200 columns wide where stdout is not a terminal."""
    console = Console()
    Console(width=max(console.width, 200) if not console.is_terminal else None).print(table)
