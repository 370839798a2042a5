"""Training steps of the medium scale: with and without sp and cp, the dearest kernels, float8, and other libraries."""

import statistics
from typing import Any

import torch
from benchmarking import interval
from peers import missing, mixtral_config, torchtitan_module
from torch import Tensor, nn
from torch._C._autograd import DeviceType

from gpu_checks.inputs import configuration, random_inputs
from gpu_checks.report import Report
from gpu_checks.timing import Work, alternating, gib, median_time, peak_gib
from gpu_checks.training import finished, meta_transformer, step_of, steps_of, tokens_of_step, utilization
from titan_moe.config.tables import Config, Model
from titan_moe.optim import build_optimizer
from torchtitan_ext.carry import Carry
from torchtitan_ext.terms import Tokens

PAIRS = 20
COLUMNS = ["mode", "what", "ms, median", "tokens/s", "of the bfloat16 peak", "peak GiB beyond weights"]


WITHOUT = ["--regularizers.sp.weight=0", "--regularizers.cp.weight=0"]
EAGER, COMPILED = ["--compile.enable=false"], ["--compile.enable=true"]


def modes(report: Report) -> dict[str, list[str]]:
    """Options of the model eager and compiled. Inductor takes a minute a model on a CPU, so toys are eager only."""
    return {"eager": EAGER} if report.toy else {"eager": EAGER, "compiled": COMPILED}


def row(report: Report, mode: str, label: str, config: Config, ms: float, memory: float) -> None:
    speed = f"{tokens_of_step(config) / ms * 1e3:,.0f}"
    report.row(mode, label, f"{ms:.2f}", speed, f"{utilization(report, config, ms):.3f}", gib(memory))


def compare(report: Report, mode: str, arms: dict[str, list[str]], pairs: int) -> float:
    """Rows of two arms, and the median ratio of the second over the first with its 95% interval."""
    a, b = arms
    works = steps_of(report, arms)
    times = alternating(works[a], works[b], pairs, report.device, lambda: report.left() < 10)
    for number, label in enumerate(arms):
        median = statistics.median(pair[number] for pair in times)
        memory = peak_gib(works[label], report.device)
        row(report, mode, label, configuration(report, "medium", arms[label]), median, memory)
    ratios = [second / first for first, second in times]
    low, high = interval(ratios)
    ratio = statistics.median(ratios)
    report.row(mode, f"{b} / {a}", f"{ratio:.4f}, {low:.4f} to {high:.4f} ({len(ratios)} pairs)")
    return ratio


def stage(report: Report) -> None:
    """Forward, loss, backward, clipping, AdamW."""
    training = configuration(report, "medium", []).training
    report.line(f"{stage.__doc__} {training.batch_size} sequences of {training.seq_len} tokens. Steps of both kinds")
    report.line("alternate; the ratio is the median of paired ratios, with its 95% interval.")
    report.table(*COLUMNS)
    pairs = 3 if report.toy else PAIRS
    for mode, more in modes(report).items():
        if not report.enough(30, mode):
            continue
        with report.trial(mode):
            arms = {"without sp, cp": [*WITHOUT, *more], "with sp, cp": more}
            ratio = compare(report, mode, arms, pairs)
            report.fact(f"sp and cp/{mode}", ratio - 1)


def float8(report: Report) -> None:
    if missing("torchao"):
        report.line("torchao: not installed")
        return
    report.table(*COLUMNS)
    for mode, more in modes(report).items():
        if not report.enough(30, mode):
            continue
        with report.trial(mode):
            pairs, on = 3 if report.toy else 7, [*more, "--float8.enable=true"]
            compare(report, mode, {"bfloat16": more, "float8": on}, pairs)
        with report.trial(f"{mode}, experts too"):
            compare(report, mode, {"bfloat16": more, "float8, experts too": [*on, "--float8.experts=true"]}, pairs)


