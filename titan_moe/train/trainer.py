"""A run, from its newest checkpoint to its last step or a signal. What one step does: `step.train_step`."""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_moe import __version__
from titan_moe.checkpoint.changes import check_unchanged, consequences, tokens_of_microbatch
from titan_moe.checkpoint.dcp import load_checkpoint, tensors
from titan_moe.checkpoint.health import after_non_finite, check_finite
from titan_moe.checkpoint.resume import newest_good
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.checkpoint.saver import Saver, due
from titan_moe.checkpoint.start import start_from
from titan_moe.checkpoint.state import FORMAT_VERSION, State, dump
from titan_moe.config.checks import without_effect
from titan_moe.config.degrees import micro_batch_size
from titan_moe.config.extensions import Tracker, module_digests
from titan_moe.config.tables import Config
from titan_moe.config.trust import with_absolute_paths
from titan_moe.data.loader import Batch, DataRank, StepData, TrainingLoader, Windows
from titan_moe.data.prepare import Prepared
from titan_moe.data.shards import TokenStream
from titan_moe.data.stream_reader import training_windows
from titan_moe.errors import NonFiniteError, TrainingError, UserError
from titan_moe.estimate.counts import count, meta_model
from titan_moe.model.transformer import Transformer
from titan_moe.optim import build_optimizer, lr_fraction, set_lr
from titan_moe.parallel.compilation import CompileTime
from titan_moe.parallel.mesh import Mesh, from_first
from titan_moe.parallel.parallelize import build_runner
from titan_moe.runtime.binding import bind_threads
from titan_moe.runtime.device import make_deterministic, peak_flops, peak_memory_gib
from titan_moe.runtime.stopping import Stopping
from titan_moe.train.build import build_model
from titan_moe.train.garbage import collected_every
from titan_moe.train.profiling import profiler
from titan_moe.train.step import measure, train_step
from titan_moe.train.step_log import HostFacts, StepLog
from titan_moe.train.trackers import open_trackers
from titan_moe.train.trackers.console import short
from titan_moe.train.trackers.dashboards import routing_images
from titan_moe.train.validation import validate
from titan_moe.train.waiting import TextOfRun
from titan_moe.train.watch import RoutingWatch, Spikes

log = logging.getLogger("titan_moe")


Evaluation = Callable[[Transformer, int, Callable[[], None]], dict[str, float]]
"""Model, step and a function to call now and then, to the numbers of a row, by name. A collective; empty except on rank 0."""


