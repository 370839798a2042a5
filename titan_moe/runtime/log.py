"""Logging of a run: to the console, and with timestamps to this rank's log file."""

import logging
import signal
import sys
from pathlib import Path
from typing import TextIO

log_file = logging.getLogger("titan_moe.file")  # to the log file only: errors, which stderr gets in another form
log_file.propagate = False
log_file.addHandler(logging.NullHandler())  # until there is a run directory


class Console(logging.StreamHandler[TextIO]):
    """Writes to stdout. When its reader has gone (`titan-moe train | head`), the run stops as when a terminal closes."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            self.setLevel(logging.CRITICAL + 1)  # write nothing more
            signal.raise_signal(signal.SIGHUP)
        else:
            super().handleError(record)


def start_log(path: Path, rank: int) -> None:
    """Sends log lines to stdout, and with timestamps to the file `path`. Ranks other than 0 print only warnings."""
    logger = logging.getLogger("titan_moe")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    console = Console(sys.stdout)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [console, file]
    log_file.handlers = [file]