class TorchTitanLayer(nn.Module):
    """TorchTitan's MoE layer in the place of ours in a block."""

    def __init__(self, settings: Model) -> None:
        super().__init__()
        self.layer = torchtitan_module(settings)

    def forward(self, x_TD: Tensor, carry: Carry, tokens: Tokens) -> tuple[Tensor, Carry, None]:  # noqa: ARG002 - a layer's
        # Its weights are float32, as ours are; FSDP's mixed precision would hand it copies in the type of x.
        weights = {name: parameter.to(x_TD.dtype) for name, parameter in self.layer.named_parameters()}
        out = torch.func.functional_call(self.layer, weights, (x_TD.unsqueeze(0),))
        return out.squeeze(0), carry, None


def torchtitan_step(report: Report, config: Config) -> Work:
    """Our model and training step with TorchTitan's MoE layers; they compute no loss term."""
    model = meta_transformer(config)
    for block in model.blocks():
        with torch.device("meta"):
            layer = TorchTitanLayer(config.model)
        block.moe = layer  # type: ignore[assignment]
    model.moe_modules = lambda: []  # type: ignore[method-assign]
    model = finished(model, config, report)
    return step_of(model, config, build_optimizer(model, config.optimizer), report)


def transformers_step(report: Report, config: Config) -> Work:
    """Transformers' Mixtral in bfloat16, master weights too, with its load balancing loss, clipping and AdamW."""
    import transformers

    with torch.device(report.device):
        model: Any = transformers.MixtralForCausalLM(mixtral_config(config.model, config.training.seq_len, 1e-2))
    model.to(torch.bfloat16).train()
    if config.compile.enable:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    inputs = random_inputs(config.model.vocab_size, config.training.batch_size, config.training.seq_len)
    tokens = inputs.tokens.to(report.device)

    def work() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return work


def peers(report: Report) -> None:
    """Each library's step, one after the other; ours has lb, z, sp and cp."""
    report.line(
        f"{peers.__doc__} TorchTitan: our model with its MoE layers. Transformers: its Mixtral, all in bfloat16."
    )
    report.table(*COLUMNS)
    others = {"TorchTitan": ("torchtitan", torchtitan_step), "Transformers": ("transformers", transformers_step)}
    best: dict[str, float] = {}
    for mode, more in modes(report).items():
        config = configuration(report, "medium", more)
        for label in ("ours", *others):
            if label != "ours" and missing(others[label][0]):
                report.row(mode, label, "not installed")
                continue
            if not report.enough(20, mode, label):
                continue
            with report.trial(f"{label}, {mode}"):
                work = steps_of(report, {"": more})[""] if label == "ours" else others[label][1](report, config)
                ms = median_time(work, report.device, 0.1 if report.toy else 4)
                row(report, mode, label, config, ms, peak_gib(work, report.device))
                best[label] = min(ms, best.get(label, ms))
                del work
                for other in others:  # as soon as both are known, since the stage may be stopped
                    if "ours" in best and other in best:
                        report.fact(f"step/{other}", best[other] / best["ours"])
            if report.on_card:
                torch.cuda.empty_cache()


def profile(report: Report) -> None:
    """One step with sp and cp: the 40 kernels (on a CPU, operations) that take most time."""
    report.line(str(profile.__doc__))
    for mode, more in modes(report).items():
        report.table(f"kernel, {mode}", "calls", "ms", "share")
        if report.enough(20, mode):
            with report.trial(mode):
                dearest(report, steps_of(report, {"": more})[""])


def dearest(report: Report, work: Work) -> None:
    for _ in range(2):
        work()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if report.on_card:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        work()
        if report.on_card:
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if report.on_card else "self_cpu_time_total"
    events = list(recorded.key_averages())
    if report.on_card:  # an operation repeats the time of the kernels that it starts
        events = [event for event in events if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events)
    for event in events[:40]:
        time = getattr(event, attribute)
        report.row(f"`{event.key[:90]}`", event.count, f"{time / 1e3:.3f}", f"{time / total:.3f}")
    report.row(f"all {len(events)}", sum(event.count for event in events), f"{total / 1e3:.3f}", "1")
