"""torchrun, with one line at the end about the rank that failed first, and with that rank's exit status.

    python -m titan_moe.runtime.launch --nproc-per-node 2 -m titan_moe.cli train [options]

Takes torchrun's options; run_train.sh calls it. Why not torchrun and a reader after it: torchrun exits with 1 whatever
the ranks' statuses were, and writes a report of about forty lines to the stderr that it shares with the ranks. When a
rank was killed, that report is the only place with the signal, since the rank wrote no error file. So torchrun's `run`
is called in this process, and the exception that it raises is reported here.
"""

import json
import logging
import math
import os
import signal
import socket
import sys
import time
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from titan_moe.errors import TrainingError, UserError
from titan_moe.runtime import rendezvous

# As in stopping.py, whose imports would take this process more than a second.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAVE_SECONDS = 300  # for the ranks to finish their step and save after a signal; torchrun kills them later


def main() -> None:
    """Entry point."""
    logging.disable()  # torchrun's own log lines
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # by `nohup`
    handled = [number.name for number in STOPPING if number not in ignored]
    defaults = ["--signals-to-handle", ",".join(handled), "--shutdown-timeout", str(SAVE_SECONDS)]
    rendezvous.register()
    options = parse_args([*defaults, "--rdzv-backend", rendezvous.ONE_NODE, *sys.argv[1:]])
    if options.nnodes not in ("1", "1:1"):
        options.rdzv_backend = rendezvous.SEVERAL_NODES
        options.rdzv_conf = f"{options.rdzv_conf},node_rank={options.node_rank}".lstrip(",")
    try:
        run(options)
    except ChildFailedError as error:
        sys.exit(report_failure(error.failures))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except DistError as error:
        sys.exit(report_lost_store(str(error).splitlines()[0].rstrip("."), options))


def report_lost_store(reason: str, options: Namespace) -> int:
    """Prints why the launcher can't reach node 0's store, and returns the exit status."""
    where = f"RDZV_ENDPOINT = {options.rdzv_endpoint}: {reason}"
    if rendezvous.SeveralNodes.met:
        print(f"error: {where}; node 0 is gone, and with it the run; start it again on all nodes", file=sys.stderr)
        return 1
    if "EADDRINUSE" in reason:
        advice = "another program on this node uses the port; choose another, the same on every node"
    else:
        advice = (
            f"start the same command on each of the {options.nnodes} nodes, NODE_RANK counting from 0, or raise "
            "RDZV_TIMEOUT"
        )
    print(f"error: {where}; {advice}", file=sys.stderr)
    return 2


def report_failure(failures: dict[int, ProcessFailure]) -> int:
    """Prints which rank of this node failed first and why, and returns its exit status: 128 + n for signal n.

    failures: by global rank."""
    rank, failure = min(failures.items(), key=lambda item: (failure_time(item[1]), was_ended(item[1])))
    record = error_record(failure)
    # A rank that wrote its error was about to exit; torchrun's SIGTERM may have ended it before it did.
    code = int(record.get("status", failure.exitcode))
    status = code if code > 0 else 128 - code
    if code - 128 in STOPPING:
        return status  # it was told to stop, has saved, and has said so
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"failed, status {status}"
    reason = f": {record['message']}" if record else ""
    print(f"error: first to fail on {socket.gethostname()}: rank {rank} {how}{reason}", file=sys.stderr)
    print(f"  more in the run directory's logs/rank-{rank}.log", file=sys.stderr)
    return status


def failure_time(failure: ProcessFailure) -> float:
    """When a rank failed, in seconds since the epoch; infinity if it exited because of another rank's failure."""
    record = error_record(failure)
    if record:
        return float(record["time"])
    # Killed from outside, or later by torchrun. A rank that exits without a record does so because another one failed.
    return failure.timestamp if failure.exitcode < 0 and not was_ended(failure) else math.inf


def was_ended(failure: ProcessFailure) -> bool:
    """Whether torchrun's SIGTERM ended a rank after another one had exited. A rank catches it but while it starts or ends."""
    return failure.exitcode == -signal.SIGTERM


def error_record(failure: ProcessFailure) -> dict[str, Any]:
    """What `record_error` wrote in the rank's process; empty if it did not."""
    return failure.message if isinstance(failure.message, dict) and "time" in failure.message else {}


def record_error(error: BaseException, status: int) -> None:
    """Writes this rank's error to the file that torchrun names in TORCHELASTIC_ERROR_FILE, in torchrun's format.

    status: the exit status that this process is about to exit with."""
    now = time.time()
    details = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(now))}
    line = str(error) if isinstance(error, UserError | TrainingError) else f"{type(error).__name__}: {error}"
    message = {"message": line, "extraInfo": details, "time": now, "status": status}
    path = os.environ["TORCHELASTIC_ERROR_FILE"]
    part = Path(f"{path}.part")
    part.write_text(json.dumps({"message": message}))
    part.replace(path)  # atomic: torchrun may end this process at any time, and reads the file then


if __name__ == "__main__":
    main()
