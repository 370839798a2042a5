"""What a step reports: packed into one tensor on its device, checked before the update, read in one transfer."""

import logging
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from titan_moe.errors import NonFiniteError
from titan_moe.model.transformer import Transformer
from titan_moe.runtime.stopping import STOPPING, Stopping
from titan_moe.train.watch import Spikes
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.metrics import dead_fraction, max_vio

log = logging.getLogger("titan_moe")


class HostFacts(NamedTuple):
    """What the host knows of a step without reading the device."""

    step: int
    lr: float
    data_crc: int | None
    """None on all ranks but the first."""
    memory_gib: float
    skipped: int


def pack(numbers: Tensor, norm: Tensor, norms: Tensor, counts: Tensor) -> Tensor:
    """One float64 vector of it all; float32 and counts stay exact.

    numbers: (4 + 2 + N + 3L,) stop votes, loss, cross-entropy, N terms and the measures of L layers, summed over ranks.
    norm: (), of the gradient. norms: (P,), of this rank's part of each parameter's gradient. counts: (L, E) assignments.
    """
    return torch.cat([x.reshape(-1).to(torch.float64) for x in (numbers, norm, norms, counts)])


class StepLog:
    """Lets an update happen only if the step's numbers are finite, and gives the rows of several steps in one transfer.

    Immediate, as on a CPU: the numbers are read before each update. Deferred, as on a GPU, where a read makes the host wait:
    a non-finite number sets `found_inf`, from which on a fused optimizer changes neither parameters nor state (what
    torch.amp.GradScaler relies on), and `read` raises.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        stopping: Stopping,
        spikes: Spikes | None = None,
        deferred: bool | None = None,
    ) -> None:
        """deferred: None for what fits the device. An optimizer without `found_inf`, and `spikes`, need the immediate read."""
        self.stopping, self.spikes = stopping, spikes or Spikes(0.0)
        if deferred is None:
            takes_flag = getattr(optimizer, "_step_supports_amp_scaling", False)
            deferred = stopping.device.type == "cuda" and takes_flag and not self.spikes.deviations
        self.deferred, self.found_inf = deferred, torch.zeros((), device=stopping.device)
        if deferred:
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined] # as GradScaler sets it
        self.terms, self.dtype = model.terms, accumulation_dtype(model.dtype)
        self.parameters = [name for name, _ in model.named_parameters()]
        self.shape = (model.moe_layers, model.settings.moe.experts)
        sums = model.moe_layers * len(self.terms.measures)
        self.sizes = [len(STOPPING), 2, len(self.terms.names), sums, 1, len(self.parameters), math.prod(self.shape)]
        self.norm_at = sum(self.sizes[:4])  # what stands up to here is the same on all ranks, and has to be finite
        self.latest = torch.empty(0)
        self.pending: list[tuple[HostFacts, Tensor]] = []
        self.began = 0.0

    def begin(self) -> None:
        """Starts the clock of a step; steps that are read together share one."""
        if not self.pending:
            self.began = time.perf_counter()

    def allow(self, step: int, packed: Tensor) -> bool:
        """Whether the update may happen. Raises NonFiniteError, if immediate, for a number that is not finite."""
        self.latest = packed if self.deferred else packed.cpu()
        if self.deferred:
            self.found_inf.logical_or_(packed[: self.norm_at + 1].isfinite().all().logical_not_())
            return True
        return not self.check(step, self.latest)

    def add(self, facts: HostFacts) -> None:
        """Keeps the step that was admitted last for `read`."""
        self.pending.append((facts, self.latest))

    def read(self) -> Iterator[tuple[HostFacts, Tensor, float]]:
        """Every step since the last call, its packed numbers on the CPU, and its seconds; counts their stop votes.

        Raises NonFiniteError for a number that is not finite, after the steps before it."""
        pending, self.pending = self.pending, []
        numbers = [packed for _, packed in pending]
        values = torch.stack(numbers).cpu() if pending and self.deferred else numbers
        seconds = (time.perf_counter() - self.began) / max(1, len(pending))
        for (facts, _), one in zip(pending, values, strict=True):
            if self.deferred:
                self.check(facts.step, one)
            self.stopping.count(one[: len(STOPPING)].tolist())
            yield facts, one, seconds

    def check(self, step: int, values: Tensor) -> bool:
        """Whether the gradient norm is a spike. Raises NonFiniteError that names the first number that is not finite."""
        *numbers, norm = values[: self.norm_at + 1].tolist()
        if not all(map(math.isfinite, (*numbers, norm))):
            name = self.first_non_finite(values)
            raise NonFiniteError(f"step {step}: {name} is not finite; nothing was updated", state=step - 1)
        spike = self.spikes.over(norm)
        if spike:
            log.warning(f"step {step}: gradient norm {norm:.4g} is a spike; the update was left out")
        elif self.spikes.new_level:
            log.warning(
                f"step {step}: gradient norm {norm:.4g} after {self.spikes.MOST_IN_A_ROW} updates left out in a row: taken for "
                "the new level, updates go on; a smaller optimizer.lr or training.max_grad_norm may help"
            )
        return spike

    def first_non_finite(self, values: Tensor) -> str:
        row, _ = self.unpack(values)
        row = {name: row[name] for name in row if name not in ("loss", "grad_norm")} | row  # their causes come first
        name = next(name for name, value in row.items() if not math.isfinite(value))
        if name != "grad_norm":
            return name
        norms = zip(self.parameters, values.split(self.sizes)[5].tolist(), strict=True)
        other = "a parameter on another rank, or their norms together overflow"
        return f"{name} (gradient of {next((one for one, norm in norms if not math.isfinite(norm)), other)})"

    def unpack(self, values: Tensor) -> tuple[dict[str, float], Tensor]:
        """The fields of a row that come from the device, and the assignments (L, E). values: a packed step on the CPU."""
        _, objective, terms, sums, norm, _, flat = values.split(self.sizes)
        counts = flat.view(self.shape)
        row = dict(zip(("loss", "ce"), objective.tolist(), strict=True))
        row |= {f"reg/{name}": value for name, value in zip(self.terms.names, terms.tolist(), strict=True)}
        if self.shape[0]:
            row["moe/max_vio"] = max_vio(counts).mean().item()
            row["moe/dead"] = dead_fraction(counts).mean().item()
            means = sums.to(self.dtype).view(self.shape[0], -1).mean(0).tolist()
            row |= {f"moe/{name}": mean for name, mean in zip(self.terms.measures, means, strict=True)}
        return row | {"grad_norm": norm.item()}, counts
