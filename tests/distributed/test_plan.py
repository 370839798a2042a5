"""`titan-moe plan --world N` against the real thing: bytes of a rank, and bytes that it hands over."""

import pytest
import torch

from tests.helpers.counting import counted
from tests.helpers.ranks import launch
from tests.helpers.steps import BATCH, DEEPSEEK, SEQ, VOCABULARY, batch_of, config_of, mesh_of, rank_part
from titan_moe.config.degrees import resolve
from titan_moe.config.tables import Config
from titan_moe.estimate.plan import memory, sharded_model
from titan_moe.estimate.traffic import traffic
from titan_moe.model.gemm import local
from titan_moe.optim import build_optimizer
from titan_moe.parallel.parallelize import build_runner
from titan_moe.train.build import build_model
from titan_moe.train.inputs import to_inputs
from titan_moe.train.step import train_step

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
    train_step(build_runner(model, config, mesh), optimizer, rank_part(batch_of(1), config, mesh), config, mesh, 1, {})
    parameters = [local(p) for p in model.parameters()]
    moments = [local(m) for state in optimizer.state.values() for name, m in state.items() if name != "step"]
    return {
        "parameters": sum(p.numel() * p.element_size() for p in parameters),
        "state of adamw": sum(m.numel() * m.element_size() for m in moments),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_moments_are_the_real_ones(layout: str) -> None:
    world, degrees = LAYOUTS[layout]
    words = [*DEEPSEEK, *degrees]
    expected, _ = launch(1, planned, words, world, group=False)[0]
    found = launch(world, real, words, world)[0]
    for kind, size in found.items():
        assert expected[kind] == size, kind


PIPELINE = [
    "--parallelism.pp=2",
    "--model.layers=4",
    "--model.tie_embeddings=false",
    "--training.microbatch_size=2",
]
OPTIONS = [
    "--model.qk_norm=projection",
    "--model.qkv_bias=true",
    "--model.rope_fraction=0.5",
    "--model.moe.dense_hidden_dim=20",
    "--model.moe.shared_gate=true",
]
TRAFFIC = {
    "dp2": (2, []),
    "hsdp2x2": (4, ["--parallelism.dp_replicate=2", "--regularizers.v.scope=global"]),
    "ep2": (2, ["--parallelism.ep=2"]),
    "ep2-accumulated": (2, ["--parallelism.ep=2", "--training.microbatch_size=2"]),
    "ep2-kept": (2, ["--parallelism.ep=2", "--parallelism.reshard_after_forward=false"]),
    "cp2": (2, ["--parallelism.cp=2"]),
    "cp2-recomputed": (2, ["--parallelism.cp=2", "--activation_checkpoint.mode=full"]),
    "cp2-sequence": (
        2,
        ["--parallelism.cp=2", "--regularizers.lb.scope=sequence", "--regularizers.cp.source=transition"],
    ),
    "tp2": (2, ["--parallelism.tp=2"]),
    "tp2-norms": (2, ["--parallelism.tp=2", "--regularizers.o.weight=0", "--model.qk_norm=true"]),
    "tp2-options": (2, ["--parallelism.tp=2", *OPTIONS]),
    "tp2-options-recomputed": (2, ["--parallelism.tp=2", "--activation_checkpoint.mode=full", *OPTIONS]),
    "cp2-options": (2, ["--parallelism.cp=2", *OPTIONS]),
    "tp2-measured": (
        2,
        [
            "--parallelism.tp=2",
            "--regularizers.sp.weight=0",
            "--regularizers.measure=sp",
            "--training.microbatch_size=4",
        ],
    ),
    "ep2tp2": (4, ["--parallelism.ep=2", "--parallelism.tp=2"]),
    "ep2tp2-sketch-recomputed": (
        4,
        [
            "--parallelism.ep=2",
            "--parallelism.tp=2",
            "--regularizers.sp.method=sketch",
            "--activation_checkpoint.mode=full",
        ],
    ),
    "pp2": (2, PIPELINE),
    "pp2-without-cp": (2, [*PIPELINE, "--regularizers.cp.weight=0"]),
    "pp2tp2": (4, [*PIPELINE, "--parallelism.tp=2"]),
    "pp2ep2": (4, [*PIPELINE, "--parallelism.ep=2"]),
    "pp2-tied": (2, [*PIPELINE, "--model.tie_embeddings=true"]),
    "pp2tp2-tied": (4, [*PIPELINE, "--model.tie_embeddings=true", "--parallelism.tp=2"]),
}


def sent(words: list[str], world: int) -> dict[str, int]:
    """Bytes that this rank really hands to each collective in one training step."""
    config = config_of(words, world)
    mesh = mesh_of(config, world)
    model = build_model(config, VOCABULARY, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    with counted() as found:
        train_step(
            build_runner(model, config, mesh), optimizer, rank_part(batch_of(1), config, mesh), config, mesh, 1, {}
        )
    return found


@pytest.mark.parametrize("layout", TRAFFIC)
def test_traffic_is_the_counted_one(layout: str) -> None:
    """All seven terms. The plan is for a rank of the first stage, and the mean over such ranks where routing decides."""
    world, degrees = TRAFFIC[layout]
    words = [*DEEPSEEK, *degrees]
    _, expected = launch(1, planned, words, world, group=False)[0]
    stage = launch(world, sent, words, world)[: world // 2 if "pp2" in layout else world]
    for collective in stage[0]:
        total = sum(found[collective] for found in stage)
        assert total == len(stage) * expected.get(collective, 0), collective


def test_coupling_sends_one_number_per_token_from_stage_to_stage() -> None:
    with_it, without = (
        launch(2, sent, [*DEEPSEEK, *TRAFFIC[name][1]], 2)[0]["send"] for name in ("pp2", "pp2-without-cp")
    )
    assert with_it - without == 8 * (BATCH * SEQ + 4)  # and one more running term in each of the four micro-batches


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
        out = model(to_inputs(batch_of(1), torch.float64, mesh.device, 1, 0.0))
    del out
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("words", [[], [*DEEPSEEK, *OPTIONS, "--model.moe.dense_hidden_dim=400"]], ids=["", "options"])
def test_activations_are_those_that_autograd_keeps(words: list[str]) -> None:
    """Within a tenth: attention's kernel without storage is another one, and small vectors are kept here and there."""
    config = with_vocabulary(config_of(words, 1))
    model = sharded_model(config, resolve(config.parallelism, 1, str))
    found = memory(model, config, resolve(config.parallelism, 1, str))["activations"]
    logits = 8 * 16 * VOCABULARY * 8
    assert found - logits == pytest.approx(saved_bytes(words), rel=0.1)


@pytest.mark.parametrize("method", ["sample", "sketch"])
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_estimators_of_sp_are_planned(method: str, mode: str) -> None:
    """What they keep is more than without sp, sample at 1/8 less than exact."""
    words = [f"--activation_checkpoint.mode={mode}"]
    found, exact, without = (
        launch(1, planned, [*words, *more], 1, group=False)[0][0]["activations"]
        for more in ([f"--regularizers.sp.method={method}"], [], ["--regularizers.sp.weight=0"])
    )
    if mode == "none":
        assert found > without
    assert method != "sample" or without <= found <= exact
