"""`titan-moe plan --world N` against the real thing: bytes of a rank, and bytes that it hands over."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.steps import DEEPSEEK, VOCABULARY, batch_of, config_of, mesh_of
from tests.distributed.test_traffic import bytes_sent
from titan_moe.config.tables import Config
from titan_moe.model.gemm import local
from titan_moe.parallel.degrees import resolve
from titan_moe.parallel.traffic import traffic
from titan_moe.train.optimizer import build_optimizer
from titan_moe.train.plan import memory, sharded_model
from titan_moe.train.trainer import build_model, train_step

pytestmark = pytest.mark.slow

LAYOUTS = {
    "dp2": (2, []),
    "ep2": (2, ["--parallelism.ep=2"]),
    "ep2tp2": (4, ["--parallelism.ep=2", "--parallelism.tp=2"]),
    "cp2hsdp2": (4, ["--parallelism.cp=2", "--parallelism.dp_replicate=2"]),
}


def planned(words: list[str], world: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by kind of memory, and by kind of collective."""
    config = with_vocabulary(config_of(words, world))
    degrees = resolve(config.parallelism, world, str)
    model = sharded_model(config, degrees)
    sent: dict[str, int] = {}
    for line in traffic(model, config, degrees):
        sent[line.collective] = sent.get(line.collective, 0) + line.bytes
    return memory(model, config, degrees), sent


def with_vocabulary(config: Config) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": VOCABULARY})})


def real(words: list[str], world: int) -> dict[str, int]:
    config = config_of(words, world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    train_step(model, optimizer, batch_of(1), config, mesh, 1, {})
    parameters = [local(p) for p in model.parameters()]
    moments = [local(m) for state in optimizer.state.values() for name, m in state.items() if name != "step"]
    return {
        "parameters": sum(p.numel() * p.element_size() for p in parameters),
        "AdamW's moments": sum(m.numel() * m.element_size() for m in moments),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_moments_are_the_real_ones(layout: str) -> None:
    world, degrees = LAYOUTS[layout]
    words = [*DEEPSEEK, *degrees]
    expected, _ = launch(1, planned, words, world, group=False)[0]
    found = launch(world, real, words, world)[0]
    for kind, size in found.items():
        assert expected[kind] == size, kind


@pytest.mark.parametrize(
    "words", [[], ["--regularizers.sp.weight=0.1"], ["--regularizers.sp.weight=0.1", "--training.microbatch_size=2"]]
)
def test_traffic_of_experts_is_the_counted_one(words: list[str]) -> None:
    from tests.distributed.test_traffic import OFF

    _, expected = launch(1, planned, [*OFF, "--parallelism.ep=2", *words], 2, group=False)[0]
    found = launch(2, bytes_sent, words)
    assert sum(rank["all_to_all_single"] for rank in found) == 2 * expected["all-to-all"]


def saved_bytes(words: list[str]) -> int:
    """What autograd really keeps of one micro-batch on one process."""
    config = config_of(words, 1)
    mesh = mesh_of(config, 1)
    model = build_model(config, VOCABULARY, mesh)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(batch_of(1).inputs(torch.float64, mesh.device, 1, 0.0))
    del out
    return sum(storage.nbytes() for storage in kept.values())


def test_activations_are_those_that_autograd_keeps() -> None:
    """Within a tenth: attention's kernel without storage is another one, and small vectors are kept here and there."""
    config = with_vocabulary(config_of([], 1))
    model = sharded_model(config, resolve(config.parallelism, 1, str))
    found = memory(model, config, resolve(config.parallelism, 1, str))["activations"]
    logits = 8 * 16 * VOCABULARY * 8
    assert found - logits == pytest.approx(saved_bytes([]), rel=0.1)
