"""Whole runs of a tiny model: it learns, resumes bitwise, stops before bad numbers, and writes what it promises."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.runs import DEEPSEEK, TIMED, Make, saved_tensors, train, untimed
from titan_moe.checkpoint.dcp import _MetadataUnpickler, load_checkpoint
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.load import load_config
from titan_moe.data.prepare import prepare
from titan_moe.errors import TrainingError, UserError
from titan_moe.parallel.mesh import single
from titan_moe.train.trainer import Trainer

ALL_TERMS = [
    "--regularizers.o.weight=1e-3",
    "--regularizers.o.match_lb=true",
    "--regularizers.v.weight=1e-3",
    "--regularizers.v.match_lb=true",
    "--regularizers.v.warmup_steps=4",
    "--regularizers.erc.weight=0.1",
    "--regularizers.cp.source=transition",
]


@pytest.fixture(autouse=True)
def _restore_determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def test_a_run_directory_has_all_it_should(tiny_config: Make) -> None:
    config = tiny_config("--balancer.rate=1e-3", "--model.moe.shared_experts=1", "--checkpoint.keep=2")
    found = train(config)
    run_dir = RunDir(config)
    assert [r["step"] for r in found if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in found if r["kind"] == "validation"] == [0, 3, 6]
    wanted = {"kind", "step", "tokens", "loss", "ce", "reg/lb", "reg/z", "reg/sp", "reg/cp", "grad_norm", "lr", *TIMED}
    wanted |= {"data_crc", "moe/max_vio", "moe/entropy", "moe/topk_mass", "moe/overlap", "moe/dead"}
    last = found[-2]
    assert set(last) == wanted
    assert last["tokens"] == 6 * 4 * 32
    weighted = sum(
        {n: t.weight for n, t in config.regularizers.options().items()}[name] * last[f"reg/{name}"]
        for name in ("lb", "z", "sp", "cp")
    )
    assert last["loss"] == pytest.approx(last["ce"] + weighted, rel=1e-6)
    assert set(found[0]) == {"kind", "step", "loss", "perplexity", "bits_per_byte"}
    assert run_dir.saved_steps() == [4, 6]
    assert load_config(str(run_dir.path / "config.toml")) == config
    assert "step 6/6" in run_dir.log.read_text()
    events = EventAccumulator(str(run_dir.tensorboard), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"train/loss", "reg/sp", "moe/max_vio", "validation/perplexity"} <= set(tags["scalars"])
    assert {"routing/load", "routing/cond_0_1", "routing/cond_1_2"} == set(tags["images"])
    assert [e.step for e in events.Images("routing/load")] == [0, 3, 6]
    assert "config/text_summary" in tags["tensors"]


def test_the_tiny_model_learns(tiny_config: Make) -> None:
    found = train(tiny_config("--training.steps=80", "--optimizer.lr=1e-2", "--metrics.tensorboard=false"))
    validation = [r["bits_per_byte"] for r in found if r["kind"] == "validation"]
    assert validation[-1] < 0.8 * validation[0]


@pytest.mark.parametrize(
    "style", [[], DEEPSEEK, [*ALL_TERMS, "--regularizers.sp.method=sample"]], ids=["", "ds", "all"]
)
def test_resumed_after_any_step_it_is_bitwise_the_same(tiny_config: Make, style: list[str]) -> None:
    options = ["--training.deterministic=true", "--checkpoint.interval=1", "--training.microbatch_size=2", *style]
    whole = tiny_config("--job.name=whole", *options)
    wanted = train(whole)
    final = saved_tensors(RunDir(whole).checkpoint(6))
    for step in range(1, 6):
        config = tiny_config(f"--job.name=from-{step}", *options)
        target, source = RunDir(config), RunDir(whole)
        target.open()
        target.close()
        for saved in range(1, step + 1):
            shutil.copytree(source.checkpoint(saved), target.checkpoint(saved))
        shutil.copy(source.metrics, target.metrics)  # rows past the checkpoint must go and come again
        with target.metrics.open("a") as file:
            file.write('{"kind": "train", "step": 7, "lo')  # as a killed process leaves it
        assert untimed(train(config)) == untimed(wanted)
        again = saved_tensors(target.checkpoint(6))
        assert final.keys() == again.keys()
        assert all(torch.equal(final[name], again[name]) for name in final)
    if style == DEEPSEEK:
        assert bool(final["model.layers.0.moe.router.expert_bias"].any())


def test_tensorboard_shows_every_step_once_after_resuming(tiny_config: Make) -> None:
    config = tiny_config("--checkpoint.interval=2")
    train(config)
    run_dir = RunDir(config)
    for step in (4, 6):
        shutil.rmtree(run_dir.checkpoint(step))
    train(config)
    events = EventAccumulator(str(run_dir.tensorboard), size_guidance={"scalars": 0}).Reload()
    assert [e.step for e in events.Scalars("train/ce")] == [1, 2, 3, 4, 5, 6]


def test_a_longer_schedule_goes_on(tiny_config: Make) -> None:
    train(tiny_config())
    found = train(tiny_config("--training.steps=8"))
    assert [r["step"] for r in found if r["kind"] == "train"] == list(range(1, 9))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--model.moe.experts=4", r"model\.moe\.experts"),
        ("--regularizers.sp.weight=0.5", r"regularizers\.sp\.weight"),
        ("--job.seed=1", r"job\.seed"),
        ("--training.batch_size=2", r"training\.batch_size"),
        ("--data.validation_fraction=0.5", r"data\.validation_fraction"),
    ],
)
def test_what_may_not_change_on_resuming(tiny_config: Make, change: str, named: str) -> None:
    first = tiny_config("--training.steps=2")
    train(first)
    before = {p: p.read_bytes() for p in RunDir(first).checkpoints.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=named):
        train(tiny_config("--training.steps=4", change))
    assert {p: p.read_bytes() for p in RunDir(first).checkpoints.rglob("*") if p.is_file()} == before


def test_other_text_is_refused(tiny_config: Make, tmp_path: Path) -> None:
    text = tmp_path / "other"
    text.mkdir()
    for n in range(30):
        (text / f"{n}.txt").write_text(f"file {n}: " + "some words that differ from file to file\n" * (200 + n))
    options = [f"--data.corpus={text}", "--tokenizer.vocab_size=300"]
    train(tiny_config("--training.steps=2", *options))
    (text / "0.txt").write_text("changed: " + "some words that differ from file to file\n" * 500)
    with pytest.raises(UserError, match=r"data\.corpus: the t"):
        train(tiny_config("--training.steps=4", *options))


def test_starting_from_the_weights_of_another_run(tiny_config: Make) -> None:
    first = tiny_config("--job.name=first")
    trained = [r["loss"] for r in train(first) if r["kind"] == "validation"][-1]
    path = RunDir(first).path
    found = train(tiny_config("--job.name=second", f"--checkpoint.load_path={path}"))
    assert found[0]["loss"] == pytest.approx(trained, rel=1e-6)
    assert found[0]["step"] == 0
    with pytest.raises(UserError, match=r"another model: model\.dim"):
        train(tiny_config("--job.name=third", f"--checkpoint.load_path={path}", "--model.dim=64"))
    with pytest.raises(UserError, match="is not a checkpoint"):
        train(tiny_config("--job.name=fourth", "--checkpoint.load_path=/tmp"))
    tensors = RunDir(first).checkpoint(6) / "__0_0.distcp"
    data = bytearray(tensors.read_bytes())
    data[-100] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(UserError, match=r"step-00000006 is damaged: __0_0\.distcp is altered"):
        train(tiny_config("--job.name=fifth", f"--checkpoint.load_path={path}"))


def test_a_damaged_checkpoint_is_refused_in_one_line(tiny_config: Make) -> None:
    config = tiny_config("--training.steps=2")
    train(config)
    path = RunDir(config).checkpoint(2)
    trainer = Trainer(config, prepare(config), RunDir(config), single(torch.device("cpu")))
    for name in (".metadata", "__0_0.distcp"):
        good = (path / name).read_bytes()
        (path / name).write_bytes(good[: len(good) // 2])
        with pytest.raises(UserError, match="can't be loaded") as caught:
            load_checkpoint(path, trainer.model, trainer.optimizer)
        assert "\n" not in str(caught.value)
        (path / name).write_bytes(good)
    load_checkpoint(path, trainer.model, trainer.optimizer)


def test_a_checkpoint_that_would_run_code_does_not(tiny_config: Make, tmp_path: Path) -> None:
    import os
    import pickle

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    config = tiny_config("--training.steps=2")
    train(config)
    path = RunDir(config).checkpoint(2)
    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    trainer = Trainer(config, prepare(config), RunDir(config), single(torch.device("cpu")))
    with pytest.raises(UserError, match="can't be loaded"):
        load_checkpoint(path, trainer.model, trainer.optimizer)
    assert not (tmp_path / "owned").exists()


def test_metadata_may_get_members_of_enumerations_and_nothing_else() -> None:
    """Early releases of Python 3.11 pickle an enumeration's member as `getattr(kind, name)`."""
    import io
    import pickle

    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

    class Get:
        def __init__(self, kind: Any, name: str) -> None:
            self.asked = (kind, name)

        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, self.asked

    def read(kind: Any, name: str) -> Any:
        return _MetadataUnpickler(io.BytesIO(pickle.dumps(Get(kind, name)))).load()

    member = next(iter(_MEM_FORMAT_ENCODING))
    assert read(_MEM_FORMAT_ENCODING, member.name) is member
    for kind, name in ((Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), ("text", "join")):
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            read(kind, name)


