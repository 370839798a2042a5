"""The command line, `titan-moe VERB ...`: parses the words, runs the verb, and turns errors into exit statuses.

Exit status: 0 done, 2 the user's mistake (one line on stderr), 130 and 143 after SIGINT and SIGTERM, 141 when the reader
of stdout has gone (`titan-moe plan | head -1`), 1 anything else.
"""

import errno
import importlib
import logging
import os
import signal
import sys
from argparse import Namespace

from titan_moe import __version__
from titan_moe.errors import LostRanksError, TrainingError, UserError, pip_install
from titan_moe.runtime.cpus import limit_threads
from titan_moe.runtime.gpus import prepare_process
from titan_moe.runtime.home import provide_cache
from titan_moe.runtime.log import log_file
from titan_moe.verbs.arguments import Parser

VERBS = {  # verb: (module in titan_moe.verbs, one line of `titan-moe --help`)
    "train": ("train", "train a model, or continue an interrupted run"),
    "prepare": ("prepare", "tokenise the training text into the cache"),
    "plan": ("plan", "count parameters, FLOPs, and the memory and traffic of a rank, without training"),
    "inspect": ("inspect", "measure routing and expert specialization of checkpoints"),
    "finetune": ("finetune", "fine-tune a Transformers MoE model with the terms, through TRL and PEFT"),
    "place": ("place", "order experts so that little routed traffic leaves a rank"),
    "eval": ("eval", "evaluate a checkpoint on tasks and texts"),
    "generate": ("generate", "continue prompts with a checkpoint's model"),
    "report": ("report", "write a page of curves, heat maps and tables about runs"),
    "import": ("import_model", "make a checkpoint to start from out of another program's model"),
    "export": ("export", "write weights for Transformers or llama.cpp"),
    "sweep": ("sweep", "run a grid of configurations and compare them"),
}
PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"} | {
    name: name for name in ("torchao", "pymetis", "matplotlib", "rich", "scipy", "jinja2", "tensorboard")
}  # modules that only some verbs and options import: the packages that have them
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def main() -> None:
    """Entry point of the console script."""
    use_utf8()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    prepare_process()
    limit_threads()
    try:
        provide_cache()
        arguments = parse(sys.argv[1:])
        status: int = arguments.run(arguments)
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except UserError as error:
        status = fail(error, str(error), 2)
    except TrainingError as error:
        status = fail(error, str(error), 1)
        if isinstance(error, LostRanksError):  # an orderly shutdown would wait for the lost ranks
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            fail(error, None, 1)
            raise
        what = f"{error.filename or 'a file of the run'}: {error.strerror}"
        advice = "make room or choose another --job.output_dir, then run the same command again"
        status = fail(error, f"{what}; {advice}", 2)
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            fail(error, None, 1)
            raise
        status = fail(error, f"this needs the package {package}, which is not installed: {pip_install(package)}", 2)
    except Exception as error:
        if not is_out_of_memory(error):
            fail(error, None, 1)
            raise
        advice = "lower training.microbatch_size, training.seq_len or the model's size, or take more ranks"
        status = fail(error, f"out of memory ({str(error).strip().partition(chr(10))[0][:200]}); {advice}", 2)
    except KeyboardInterrupt:
        print("interrupted; nothing is lost, the same command starts again", file=sys.stderr)
        status = 130
    sys.exit(close_stdout(status))


def use_utf8() -> None:
    """Starts Python again in its UTF-8 mode where the locale has another encoding: names and texts are UTF-8 everywhere."""
    if sys.getfilesystemencoding() == "utf-8":
        return
    # A byte that the locale's encoding does not know stays as it is.
    words = [word.encode("utf-8", "surrogateescape") for word in sys.orig_argv[1:]]
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [os.fsencode(sys.executable), b"-X", b"utf8", *words])


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out in Python, numpy or torch, whose error for a CPU is a plain RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error))
    )


def close_stdout(status: int) -> int:
    """Writes what is left to stdout. Returns the exit status, 141 in place of 0 when its reader has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python would complain at exit
        return status or 128 + signal.SIGPIPE
    return status


def parse(words: list[str]) -> Namespace:
    """Parses a command line; `arguments.run(arguments)` of the result runs the verb and returns its exit status.

    Prints help and exits for `--help`. Raises UserError.
    """
    parser = Parser(prog="titan-moe", epilog="`titan-moe VERB --help` describes a verb and its options.")
    parser.add_argument("--version", action="version", version=f"titan-moe {__version__}")
    parsers = parser.add_subparsers(title="verbs", metavar="VERB")
    verbs = {verb: parsers.add_parser(verb, help=line) for verb, (_, line) in VERBS.items()}
    if words[:1] in (["-h"], ["--help"], ["--version"]):
        parser.parse_args(words[:1])
    verb, *words = words or [""]
    from titan_moe.config.load import all_keys, nearest, split_overrides, unknown_word  # slow, so not for `--help`

    if verb not in VERBS:
        near = nearest(verb, list(VERBS))
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(VERBS)}"
        raise UserError(f"{f'no verb {verb!r}' if verb else 'a verb is missing'}; {hint}")
    module = importlib.import_module(f"titan_moe.verbs.{VERBS[verb][0]}")
    parser = verbs[verb]
    parser.description = module.__doc__
    module.add_arguments(parser)
    overrides, words = split_overrides(words)
    arguments, unknown = parser.parse_known_intermixed_args(words)
    valid = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
    if "overrides" in arguments:
        valid += all_keys(getattr(module, "CONFIG", None))
    else:
        unknown += overrides
    if unknown:
        raise unknown_word(unknown[0], valid)
    arguments.overrides, arguments.run = overrides, module.run
    return arguments


def fail(error: Exception, line: str | None, status: int) -> int:
    """Reports an error in one line (None: a traceback follows) on stderr, in the rank's log, and to the launcher."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from titan_moe.runtime.launch import record_error

        record_error(error, status)
    if line is not None:
        print(f"error: {line}", file=sys.stderr)
    expected = isinstance(error, UserError | TrainingError | OSError)
    log_file.error(line or "unexpected", exc_info=None if expected and line else error)
    return status


if __name__ == "__main__":
    main()
