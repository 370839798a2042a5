"""The verbs of `titan-moe`.

    titan-moe train [--config NAME or PATH] [--section.key=value ...]
    titan-moe prepare [--config NAME or PATH] [--section.key=value ...]
    titan-moe plan [--config NAME or PATH] [--world N] [--section.key=value ...]
    titan-moe inspect CHECKPOINT or RUN DIRECTORY ... [--all] [--text PATH] [--section.key=value ...]
    titan-moe place CHECKPOINT or RUN DIRECTORY [--ranks N] [--by-paths] [--text PATH] [--section.key=value ...]
    titan-moe report RUN DIRECTORY ... [--output DIR]
    titan-moe sweep --config NAME or PATH [--processes N] [--output DIR] [--tables] [--section.key=value ...]

Exit status: 0 done, 2 the user's mistake (one line on stderr), 130 and 143 after SIGINT and SIGTERM, 1 anything else.
"""

import errno
import importlib
import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from titan_moe.config.describe import options_help
from titan_moe.errors import LostRanksError, TrainingError, UserError
from titan_moe.runtime.allocator import keep_freed_memory
from titan_moe.runtime.log import log_file

VERBS = ("train", "prepare", "plan", "inspect", "place", "report", "sweep")
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

USAGE = """usage: titan-moe VERB [--config NAME or PATH] [--section.key=value ...]

  train   trains; --check only checks configuration and inputs and prepares the data
  prepare tokenises the text into the cache, as `train` would, and says what came of it
  plan    no training: parameters, FLOPs, and memory and traffic of one of --world N ranks
  inspect CHECKPOINT or RUN DIRECTORY ...: routing and specialization measures on the run's validation text or on --text PATH;
          --all: every checkpoint of the run; --sequences N, --cluster-tokens N, --examples N, --output FILE
  place   CHECKPOINT or RUN DIRECTORY: an order of experts with little traffic over --ranks N, or --by-paths; --output FILE
  report  RUN DIRECTORY ...: a page of curves, heat maps and tables with what inspect found; --output DIR (default: RUN/report)
  sweep   runs a grid of configurations, --processes N at a time, and compares them; --output DIR (default: runs/sweeps/NAME);
          --base NAME: start its cells from that configuration instead; --tables only writes the tables again

NAME is a file of train_configs/ (default: debug), for sweep of train_configs/sweeps/. `titan-moe VERB --help` lists options.
"""


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _exit_143)
    keep_freed_memory()
    try:
        status = run(sys.argv[1:])
    except UserError as error:
        status = fail(error, str(error), 2)
    except LostRanksError as error:
        leave(fail(error, str(error), 1))
    except TrainingError as error:
        status = fail(error, str(error), 1)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            fail(error, None, 1)
            raise
        what = f"{error.filename or 'a file of the run'}: {error.strerror}"
        advice = "make room or choose another --job.output_dir, then run the same command again"
        status = fail(error, f"{what}; {advice}", 2)
    except Exception as error:
        fail(error, None, 1)
        raise
    except KeyboardInterrupt:
        print("interrupted; nothing is lost, the same command starts again", file=sys.stderr)
        status = 130
    sys.exit(status)


def fail(error: Exception, line: str | None, status: int) -> int:
    """Tells the user in one line (None: a traceback will), the rank's log, and the process that started this one."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from titan_moe.runtime.launch import record_error

        record_error(error, status)
    if line is not None:
        print(f"error: {line}", file=sys.stderr)
    log_file.error(line or "unexpected", exc_info=None if line else error)
    return status


def leave(status: int) -> NoReturn:
    """Ends a process whose process group is broken: taking that down in order would wait for the lost ranks."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exit_143(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's signature
    sys.exit(143)


def run(arguments: list[str]) -> int:
    """Runs one verb and returns its exit status. Raises UserError, TrainingError."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"no verb {verb!r}; there are {', '.join(VERBS)}")
    if "-h" in rest or "--help" in rest:
        print(USAGE + options_help())
        return 0
    status: int = importlib.import_module(f"titan_moe.verbs.{verb}").run(rest)  # alone: most of them need much
    return status


if __name__ == "__main__":
    main()