class Trainer:
    """A run: everything that lives as long as the process."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        run_dir: RunDir,
        mesh: Mesh,
        progress: Callable[[], None] = lambda: None,
        evaluation: Evaluation | None = None,
    ) -> None:
        """progress: called before every step and validation batch, so that a watchdog can tell when a rank is stuck.
        evaluation: called every `eval.every` steps."""
        self.progress, self.evaluation = progress, evaluation
        self.config, self.run_dir, self.mesh, self.device = config, run_dir, mesh, mesh.device
        if config.training.deterministic:
            make_deterministic()
        self.tokenizer = prepared.tokenizer
        self.modules = module_digests(config.extensions.modules)
        self.data_fingerprint = prepared.manifest.fingerprint
        form = (config.training.seq_len, self.tokenizer.eos, config.model.document_mask)
        train = training_windows(prepared.folder, prepared.manifest, *form)
        self.validation_windows = Windows(TokenStream(prepared.folder, prepared.manifest, "validation"), *form)
        part = DataRank(micro_batch_size(config, mesh.degrees), mesh.data_rank, mesh.degrees.data)
        pin = mesh.device.type == "cuda"
        self.loader = TrainingLoader(train, config.training.batch_size, config.job.seed, part, mesh.first, pin)
        self.epoch_sequences = len(train)
        self.model = build_model(config, prepared.tokenizer.vocab_size, mesh)
        self.runner = build_runner(self.model, config, mesh)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.saver = Saver(run_dir, self.model, self.optimizer, config.checkpoint)
        self.counts = count(meta_model(self.model.settings, self.model.dtype), config.training.seq_len)
        self.peak = peak_flops(self.device, self.model.dtype)
        self.scales: dict[str, float] | None = None
        self.compile_time = CompileTime()
        self.stopping = Stopping(mesh.everyone, mesh.device)
        self.text = TextOfRun(train, config.training.batch_size, mesh, self.stopping)
        self.steps = StepLog(self.model, self.optimizer, self.stopping, Spikes(config.training.skip_spikes))
        self.trackers: list[Tracker] = []
        """Open during `run` on rank 0; none on the other ranks."""
        self.skipped = 0
        """Updates left out since the first step."""
        self.routing_watch = RoutingWatch(self.model.moe_layers, config.model.moe.experts, config.model.moe.top_k)

    def run(self) -> int:
        """Trains to the last step or to a signal. Returns the exit status."""
        config, path = self.config, self.run_dir.path
        start = self.resume()
        self.announce()
        with (
            open_trackers(config, path, start, self.mesh.first) as self.trackers,
            self.naming_checkpoint(),
            self.stopping.signals(),
            self.text.written(config.training.steps, path),
            profiler(config.profiling, self.run_dir.profile) as profile,
            contextlib.closing(self.loader.steps(start)) as data,
            collected_every(config.training.gc_freq) as self.collect_garbage,
        ):
            first = start == 0 or self.validation_is_missing(start)
            if first and not self.validate(start):
                stopped_at = start  # a step more, and the resumed run would not see that this row is missing
            elif not self.text.is_there(start + 1, self.progress):
                stopped_at = start
            else:
                stopped_at = self.loop(start, profile, data)
            self.saver.finish()
        self.text.check()
        if stopped_at == config.training.steps:
            self.saver.delete_old()  # the last validation was finite
            log.info(f"Done: {path}")
            return 0
        assert self.stopping.signal is not None
        name = signal.Signals(self.stopping.signal).name
        log.info(f"Stopped by {name} after step {stopped_at}; the same command goes on from there")
        return 128 + self.stopping.signal

    def loop(self, start: int, profile: Any, data: Iterator[StepData]) -> int:
        """Trains until the last step or a signal, and saves before it returns. Returns the step it stopped after."""
        config, steps = self.config, self.config.training.steps
        for step in range(start + 1, steps + 1):
            self.progress()
            self.steps.begin()
            set_lr(self.optimizer, lr_fraction(step, steps, config.lr_scheduler))
            batches, data_crc = next(data)
            factors = self.model.terms.factors(step, self.scales_to_lb(batches, step))
            result = train_step(self.runner, self.optimizer, batches, config, self.mesh, step, factors, self.steps)
            self.steps.add(self.host_facts(step, data_crc, result.skipped))
            if not self.steps.deferred or step == 1 or due(step, config.metrics.interval):
                self.report()
            if step == start + 1 and self.device.type == "cpu":
                bind_threads()  # after what the first step starts: a compiler's processes keep all CPUs
            profile.step()
            self.collect_garbage(step)
            last = step == steps
            if last or due(step, config.validation.interval):
                self.validate(step, to_the_end=last)
            if last or due(step, config.eval.every):
                self.evaluate(step)
            stop = self.stopping.stop
            saves = last or stop or due(step, config.checkpoint.interval)
            if saves:
                self.save(step, batches)
            if not last and not stop and not self.text.is_there(step + 1, self.progress):
                stop = True
                if not saves:
                    self.save(step, batches)
            if stop:
                return step
        return steps

    @contextlib.contextmanager
    def naming_checkpoint(self) -> Iterator[None]:
        """Adds to the error of a non-finite number which checkpoint the run can go on from."""
        try:
            yield
        except NonFiniteError as error:
            self.saver.finish()
            raise TrainingError(f"{error}, {after_non_finite(self.run_dir, error.state, self.mesh.first)}") from error

    def report(self) -> None:
        """Reads the steps since the last report from the device and gives their rows to the trackers."""
        for facts, numbers, seconds in self.steps.read():
            if self.mesh.first:
                self.log_step(facts, numbers, seconds)
                self.compile_time.report()
            self.saver.delete_old()  # this step, from the newest checkpoint or a later one, was finite

    def validation_is_missing(self, step: int) -> bool:
        """Whether a signal interrupted the validation after `step`, the step of the checkpoint that this run resumes from."""
        if not due(step, self.config.validation.interval):
            return False
        return not from_first(lambda: self.run_dir.has_validation(step))

    def scales_to_lb(self, batches: Sequence[Batch], step: int) -> dict[str, float]:
        """The scaling of terms with `match_lb`, measured on the first batch of the run and kept in its checkpoints."""
        if self.scales is None:
            self.scales = {}
            if self.model.terms.matched:
                values = measure(self.runner, batches, self.mesh, step)
                self.scales = self.model.terms.scales_to_lb(values)
                log.info("scaled to lb: " + ", ".join(f"{name} x {scale:g}" for name, scale in self.scales.items()))
        return self.scales

    def host_facts(self, step: int, data_crc: int | None, skipped: bool) -> HostFacts:
        self.skipped += skipped
        return HostFacts(
            step, self.optimizer.param_groups[0]["lr"], data_crc, peak_memory_gib(self.device), self.skipped
        )

    def log_step(self, facts: HostFacts, numbers: Tensor, seconds: float) -> None:
        """A train row of metrics.jsonl (fields: docs/metrics.md), and warnings. numbers: packed, on the CPU."""
        training, step = self.config.training, facts.step
        tokens = training.batch_size * training.seq_len
        values, counts = self.steps.unpack(numbers)
        for line in self.routing_watch.look(counts):
            log.warning(f"step {step}: {line}")
        row = {
            "kind": "train",
            "step": step,
            "tokens": step * tokens,
            **values,
            "lr": facts.lr,
            "data_crc": facts.data_crc,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "mfu": self.counts.flops_per_token * tokens / seconds / (self.peak * self.mesh.degrees.world),
            "memory_gib": facts.memory_gib,
            **({"skipped": facts.skipped} if training.skip_spikes else {}),
        }
        for tracker in self.trackers:
            tracker.log(row)

    def validate(self, step: int, to_the_end: bool = False) -> bool:
        """Validates and logs the result. Returns False if a signal interrupted it, in which case the resumed run repeats it.

        to_the_end: ignore signals."""
        self.report()

        def interrupted() -> bool:
            self.progress()
            return not to_the_end and self.stopping.vote()

        config = self.config
        size = micro_batch_size(config, self.mesh.degrees)
        count = config.validation.sequences
        try:
            found = validate(self.runner, self.validation_windows, self.tokenizer, count, size, self.mesh, interrupted)
        except NonFiniteError as error:
            raise NonFiniteError(f"validation after step {step}: {error}", state=step) from error
        if found is None:
            return False
        row = {
            "kind": "validation",
            "step": step,
            "loss": found.losses.loss,
            "perplexity": found.losses.perplexity,
            "bits_per_byte": found.losses.bits_per_byte,
        }
        for tracker in self.trackers:
            tracker.log(row)
            if hasattr(tracker, "log_images"):
                tracker.log_images(step, routing_images(found))
        return True

    def evaluate(self, step: int) -> None:
        """Runs the tasks and logs their measures."""
        if self.evaluation is None:
            return
        self.report()
        row = {"kind": "eval", "step": step, **self.evaluation(self.model, step, self.progress)}
        for tracker in self.trackers:
            tracker.log(row)

    def save(self, step: int, batches: Sequence[Batch]) -> None:
        """Writes a checkpoint, unless a number of it, or of a forward pass of `batches` from it, is not finite."""
        self.report()
        self.progress()
        losses = measure(self.runner, batches, self.mesh, step)
        check_finite(step, tensors(self.model, self.optimizer), losses, self.mesh.everyone)
        facts = {
            "format_version": FORMAT_VERSION,
            "titan_moe": __version__,
            "torch": torch.__version__,
            "config": dump(with_absolute_paths(self.config)),
            "data": self.data_fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "scales": self.scales,
            "norms": list(self.steps.spikes.norms),
            "spikes_in_a_row": self.steps.spikes.in_a_row,
            "skipped": self.skipped,
            "modules": self.modules,
            "step_tokens": tokens_of_microbatch(self.config, self.mesh.degrees),
        }
        self.saver.save(step, facts)

    def resume(self) -> int:
        """Loads the newest checkpoint, or the initial weights if there is none. Returns the checkpoint's step, or 0."""
        newest = newest_good(self.run_dir, self.mesh, self.config.checkpoint.start_over)
        step = 0
        if newest is not None:
            state = self.run_dir.state(newest)
            if state.imported:
                raise UserError(
                    f"job.name: {self.run_dir.path} has imported weights and is no run to go on with; start one from them by "
                    f"--job.name=NAME --checkpoint.load_path={self.run_dir.path}"
                )
            both = check_unchanged(state.config, self.config, newest)
            self.check_data(state, newest)
            load_checkpoint(newest, self.model, self.optimizer)
            self.scales = state.scales
            self.steps.spikes = Spikes(self.config.training.skip_spikes, state.norms, state.spikes_in_a_row)
            self.skipped = state.skipped
            step = state.step
            log.info(f"Going on from {newest}")
            for line in consequences(both, state, self.config, self.mesh.degrees, self.modules):
                if self.mesh.first:
                    log.warning(f"from step {step + 1} on: {line}")
        else:
            start_from(self.model, self.config, self.tokenizer.fingerprint, self.mesh)
        if self.mesh.first:
            junk = self.run_dir.cut_metrics(step)
            if junk:
                log.warning(f"{self.run_dir.metrics}: {junk} damaged line{'s' if junk > 1 else ''} left out")
            self.run_dir.cut_tensorboard(step)
            self.run_dir.write_config(with_absolute_paths(self.config))
            self.run_dir.write_tokenizer(self.tokenizer.model)
        return step

    def check_data(self, state: State, newest: Path) -> None:
        """Raises UserError when the checkpoint was made with other training text or another tokenizer."""
        if state.tokenizer != self.tokenizer.fingerprint:
            raise UserError(
                f"tokenizer.path: the tokenizer is not the one that {newest} was trained with, so its weights would be read "
                "under other ids; leave tokenizer.path out (the run directory has the tokenizer), or choose another --job.name"
            )
        if state.data == self.data_fingerprint:
            return
        if not self.config.checkpoint.allow_new_data:
            before, now = state.config.get("data", {}), dump(self.config)["data"]
            keys = [f"data.{key}" for key in now if key in before and before[key] != now[key] and key != "cache_dir"]
            raise UserError(
                f"{keys[0] if keys else 'data.corpus'}: the training text is not the one that {newest} was trained with; give "
                "back the same, choose another --job.name, or go on with other text by --checkpoint.allow_new_data=true"
            )
        log.warning(f"going on with other text than {newest} was made with, as checkpoint.allow_new_data says")

    def announce(self) -> None:
        if not self.mesh.first:
            return
        for line in without_effect(self.config):
            log.warning(line)
        if self.device.type == "cuda" and self.config.training.dtype != "bfloat16":
            log.warning(
                f"training.dtype = {self.config.training.dtype!r} on a GPU: a product per expert, whose sizes the host reads; "
                "'bfloat16' is many times faster"
            )
        degrees = self.mesh.degrees
        layout = ", ".join(f"{name} {size}" for name, size in degrees._asdict().items() if size > 1)
        where = f"{degrees.world} x {self.device.type} ({layout})" if layout else self.device.type
        epochs = self.config.training.steps * self.config.training.batch_size / self.epoch_sequences
        growing = self.text.growing
        passes = "its text is tokenised meanwhile" if growing else f"{epochs:.2f} passes over the training text"
        log.info(
            f"{self.config.job.name}: {short(self.counts.total)} parameters, {short(self.counts.active)} active; "
            f"{self.config.training.dtype} on {where}; {passes}; "
            f"writing to {self.run_dir.path}"
        )
