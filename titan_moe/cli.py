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

import contextlib
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from titan_moe.allocator import keep_freed_memory
from titan_moe.config.describe import options_help
from titan_moe.config.load import load_config, world_size_from_environment
from titan_moe.config.tables import Config
from titan_moe.errors import LostRanksError, TrainingError, UserError
from titan_moe.train.run_dir import RunDir

if TYPE_CHECKING:
    from rich.table import Table

    from titan_moe.parallel.mesh import Mesh

FINISHED = 64  # what `train --check` tells run_train.sh: the run is done, there is nothing to start
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

log_file = logging.getLogger("titan_moe.file")  # for what the console is told otherwise
log_file.propagate = False
log_file.addHandler(logging.NullHandler())  # until there is a run directory

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
        from titan_moe.parallel.lifesigns import record_failure

        record_failure(error, status)
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
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "prepare": prepare_data,
        "plan": plan,
        "inspect": inspect,
        "place": place,
        "report": report,
        "sweep": sweep,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in verbs:
        raise UserError(f"no verb {verb!r}; there are {', '.join(verbs)}")
    if "-h" in rest or "--help" in rest:
        print(USAGE + options_help())
        return 0
    return verbs[verb](rest)


def configured(words: list[str], world: int | None = None) -> Config:
    """What `--config` and `--section.key=value` words say. world: processes; None: as the environment says."""
    name, overrides = take_option(words, "--config", "debug")
    return load_config(name, overrides, world_size=world_size_from_environment() if world is None else world)


def take_flag(words: list[str], flag: str) -> tuple[bool, list[str]]:
    """Whether a word is there, and the other words."""
    return flag in words, [word for word in words if word != flag]


def take_option(words: list[str], option: str, default: str) -> tuple[str, list[str]]:
    """The value of `--option VALUE` or `--option=VALUE`, and the other words. Raises UserError when the value is missing."""
    value, rest = default, []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == option:
            if not words:
                raise UserError(f"{option} needs a value")
            value = words.pop(0)
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def take_number(words: list[str], option: str, default: int, meaning: str, least: int = 1) -> tuple[int, list[str]]:
    """The same, for a number of at least `least`."""
    value, rest = take_option(words, option, str(default))
    if not value.isdigit() or int(value) < least:
        raise UserError(f"{option} = {value!r}: {meaning}, {least} or more")
    return int(value), rest


def train(words: list[str]) -> int:
    from titan_moe.data.prepare import prepare

    check_only, words = take_flag(words, "--check")
    config = configured(words)
    rank = int(os.environ.get("RANK", "0"))
    run_dir = RunDir(config, rank)
    if finished(config, run_dir):
        return FINISHED if check_only else 0
    if check_only:
        prepared = prepare(config)
        check_vocabulary(config, prepared.tokenizer.vocab_size)
        return 0
    from titan_moe.parallel.degrees import resolve
    from titan_moe.parallel.lifesigns import Alarm, LifeSigns, is_collective_failure
    from titan_moe.parallel.mesh import Mesh, from_first, limit_waiting, start_processes, stop_processes
    from titan_moe.train.device import pick_device

    device = pick_device()
    start_processes(device, config.parallelism.timeout_seconds)
    from_first(run_dir.open)
    prepared = from_first(lambda: prepare(config))
    check_vocabulary(config, prepared.tokenizer.vocab_size)
    # torchdata 0.11 sets a hint that torch 2.13 no longer reads.
    warnings.filterwarnings("ignore", "'set_vital' is deprecated")
    from titan_moe.train.trainer import Trainer

    start_log(run_dir)
    degrees = resolve(config.parallelism, world_size_from_environment(), str)
    if degrees.world == 1:
        return Trainer(config, prepared, run_dir, Mesh(degrees, device)).run()
    signs, alarm = LifeSigns(), Alarm(run_dir.log, config.parallelism.timeout_seconds)
    try:
        mesh = Mesh(degrees, device)
        limit_waiting(config.parallelism.timeout_seconds)
        status = Trainer(config, prepared, run_dir, mesh, alarm.set).run()
    except Exception as error:
        if is_collective_failure(error):
            raise signs.explain(error) from error
        raise
    finally:
        alarm.stop()
        signs.stop()
    stop_processes()
    return status


def finished(config: Config, run_dir: RunDir) -> bool:
    """Whether the run is done, and if so says how to go on."""
    steps = run_dir.saved_steps()
    if not steps or steps[-1] < config.training.steps:
        return False
    print(
        f"{run_dir.path} is finished: {steps[-1]} steps.\n"
        f"  more steps:   --training.steps={2 * steps[-1]}\n"
        f"  a fresh run:  --job.name={config.job.name}-2\n"
        f"  its curves:   tensorboard --logdir {run_dir.path.parent}"
    )
    return True


