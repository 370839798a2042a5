"""What several verbs need."""

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
    """This process among those of the environment, for work that is no training."""
    device = pick_device()
    start_processes(device, config.parallelism.timeout_seconds)
    yield Mesh(resolve(config.parallelism, world_size_from_environment(), str), device)
    stop_processes()


def print_table(table: Table) -> None:
    console = Console()
    Console(width=max(console.width, 200) if not console.is_terminal else None).print(table)
