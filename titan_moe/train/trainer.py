"""The training loop. Read `train_step` first: batch, forward, loss, backward, clip, step, balance."""

import contextlib
import logging
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_moe import __version__, extend
from titan_moe.config.describe import to_toml
from titan_moe.config.tables import Config
from titan_moe.data.loader import Batch, Windows, training_loader
from titan_moe.data.prepare import Prepared
from titan_moe.data.shards import TokenStream
from titan_moe.errors import TrainingError, UserError
from titan_moe.model.counts import count, meta_model
from titan_moe.model.init import init_weights
from titan_moe.model.transformer import Inputs, Transformer
from titan_moe.parallel.context import take_part
from titan_moe.parallel.degrees import micro_batch_size
from titan_moe.parallel.fsdp import reduce_gradients, sum_router_gradients
from titan_moe.parallel.mesh import Mesh, from_first
from titan_moe.parallel.norm import clip_gradients
from titan_moe.parallel.parallelize import parallelize
from titan_moe.parallel.tensor import sum_norm_gradients
from titan_moe.train.checkpoint import load_checkpoint
from titan_moe.train.device import (
    make_deterministic,
    peak_flops,
    peak_memory_gib,
    synchronize,
)
from titan_moe.train.metrics import (
    Console,
    JsonLines,
    TensorBoard,
    add_carry,
    first_non_finite,
    non_finite_gradient,
    routing_row,
    short,
)
from titan_moe.train.optimizer import build_optimizer, lr_fraction, set_lr
from titan_moe.train.profiling import profiler
from titan_moe.train.resume import newest_good
from titan_moe.train.run_dir import (
    FORMAT_VERSION,
    RunDir,
    check_unchanged,
    read_state,
)
from titan_moe.train.saver import Saver, due
from titan_moe.train.terms import build_terms, lb_scales, weight_factors
from titan_moe.train.validation import validate
from titan_moe.train.watch import RoutingWatch, Spikes
from titan_moe.train.weights import start_from
from torchtitan_ext.balancer import update_expert_bias
from torchtitan_ext.carry import Carry
from torchtitan_ext.collectives import all_sum
from torchtitan_ext.gram import accumulation_dtype

log = logging.getLogger("titan_moe")

# SIGUSR1 is a scheduler's warning.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StepResult(NamedTuple):
    loss: float
    """J: cross-entropy plus weighted terms."""
    ce: float
    carry: Carry
    grad_norm: float
    """Before clipping."""
    skipped: bool = False
    """Whether the update was left out."""


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: Config,
    mesh: Mesh,
    step: int,
    factors: Mapping[str, float],
    spikes: Spikes | None = None,
) -> StepResult:
    """One optimizer step on a global batch. factors: on the terms' weights at this step. spikes: may leave the update out.

    Raises TrainingError, before the update and on all ranks, for a value that is not finite.
    """
    dtype = accumulation_dtype(model.dtype)
    loss = ce = torch.zeros((), dtype=dtype, device=mesh.device)
    carry: Carry | None = None
    parts = list(micro_batches(batch, config, mesh))
    inputs = [model_inputs(part, dtype, mesh, step, first=number == 0) for number, part in enumerate(parts)]
    if model.pipeline is not None:
        carry = model.empty_carry(0, mesh.device)  # of a rank without the last stage
        for result in model.pipeline.step(inputs, factors):
            objective = result.ce + model.terms.objective(result.carry.terms, factors)
            loss, ce, carry = loss + objective, ce + result.ce, add_carry(carry, result.carry)
    else:
        for number, one in enumerate(inputs):
            reduce_gradients(model, now=number == len(parts) - 1 or not config.parallelism.defer_reduction)
            out = model(one)
            objective = out.ce + model.terms.objective(out.carry.terms, factors)
            objective.backward()
            loss, ce, carry = loss + objective.detach(), ce + out.ce.detach(), add_carry(carry, out.carry)
    assert carry is not None
    loss, ce, carry = sum_over_ranks(loss, ce, carry, mesh)
    sum_router_gradients(model, mesh)
    sum_norm_gradients(model, mesh.tp)
    norm = clip_gradients(list(model.parameters()), config.training.max_grad_norm, mesh.pp)
    result = StepResult(loss.item(), ce.item(), carry, norm.item())
    check_finite(model, result)
    if spikes is not None and spikes.over(result.grad_norm):
        optimizer.zero_grad()
        return result._replace(skipped=True)
    optimizer.step()
    optimizer.zero_grad()
    if config.balancer.rate > 0:
        for moe in model.moe_modules():
            update_expert_bias(
                moe.router.expert_bias, carry.counts[moe.layer], config.balancer.rate, config.balancer.center
            )
    return result


