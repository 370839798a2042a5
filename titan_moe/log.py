"""Where a run's lines go: to the console, and with the time to its log file."""

import logging
import sys

from titan_moe.train.run_dir import RunDir

log_file = logging.getLogger("titan_moe.file")  # for what the console is told otherwise
log_file.propagate = False
log_file.addHandler(logging.NullHandler())  # until there is a run directory


def start_log(run_dir: RunDir) -> None:
    """Lines go to stdout, and with the time to the run's log file."""
    logger = logging.getLogger("titan_moe")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if run_dir.rank == 0 else logging.WARNING)
    file = logging.FileHandler(run_dir.log)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [console, file]
    log_file.handlers = [file]