def test_a_term_that_is_not_finite_is_named(tiny_config: Make) -> None:
    config = tiny_config()
    run_dir = RunDir(config)
    run_dir.open()
    trainer = Trainer(config, prepare(config), run_dir, single(torch.device("cpu")))
    with torch.no_grad():
        trainer.model.layers["1"].moe.router.weight.fill_(1e30)
    with pytest.raises(
        TrainingError, match="step 1: reg/z is not finite; nothing was updated, there is no checkpoint yet"
    ):
        trainer.run()
    run_dir.close()


def test_lr_schedules() -> None:
    from titan_moe.config.tables import LRScheduler
    from titan_moe.optim import lr_fraction

    def at(step: int, **kwargs: Any) -> float:
        return lr_fraction(step, 100, LRScheduler(warmup_steps=10, min_lr_fraction=0.1, **kwargs))

    for decay in ("cosine", "linear", "wsd", "none"):
        assert at(1, decay=decay) == pytest.approx(0.1)
        assert at(10, decay=decay) == 1.0
        assert at(100, decay=decay) == pytest.approx(1.0 if decay == "none" else 0.1)
    assert at(55, decay="cosine") == at(55, decay="linear") == pytest.approx(0.55)
    assert at(80, decay="wsd", decay_fraction=0.2) == 1.0
    assert at(90, decay="wsd", decay_fraction=0.2) == pytest.approx(0.55)


