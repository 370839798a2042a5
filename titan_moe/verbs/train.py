"""Trains a model, or continues a run from its newest checkpoint. Each rank of a distributed run is one such process.

examples: titan-moe train --config debug --training.steps=1000
          torchrun --nproc-per-node 2 -m titan_moe.cli train --parallelism.ep=2
"""

import os
from argparse import ArgumentParser, Namespace

from titan_moe.config.degrees import resolve
from titan_moe.config.describe import options_help
from titan_moe.config.load import load_config, world_size_from_environment
from titan_moe.runtime.ranks import check_ranks
from titan_moe.verbs.arguments import add_config

FINISHED = 64  # the exit status by which `train --check` tells run_train.sh that the run has all its steps


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="only check configuration and inputs, and prepare the data"
    )
    meaning = "only print the extras of pyproject.toml whose packages this configuration needs"
    parser.add_argument("--extras", action="store_true", help=meaning)
    add_config(parser)
    parser.epilog = f"options of the configuration, with their defaults:\n{options_help()}"


def run(arguments: Namespace) -> int:
    check_ranks()
    world = world_size_from_environment()
    config = load_config(arguments.config, arguments.overrides, world_size=world, trust=arguments.trust)
    from titan_moe.data.needs import check_needs, needed_extras

    if arguments.extras:
        print(*needed_extras(config))
        return 0
    from titan_moe.checkpoint.prepared import prepare_run
    from titan_moe.checkpoint.run_dir import RunDir

    run_dir = RunDir(config, int(os.environ.get("RANK") or "0"))
    saved = run_dir.saved_steps()
    newest = run_dir.checkpoint(saved[-1]) if saved else None
    if finished := run_dir.finished(saved[-1] if saved else 0, config.training.steps):
        print(finished)
        return FINISHED if arguments.check else 0
    start = config.checkpoint.load_path or config.checkpoint.upcycle_path

    def check() -> None:
        if run_dir.rank == 0:
            check_needs(config, has_tokenizer=bool(start) or newest is not None)
        if config.eval.every:
            from titan_moe.analysis.evaluate.packaged import check_tasks

            check_tasks(config.eval)

    if arguments.check or world == 1:  # before torch is imported
        check()
    if arguments.check:
        prepare_run(config, run_dir, newest)
        return 0
    from titan_moe.parallel.mesh import Mesh, from_first, limit_waiting, start_processes, stop_processes
    from titan_moe.runtime.device import pick_device
    from titan_moe.runtime.heartbeat import watched
    from titan_moe.runtime.log import start_log
    from titan_moe.runtime.monitor import monitored

    device, timeout = pick_device(), config.parallelism.timeout_seconds
    start_processes(device, timeout)
    if world > 1:
        from_first(check)
    from_first(run_dir.open)
    prepared = from_first(lambda: prepare_run(config, run_dir, newest))
    from titan_moe.train.trainer import Trainer  # takes seconds, so after the checks

    start_log(run_dir.log, run_dir.rank)
    with watched(run_dir.log, timeout, monitored if device.type == "cuda" else None) as progress:
        mesh = Mesh(resolve(config.parallelism, world, str), device)
        limit_waiting(timeout)
        evaluation = None
        if config.eval.every:
            from titan_moe.analysis.evaluate.during import TaskEvaluation

            evaluation = TaskEvaluation(config, prepared.tokenizer, mesh)
        status = Trainer(config, prepared, run_dir, mesh, progress, evaluation).run()
    stop_processes()
    return status
