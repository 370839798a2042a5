"""What may differ between a checkpoint's configuration and the one that goes on from it, and what each change does."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from titan_moe.checkpoint.state import State, dump
from titan_moe.config.degrees import Degrees, micro_batch_size
from titan_moe.config.tables import Config
from titan_moe.errors import UserError
from titan_moe.optim import lr_fraction

# Keys that may change when a run resumes. A change of any other key is refused (docs/checkpoints.md). Text is compared by its
# fingerprint, whatever the keys of [data] say.
MAY_CHANGE = (
    "job.name",
    "job.output_dir",
    "data",
    "tokenizer.path",
    "training.steps",
    "training.microbatch_size",
    "training.max_grad_norm",
    "training.skip_spikes",
    "training.deterministic",
    "training.gc_freq",
    "optimizer.lr",
    "optimizer.weight_decay",
    "lr_scheduler",
    "parallelism",
    "compile",
    "activation_checkpoint",
    "checkpoint",
    "validation",
    "eval",
    "metrics",
    "profiling",
    "extensions",
)
# Of these, the ones whose change alters the numbers of the steps to come. `changes` explains [lr_scheduler] and the like.
SAID = ("training.max_grad_norm", "training.skip_spikes", "training.deterministic", "optimizer.weight_decay")
LR_TOLERANCE = 1e-6  # relative; below it the learning rate counts as unchanged


class Resumed(NamedTuple):
    """A checkpoint's configuration with defaults for keys that it lacks, and the one that goes on."""

    saved: dict[str, Any]
    current: dict[str, Any]

    def changed(self) -> list[str]:
        return changed_keys(self.saved, self.current)


def changed_keys(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    keys = []
    for key in sorted({*saved, *current}):
        name = f"{prefix}{key}"
        a, b = saved.get(key), current.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += changed_keys(a, b, f"{name}.")
        elif a != b:
            keys.append(name)
    return keys


def check_unchanged(saved: dict[str, Any], config: Config, checkpoint: object) -> Resumed:
    """Compares both configurations. Raises UserError when a key that may not change on resuming has changed.

    saved: as an earlier version may have written it; keys that it lacks have their defaults. checkpoint: named in the error.
    """
    with contextlib.suppress(ValidationError):  # then the comparison names what differs
        saved = dump(type(config).model_validate(saved))
    both = Resumed(saved, dump(config))
    chosen = config.optimizer.name
    tables = (both.saved.get("optimizer", {}), both.current["optimizer"])
    options = {name for table in tables for name, value in table.items() if isinstance(value, dict)}
    free_keys = [*MAY_CHANGE, f"optimizer.{chosen}.lr", *(f"optimizer.{name}" for name in options - {chosen})]
    for key in both.changed():
        if not within(key, free_keys):
            raise UserError(
                f"{key}: is {value_at(both.current, key)!r}, but {checkpoint} was made with {value_at(both.saved, key)!r}; "
                "set it back, or choose another --job.name (and checkpoint.load_path to start from these weights)"
            )
    return both


def within(key: str, tables: Sequence[str]) -> bool:
    """Whether a dotted key is one of these, or inside one that is a table."""
    return any(key == table or key.startswith(f"{table}.") for table in tables)


def value_at(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None when there is none."""
    node: Any = values
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def tokens_of_microbatch(config: Config, degrees: Degrees) -> int:
    """Tokens of all ranks in a microbatch, over which terms with scope "global" are formed."""
    return micro_batch_size(config, degrees) * degrees.data * config.training.seq_len


def consequences(both: Resumed, state: State, config: Config, degrees: Degrees, modules: dict[str, str]) -> list[str]:
    """What the changed keys do to the run, a line each. modules: digests of `extensions.modules` now."""
    lines = [
        f"{key}: {value_at(both.saved, key)!r} -> {value_at(both.current, key)!r}"
        for key in both.changed()
        if within(key, SAID)
    ]
    try:
        saved = type(config).model_validate(both.saved)
    except ValidationError:  # of a version with other keys; check_unchanged has compared what both have
        saved = config
    lines += learning_rate(saved, config, state.step)
    lines += microbatches(saved, config, degrees, state.step_tokens)
    for name, digest in modules.items():
        if state.modules.get(name, digest) != digest:
            lines.append(
                f"extensions.modules: {name} is not the file that the run was made with: what it registers may differ"
            )
    return lines


def rate_at(config: Config, step: int) -> float:
    """The learning rate of a step; after the last step, that of the last."""
    steps = config.training.steps
    return lr_fraction(min(step, steps), steps, config.lr_scheduler) * config.optimizer.lr


def learning_rate(saved: Config, config: Config, step: int) -> list[str]:
    """The learning rate of the next step, if the changed configuration changes it."""
    planned, now = rate_at(saved, step + 1), rate_at(config, step + 1)
    if abs(now - planned) <= LR_TOLERANCE * abs(planned):
        return []
    before, after = dump(saved), dump(config)
    keys = [
        f"{key} {value_at(before, key)!r} -> {value_at(after, key)!r}"
        for key in changed_keys(before, after)
        if within(key, ("training.steps", "lr_scheduler", "optimizer.lr"))
    ]
    return [f"the learning rate of step {step + 1} is {now:.3g}, not {planned:.3g} as planned ({', '.join(keys)})"]


def microbatches(saved: Config, config: Config, degrees: Degrees, before: int) -> list[str]:
    """Terms over the tokens of a microbatch, if its size changes. before: tokens of one; 0: unknown."""
    if not before and saved.parallelism == config.parallelism:
        before = tokens_of_microbatch(saved, degrees)
    now = tokens_of_microbatch(config, degrees)
    if before in (0, now):
        return []
    options = config.regularizers.options().items()
    names = [name for name, table in options if table.weight > 0 and getattr(table, "scope", "sequence") != "sequence"]
    if not names:
        return []
    return [
        f"regularizers.{', regularizers.'.join(names)}: formed over {now:,} tokens (a microbatch), before over {before:,}; "
        "their values and gradients change (training.microbatch_size, parallelism)"
    ]
