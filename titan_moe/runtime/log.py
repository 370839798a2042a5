"""Logging of a run: to the console, and with timestamps to this rank's log file."""

import logging
import sys
from pathlib import Path

log_file = logging.getLogger("titan_moe.file")  # to the log file only: errors, which stderr gets in another form
log_file.propagate = False
log_file.addHandler(logging.NullHandler())  # until there is a run directory


def start_log(path: Path, rank: int) -> None:
    """Sends log lines to stdout, and with timestamps to the file `path`. Ranks other than 0 print only warnings."""
    logger = logging.getLogger("titan_moe")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [console, file]
    log_file.handlers = [file]
