"""Rows of measures from what lm-evaluation-harness returns: task, measure, value, standard error, chance level, documents."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from titan_moe.analysis.evaluate.code import judged
from titan_moe.analysis.evaluate.tasks import PREFIX, Task

Row = dict[str, Any]


def measures(found: dict[str, Any], tasks: Sequence[Task]) -> list[Row]:
    """The rows of tasks, or of a group and its tasks, from a result of the harness. Runs code for tasks of kind "code"."""
    known = {task.harness: task for task in tasks}
    rows: list[Row] = []
    for name, values in found["results"].items():
        task = known.get(name)
        samples = samples_of(found, name)
        if task is not None and task.kind == "reference":
            numbers = [reference_bits_per_byte(sample) for sample in samples]
            rows.append(row(task.name, "bits_per_byte", *mean_and_error(numbers), len(numbers)))
        elif task is not None and task.kind == "code":
            numbers = [float(one) for one in judged(task.name, samples)]
            rows.append(row(task.name, "pass@1", *mean_and_error(numbers), len(numbers)))
        else:
            count = found["n-samples"].get(name, {}).get("effective", values.get("sample_len")) or None
            rows += harness_rows(name.removeprefix(PREFIX) if task is None else task.name, values, count, samples)
    return rows


def harness_rows(
    name: str, values: dict[str, Any], count: int | None, samples: Sequence[dict[str, Any]]
) -> Iterator[Row]:
    """The rows of what the harness has measured, and the bits per byte of right choices."""
    for key, value in values.items():
        measure, _, rule = key.partition(",")
        if not rule or measure.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = measure if rule == "none" else f"{measure} ({rule})"
        error = values.get(f"{measure}_stderr,{rule}")
        error = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
        chance = chance_level(samples) if measure.startswith("acc") else None
        yield row(name, label, float(value), error, count, chance)
    bits = [bits for sample in samples if (bits := gold_bits_per_byte(sample)) is not None]
    if bits and has_one_answer(samples):
        yield row(name, "bits_per_byte", *mean_and_error(bits), len(bits))


def row(
    task: str,
    measure: str,
    value: float,
    error: float | None,
    documents: int | None,
    chance: float | None = None,
) -> Row:
    return {
        "task": task,
        "measure": measure,
        "value": value,
        "standard_error": error,
        "chance": chance,
        "documents": documents,
    }


def together(rows: Sequence[Row], name: str) -> list[Row]:
    """The means over all documents of tasks that are parts of one, such as the subjects of MMLU, as rows of `name`.

    The standard error is that of a sum of independent means."""
    result = []
    for measure in dict.fromkeys(row["measure"] for row in rows):
        parts = [row for row in rows if row["measure"] == measure]
        counts = [row["documents"] for row in parts]
        total = sum(counts)
        errors = [row["standard_error"] for row in parts]
        sums = None if None in errors else [n * error for n, error in zip(counts, errors, strict=True)]
        error = None if sums is None else math.hypot(*sums) / total
        chances = [row["chance"] for row in parts]
        chance = None if None in chances else sum(n * c for n, c in zip(counts, chances, strict=True)) / total
        value = sum(n * row["value"] for n, row in zip(counts, parts, strict=True)) / total
        result.append(row(name, measure, value, error, total, chance))
    return result


def samples_of(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The documents of a task, or of all tasks of a group."""
    names = found.get("group_subtasks", {}).get(name) or [name]
    if names == [name]:
        return list(found["samples"].get(name, []))
    return [sample for part in names for sample in samples_of(found, part)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def has_one_answer(samples: Sequence[dict[str, Any]]) -> bool:
    """Whether each document has one right choice. TruthfulQA's `mc2` has several."""
    return not any("mc2_targets" in sample["doc"] for sample in samples)


def chance_level(samples: Sequence[dict[str, Any]]) -> float | None:
    """The accuracy of choosing at random: the mean of one over the number of choices. None for what is no such task."""
    if not samples or not has_one_answer(samples) or any(gold_choice(sample) is None for sample in samples):
        return None
    return statistics.fmean(1.0 / len(sample["filtered_resps"]) for sample in samples)


def gold_choice(sample: dict[str, Any]) -> int | None:
    """The number of a document's right choice; None for a task without choices."""
    gold, scores = sample["target"], sample["filtered_resps"]
    if isinstance(gold, str) and gold.isdigit():
        gold = int(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(scores) or not isinstance(scores[gold], list | tuple):
        return None
    return gold


def gold_bits_per_byte(sample: dict[str, Any]) -> float | None:
    """-log2 of the right answer's probability over its UTF-8 bytes; None for a task without one right choice."""
    gold = gold_choice(sample)
    if gold is None:
        return None
    return bits_per_byte(sample["filtered_resps"][gold][0], *arguments(sample)[gold])


def reference_bits_per_byte(sample: dict[str, Any]) -> float:
    """The same of the one text that a document has."""
    return bits_per_byte(sample["filtered_resps"][0][0], *arguments(sample)[0])


def bits_per_byte(log_likelihood: Any, context: str, continuation: str) -> float:
    """-log2 of a continuation's probability over its UTF-8 bytes. The harness counts blanks and line ends at the end of a
    context as part of the continuation."""
    scored = context[len(context.rstrip()) :] + continuation
    return -float(log_likelihood) / math.log(2) / max(len(scored.encode("utf-8")), 1)


def arguments(sample: dict[str, Any]) -> list[Any]:
    """The (context, continuation) of each request of a document."""
    given = sample["arguments"]
    values = given.values() if isinstance(given, dict) else given
    return [[*one.values()] if isinstance(one, dict) else one for one in values]


def scored_documents(found: dict[str, Any]) -> list[Row]:
    """A row per document: its answers' log-likelihoods, or the generated text."""
    return [
        {"task": name.removeprefix(PREFIX), "document": sample["doc_id"], "responses": sample["filtered_resps"]}
        for name, samples in found["samples"].items()
        for sample in samples
    ]