def micro_batches(batch: Batch, config: Config, mesh: Mesh) -> Iterator[Batch]:
    """This rank's sequences of each micro-step."""
    size = micro_batch_size(config, mesh.degrees)
    return batch.split(size, mesh.data_rank, mesh.degrees.data)


def model_inputs(part: Batch, dtype: torch.dtype, mesh: Mesh, step: int, first: bool) -> Inputs:
    """The model's view of a micro-batch, this rank's part of its sequences. Terms that no token enters are computed in the
    first one, and every rank adds its share of them."""
    share = 1.0 / mesh.degrees.token_ranks if first else 0.0
    return take_part(part.inputs(dtype, mesh.device, step, share), mesh.degrees.cp, mesh.cp_rank)


def sum_over_ranks(loss: Tensor, ce: Tensor, carry: Carry, mesh: Mesh) -> tuple[Tensor, Tensor, Carry]:
    """What a step reports, over all ranks: one sum of numbers, one of counts."""
    numbers = over_tokens(torch.cat([loss.reshape(1), ce.reshape(1), carry.terms, carry.sums.flatten()]), mesh)
    terms = numbers[2 : 2 + carry.terms.numel()]
    sums = numbers[2 + carry.terms.numel() :].reshape(carry.sums.shape)
    counts = over_tokens(carry.counts, mesh)
    return numbers[0], numbers[1], carry._replace(terms=terms, counts=counts, sums=sums)


def over_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum over all ranks' tokens; of a pipeline, only the last stage has something to add."""
    return all_sum(all_sum(x, mesh.ranks.data), mesh.pp)


@torch.no_grad()
def measure_terms(model: Transformer, batch: Batch, config: Config, mesh: Mesh, step: int) -> dict[str, float]:
    """The terms of a global batch, unweighted, without an update."""
    carry: Carry | None = None
    dtype = accumulation_dtype(model.dtype)
    for number, part in enumerate(micro_batches(batch, config, mesh)):
        inputs = model_inputs(part, dtype, mesh, step, first=number == 0)
        _, found, _ = model.evaluate(inputs) if model.pipeline is None else model.pipeline.evaluate(inputs)
        carry = add_carry(carry, found)
    assert carry is not None
    return dict(zip(model.terms.names, over_tokens(carry.terms, mesh).tolist(), strict=True))


def check_finite(model: Transformer, result: StepResult) -> None:
    terms = routing_row(result.carry, model.terms.names)
    values = {"ce": result.ce, **terms, "loss": result.loss, "grad_norm": result.grad_norm}
    name = first_non_finite(values)
    if name == "grad_norm":
        name = f"grad_norm (gradient of {non_finite_gradient(model)})"
    if name is not None:
        raise TrainingError(f"{name} is not finite")


