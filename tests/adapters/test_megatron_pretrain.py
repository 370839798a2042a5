"""The entry script in Megatron-LM's own training loop. Needs a checkout of Megatron-LM, which no package has: set the variable
MEGATRON_LM to its folder. Its `megatron/core` is used, so it needs `helpers_cpp` compiled in `megatron/core/datasets`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, environment

CHECKOUT = os.environ.get("MEGATRON_LM")
MODEL = (
    "--num-layers 3 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --seq-length 16 "
    "--max-position-embeddings 16 --num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 24 --swiglu "
    "--disable-bias-linear --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none"
)
RUN = (
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 3 --lr 1e-3 --clip-grad 0 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 100 --log-interval 1 --eval-interval 1000 --eval-iters 0"
)
WITHOUT_GPU = (
    "--transformer-impl local --use-cpu-initialization --distributed-backend gloo --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
    "--no-masked-softmax-fusion"
)
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="needs a checkout of Megatron-LM in the folder MEGATRON_LM")
def test_megatrons_training_loop_trains_and_logs_the_losses(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert CHECKOUT is not None
    losses = ["--moe-sp-loss-coeff", "2e-3", "--moe-cp-loss-coeff", "1e-3", "--tensorboard-dir", str(tmp_path)]
    command = [sys.executable, "-m", "tests.helpers.megatron_lm", *f"{MODEL} {RUN} {WITHOUT_GPU}".split(), *losses]
    path = os.pathsep.join([CHECKOUT, str(ROOT)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = environment() | ONE_RANK | {"MASTER_PORT": port, "PYTHONPATH": path, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    sp, cp = ([one.value for one in events.Scalars(name)] for name in ("sp_loss", "cp_loss"))
    assert len(sp) == len(cp) == 3
    assert all(0 < value < 6 for value in sp)  # k(k-1) at most
    assert all(-1 < value < 0 for value in cp)