def check_vocabulary(config: Config, pieces: int) -> None:
    if config.model.vocab_size and config.model.vocab_size < pieces:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is less than the tokenizer's {pieces} pieces; "
            "raise it or set it to 0"
        )
    size = config.model.vocab_size or pieces
    if size % config.parallelism.tp:
        better = -(-size // config.parallelism.tp) * config.parallelism.tp
        raise UserError(
            f"parallelism.tp = {config.parallelism.tp} must divide the vocabulary of {size}; set model.vocab_size = {better}"
        )


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


def prepare_data(words: list[str]) -> int:
    from titan_moe.data.prepare import prepare

    config = configured(words)
    found = prepare(config)
    check_vocabulary(config, found.tokenizer.vocab_size)
    for name, split in found.manifest.splits.items():
        print(
            f"{name:<12} {split.tokens:,} tokens in {split.documents:,} documents, {split.source_bytes:,} bytes of text "
            f"({split.source_bytes / split.tokens:.2f} per token), {len(split.shards)} shard(s)"
        )
    print(f"{'domains':<12} {', '.join(domain or 'none' for domain in found.manifest.domains)}")
    print(
        f"{'tokenizer':<12} {found.tokenizer.vocab_size:,} pieces{'' if found.tokenizer.lossless else ', not lossless'}"
    )
    print(f"{'shards':<12} {found.folder}")
    return 0


def plan(words: list[str]) -> int:
    world, words = take_number(words, "--world", world_size_from_environment(), "the number of ranks to plan for")
    config = configured(words, world)
    from titan_moe.train.plan import plan_text

    print(plan_text(config, world))
    return 0


def inspect(words: list[str]) -> int:
    from titan_moe.analysis.inspection import Options, from_checkpoint, place_of, table, write_result
    from titan_moe.analysis.inspection import inspect as look

    every, words = take_flag(words, "--all")
    output, words = take_option(words, "--output", "")
    clustered, words = take_number(words, "--cluster-tokens", 2048, "tokens to cluster", 0)
    examples, words = take_number(words, "--examples", 8, "tokens shown for each expert", 0)
    text, sequences, paths, overrides = take_text(words, "inspect")
    checkpoints, config = from_checkpoint(paths, every, overrides, world_size_from_environment())
    with ranks_of(config) as mesh:
        results = look(checkpoints, config, mesh, Options(text, sequences, clustered, examples))
    for checkpoint, result in zip(checkpoints, results, strict=bool(results)):
        path = place_of(checkpoint, text)
        if output:
            path = Path(output) / path.name if len(checkpoints) > 1 else Path(output)
        write_result(result, path)
        print_table(table(result))
        print(path)
    return 0


def place(words: list[str]) -> int:
    from titan_moe.analysis.inspection import Options, from_checkpoint
    from titan_moe.analysis.place import by_paths, facts, for_ranks, table
    from titan_moe.model.permute import write_order

    paths_only, words = take_flag(words, "--by-paths")
    ranks, words = take_number(words, "--ranks", 8, "ranks that share the experts", 2)
    output, words = take_option(words, "--output", "")
    text, sequences, paths, overrides = take_text(words, "place")
    checkpoints, config = from_checkpoint(paths[:1], False, overrides, world_size_from_environment())
    options = Options(text, sequences, cluster_tokens=0, examples=0)
    name = "order-by-paths.json" if paths_only else f"order-{ranks}-ranks.json"
    path = Path(output) if output else checkpoints[0].parent.parent / name
    with ranks_of(config) as mesh:
        if paths_only:
            order, about = by_paths(checkpoints[0], config, mesh, options), {}
        else:
            found = for_ranks(checkpoints[0], config, mesh, options, ranks)
            order, about = found.order, facts(found)
            if mesh.first:
                print_table(table(found, ranks, config.training.batch_size))
        if mesh.first:
            write_order(path, order, checkpoint=str(checkpoints[0]), traffic=about)
            print(path)
    return 0


def take_text(words: list[str], verb: str) -> tuple[str, int, list[Path], list[str]]:
    """`--text` and `--sequences`, the paths among the words, and the rest. Raises UserError for no path."""
    text, words = take_option(words, "--text", "")
    sequences, words = take_number(words, "--sequences", 0, "sequences of the text to read", 0)
    paths = [Path(word) for word in words if not word.startswith("-")]
    if not paths:
        raise UserError(f"{verb} needs a checkpoint or a run directory: titan-moe {verb} runs/debug")
    return text, sequences, paths, [word for word in words if word.startswith("-")]


@contextlib.contextmanager
def ranks_of(config: Config) -> "Iterator[Mesh]":
    """This process among those of the environment, for work that is no training."""
    from titan_moe.parallel.degrees import resolve
    from titan_moe.parallel.mesh import Mesh, start_processes, stop_processes
    from titan_moe.train.device import pick_device

    device = pick_device()
    start_processes(device, config.parallelism.timeout_seconds)
    yield Mesh(resolve(config.parallelism, world_size_from_environment(), str), device)
    stop_processes()


def report(words: list[str]) -> int:
    from titan_moe.analysis.report import write_report

    output, words = take_option(words, "--output", "")
    unknown = next((word for word in words if word.startswith("-")), None)
    if unknown is not None or not words:
        wrong = f"no option {unknown!r}" if unknown else "which runs?"
        raise UserError(f"report: {wrong}; titan-moe report RUN DIRECTORY ... [--output DIR]")
    print(write_report([Path(word) for word in words], Path(output) if output else Path(words[0]) / "report"))
    return 0


def print_table(table: "Table") -> None:
    from rich.console import Console

    console = Console()
    Console(width=max(console.width, 200) if not console.is_terminal else None).print(table)


def sweep(words: list[str]) -> int:
    from titan_moe.analysis.sweep import run_sweep

    only_tables, words = take_flag(words, "--tables")
    name, words = take_option(words, "--config", "")
    folder, words = take_option(words, "--output", "")
    base, words = take_option(words, "--base", "")
    processes, words = take_number(words, "--processes", 1, "runs at the same time")
    if not name:
        raise UserError("--config: which sweep? a file of train_configs/sweeps/ by name, or a path")
    return run_sweep(name, base, Path(folder) if folder else None, words, processes, only_tables)


if __name__ == "__main__":
    main()
