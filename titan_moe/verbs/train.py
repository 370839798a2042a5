"""titan-moe train: one rank's part of a run. What takes long to import comes after the checks."""

import os

from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.load import world_size_from_environment
from titan_moe.config.tables import Config
from titan_moe.data.prepare import prepare
from titan_moe.errors import UserError
from titan_moe.runtime.log import start_log
from titan_moe.verbs.words import configured, take_flag

FINISHED = 64  # what `train --check` tells run_train.sh: the run is done, there is nothing to start


def run(words: list[str]) -> int:
    """`--check`: only checks configuration and inputs, and prepares the data; returns FINISHED when the run is done."""
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
    from titan_moe.config.degrees import resolve
    from titan_moe.parallel.mesh import Mesh, from_first, limit_waiting, start_processes, stop_processes
    from titan_moe.runtime.device import pick_device
    from titan_moe.runtime.lifesigns import Alarm, LifeSigns, is_collective_failure

    device = pick_device()
    start_processes(device, config.parallelism.timeout_seconds)
    from_first(run_dir.open)
    prepared = from_first(lambda: prepare(config))
    check_vocabulary(config, prepared.tokenizer.vocab_size)
    from titan_moe.train.trainer import Trainer

    start_log(run_dir.log, rank)
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