class Trainer:
    """A run: everything that lives as long as the process."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        run_dir: RunDir,
        mesh: Mesh,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """progress: is called whenever something has been done, so that a standstill shows."""
        self.progress = progress
        self.config, self.run_dir, self.mesh, self.device = config, run_dir, mesh, mesh.device
        if config.training.deterministic:
            make_deterministic()
        self.tokenizer = prepared.tokenizer
        self.data_fingerprint = prepared.manifest.fingerprint
        train, self.validation_windows = (
            Windows(
                TokenStream(prepared.folder, prepared.manifest, split),
                config.training.seq_len,
                self.tokenizer.eos,
                config.model.document_mask,
            )
            for split in ("train", "validation")
        )
        self.loader = training_loader(train, config.training.batch_size, config.job.seed)
        self.epoch_sequences = len(train)
        self.model = build_model(config, prepared.tokenizer.vocab_size, mesh)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.saver = Saver(run_dir, self.model, self.optimizer, config.checkpoint)
        self.counts = count(meta_model(self.model.settings, self.model.dtype), config.training.seq_len)
        self.peak = peak_flops(self.device, self.model.dtype)
        self.scales: dict[str, float] | None = None
        self.spikes = Spikes(config.training.skip_spikes)
        self.skipped = 0
        """Updates left out since the first step."""
        self.routing_watch = RoutingWatch(self.model.moe_layers, config.model.moe.experts, config.model.moe.top_k)
        self.signal: int | None = None
        """A signal to this process, until all ranks have agreed to stop; then the one that they stop for."""

    def run(self) -> int:
        """Trains to the end, or to a signal. Returns the exit status."""
        config = self.config
        start = self.resume()
        self.announce()
        tensorboard = None
        trackers: list[extend.Tracker] = []
        if self.mesh.first:
            console = Console(log.info, config.training.steps, start, config.metrics.interval)
            trackers += [JsonLines(self.run_dir.metrics), console]
        if self.mesh.first and config.metrics.tensorboard:
            folder, interval = self.run_dir.tensorboard, config.metrics.interval
            tensorboard = TensorBoard(folder, interval, start + 1 if start else 0, to_toml(config))
            trackers.append(tensorboard)
        if self.mesh.first:
            trackers += [extend.trackers[name](config, self.run_dir.path) for name in config.metrics.trackers]
        try:
            with self.signals(), profiler(config.profiling, self.run_dir.profile) as profile:
                first = start == 0 or self.validation_is_missing(start)
                if first and not self.validate(start, trackers, tensorboard):
                    stopped_at = start  # a step more, and nobody would know that this row is missing
                else:
                    stopped_at = self.loop(start, trackers, tensorboard, profile)
                self.saver.finish()
        finally:
            for tracker in trackers:
                tracker.close()
        if stopped_at == config.training.steps:
            log.info(f"Done: {self.run_dir.path}")
            return 0
        assert self.signal is not None
        name = signal.Signals(self.signal).name
        log.info(f"Stopped by {name} after step {stopped_at}; the same command goes on from there")
        return 128 + self.signal

    def loop(self, start: int, trackers: list[extend.Tracker], tensorboard: TensorBoard | None, profile: Any) -> int:
        """Steps until the last one or a signal; every way out has saved. Returns the step it stopped after."""
        config, steps = self.config, self.config.training.steps
        batches = iter(self.loader)
        for step in range(start + 1, steps + 1):
            began = time.perf_counter()
            self.progress()
            set_lr(self.optimizer, config.optimizer.lr * lr_fraction(step, steps, config.lr_scheduler))
            try:
                batch = next(batches)
                factors = weight_factors(config, step, self.scales_to_lb(batch, step))
                result = train_step(self.model, self.optimizer, batch, config, self.mesh, step, factors, self.spikes)
            except TrainingError as error:
                self.saver.finish()
                newest = self.run_dir.newest()
                where = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
                raise TrainingError(f"step {step}: {error}; nothing was updated, {where}") from error
            synchronize(self.device)
            row = self.row(step, batch, result, time.perf_counter() - began)
            self.look_at(step, result)
            for tracker in trackers:
                tracker.log(row)
            profile.step()
            last = step == steps
            if last or due(step, config.validation.interval):
                self.validate(step, trackers, tensorboard, to_the_end=last)
            stop = self.agreed_to_stop()
            if last or stop or due(step, config.checkpoint.interval):
                self.save(step)
            if stop:
                return step
        return steps

    def look_at(self, step: int, result: StepResult) -> None:
        """Says what a person should know of."""
        if result.skipped:
            log.warning(f"step {step}: gradient norm {result.grad_norm:.4g} is a spike; the update was left out")
        if self.mesh.first:
            for line in self.routing_watch.look(result.carry.counts):
                log.warning(f"step {step}: {line}")

    def validation_is_missing(self, step: int) -> bool:
        """Whether a signal broke off the validation after the step that this run goes on from."""
        if not due(step, self.config.validation.interval):
            return False
        return not from_first(lambda: self.run_dir.has_validation(step))

    def agreed_to_stop(self) -> bool:
        """Whether any rank got a signal by now; the same answer on all, and the same signal."""
        seen = torch.tensor([float(self.signal == number) for number in STOPPING], device=self.device)
        counts = all_sum(seen, self.mesh.everyone).tolist()
        agreed = next((number for number, count in zip(STOPPING, counts, strict=True) if count), None)
        if agreed is None:
            return False  # and a signal that came meanwhile stays for the next time
        self.signal = agreed
        return True

    def scales_to_lb(self, batch: Batch, step: int) -> dict[str, float]:
        """The scaling of terms with `match_lb`, measured on the first batch of the run and kept in its checkpoints."""
        if self.scales is None:
            self.scales = {}
            if self.config.regularizers.matched():
                values = measure_terms(self.model, batch, self.config, self.mesh, step)
                self.scales = lb_scales(self.config, values)
                log.info("scaled to lb: " + ", ".join(f"{name} x {scale:g}" for name, scale in self.scales.items()))
        return self.scales

    def row(self, step: int, batch: Batch, result: StepResult, seconds: float) -> dict[str, Any]:
        """A train row of metrics.jsonl (INTERFACE of the file: docs/metrics.md)."""
        training = self.config.training
        self.skipped += result.skipped
        tokens = training.batch_size * training.seq_len
        return {
            "kind": "train",
            "step": step,
            "tokens": step * tokens,
            "loss": result.loss,
            "ce": result.ce,
            **routing_row(result.carry, self.model.terms.names),
            "grad_norm": result.grad_norm,
            "lr": self.optimizer.param_groups[0]["lr"],
            "data_crc": zlib.crc32(batch.tokens.numpy().tobytes()),
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "mfu": self.counts.flops_per_token * tokens / seconds / (self.peak * self.mesh.degrees.world),
            "memory_gib": peak_memory_gib(self.device),
            **({"skipped": self.skipped} if training.skip_spikes else {}),
        }

    def validate(
        self, step: int, trackers: list[extend.Tracker], tensorboard: TensorBoard | None, to_the_end: bool = False
    ) -> bool:
        """A signal breaks it off, unless `to_the_end`; the run that goes on makes up for it. Returns whether it is done."""

        def broken_off() -> bool:
            self.progress()
            return not to_the_end and self.agreed_to_stop()

        config = self.config
        size = micro_batch_size(config, self.mesh.degrees)
        count = config.validation.sequences
        found = validate(self.model, self.validation_windows, self.tokenizer, count, size, self.mesh, broken_off)
        if found is None:
            return False
        row = {
            "kind": "validation",
            "step": step,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
        }
        for tracker in trackers:
            tracker.log(row)
        if tensorboard is not None:
            tensorboard.routing(step, found)
        return True

    def save(self, step: int) -> None:
        self.progress()
        facts = {
            "format_version": FORMAT_VERSION,
            "titan_moe": __version__,
            "torch": torch.__version__,
            "config": self.config.model_dump(mode="json"),
            "data": self.data_fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "loader": self.loader.state_dict(),
            "scales": self.scales,
            "norms": list(self.spikes.norms),
            "skipped": self.skipped,
        }
        self.saver.save(step, facts)

    def resume(self) -> int:
        """Loads the newest checkpoint, if there is one; returns the step that it was made after."""
        newest = newest_good(self.run_dir, self.mesh)
        step = 0
        if newest is not None:
            state = read_state(newest, "checkpoint")
            check_unchanged(state["config"], self.config, newest)
            self.check_data(state, newest)
            load_checkpoint(newest, self.model, self.optimizer)
            self.loader.load_state_dict(state["loader"])
            self.scales = state["scales"]
            self.spikes = Spikes(self.config.training.skip_spikes, state["norms"])
            self.skipped = state["skipped"]
            step = int(state["step"])
            log.info(f"Going on from {newest}")
        else:
            start_from(self.model, self.config, self.mesh)
        if self.mesh.first:
            junk = self.run_dir.cut_metrics(step)
            if junk:
                log.warning(f"{self.run_dir.metrics}: {junk} damaged line{'s' if junk > 1 else ''} left out")
            self.run_dir.cut_tensorboard(step)
            self.run_dir.write_config(self.config)
        return step

    def check_data(self, state: dict[str, Any], newest: Path) -> None:
        """Raises UserError when the run would go on with other text or another tokenizer."""
        for what, key, now in (
            ("the tokenizer", "tokenizer", self.tokenizer.fingerprint),
            ("the training text", "data", self.data_fingerprint),
        ):
            if state[key] != now and key == "data" and self.config.checkpoint.allow_new_data:
                log.warning(f"going on with other text than {newest} was made with, as checkpoint.allow_new_data says")
            elif state[key] != now:
                raise UserError(
                    f"data.corpus: {what} is not the one that {newest} was trained with; give back the same, "
                    "choose another --job.name, or go on with other text by --checkpoint.allow_new_data=true"
                )

    def announce(self) -> None:
        if not self.mesh.first:
            return
        degrees = self.mesh.degrees
        layout = ", ".join(f"{name} {size}" for name, size in degrees._asdict().items() if size > 1)
        where = f"{degrees.world} x {self.device.type} ({layout})" if layout else self.device.type
        epochs = self.config.training.steps * self.config.training.batch_size / self.epoch_sequences
        log.info(
            f"{self.config.job.name}: {short(self.counts.total)} parameters, {short(self.counts.active)} active; "
            f"{self.config.training.dtype} on {where}; {epochs:.2f} passes over the training text; "
            f"writing to {self.run_dir.path}"
        )

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT, SIGUSR1 and SIGHUP let the step finish and save; a second SIGINT leaves at once."""

        def remember(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's signature
            if self.signal is not None and number == signal.SIGINT:
                os._exit(130)
            self.signal = number
            log.info(f"{signal.Signals(number).name}: finishing this step, then saving")

        previous = {
            number: signal.signal(number, remember)
            for number in STOPPING
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # what `nohup` does
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def build_model(config: Config, tokenizer_vocab: int, mesh: Mesh) -> Transformer:
    """The network on its ranks, with its initial weights; no rank ever holds more than its share."""
    vocab_size = config.model.vocab_size or tokenizer_vocab
    settings = config.model.model_copy(update={"vocab_size": vocab_size})
    with torch.device("meta"):
        model = Transformer(settings, build_terms(config, mesh.ranks), getattr(torch, config.training.dtype))
    parallelize(model, config, mesh)
    model.to_empty(device=mesh.device)
    init_weights(model, config.job.seed)
    return model