def test_weight_decay_spares_norms(tiny_config: Make) -> None:
    config = tiny_config("--optimizer.lr=0.1", "--optimizer.weight_decay=0.5")
    trainer = Trainer(config, prepare(config), RunDir(config), single(torch.device("cpu")))
    decayed, spared = trainer.optimizer.param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert decayed["weight_decay"] == 0.5
    assert spared["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] for p in spared["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_terms_measured_at_weight_zero_leave_the_training_alone(tiny_config: Make) -> None:
    off = ["--regularizers.z.weight=0", "--regularizers.sp.weight=0", "--regularizers.cp.weight=0"]
    plain = train(tiny_config("--job.name=plain", *off))
    measured = train(tiny_config("--job.name=measured", *off, "--regularizers.measure=z,sp,cp"))
    assert "reg/sp" not in plain[1]
    assert measured[1]["reg/sp"] > 0
    for a, b in zip(plain, measured, strict=True):
        assert a.get("ce") == b.get("ce")
        assert a.get("grad_norm") == b.get("grad_norm")


def test_all_seven_terms_with_scaling_and_warm_up(tiny_config: Make) -> None:
    config = tiny_config(*ALL_TERMS, "--regularizers.sp.method=sketch")
    found = [r for r in train(config) if r["kind"] == "train"]
    state = json.loads((RunDir(config).checkpoint(6) / "state.json").read_text())
    first = found[0]
    for name in ("o", "v"):
        # The power of ten nearest (in the exponent) to lb's size over the term's.
        assert 0.3 < state["scales"][name] * abs(first[f"reg/{name}"]) / first["reg/lb"] < 3.2
    for row in found:
        factors = {"o": state["scales"]["o"], "v": state["scales"]["v"] * min(1.0, row["step"] / 4)}
        terms = {n: t.weight for n, t in config.regularizers.options().items()}
        weighted = sum(weight * factors.get(name, 1.0) * row[f"reg/{name}"] for name, weight in terms.items())
        assert row["loss"] == pytest.approx(row["ce"] + weighted, rel=1e-6)


def test_profiler_writes_a_trace(tiny_config: Make) -> None:
    config = tiny_config("--profiling.enable=true", "--profiling.start=2", "--profiling.steps=1")
    train(config)
    assert list(RunDir(config).profile.glob("*.json.gz"))
