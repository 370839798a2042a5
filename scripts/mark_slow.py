"""Lists in tests/slow.txt the tests that take longer than 1.2 s; tests/conftest.py marks them `slow`. And in tests/seconds.txt
the files that take longer than 5 s; tests/conftest.py starts with the longest, so that all workers end at the same time.

    ./scripts/test.sh --durations=0 --durations-min=1 | tee times.txt
    python scripts/mark_slow.py times.txt

Marks in test files stay. One test of each area is left out of the list whatever it takes, so that the everyday part still
trains, resumes, stops, and computes on several ranks. Tests that the file does not time keep their line, and so do files of
which it times no test. Both lists are right only if the times are those of whole files.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "slow.txt"
FILES = ROOT / "tests" / "seconds.txt"
SECONDS = 1.2
FILE_SECONDS = 5
EVERYDAY = (
    "tests/adapters/test_torchtitan.py::test_terms_and_gradients_equal_those_computed_token_by_token[qwen3]",
    "tests/adapters/test_trainers.py::test_weights_warm_up_by_the_trainers_step",
    "tests/analysis/test_inspection.py::test_measures_from_accumulated_sums_equal_those_computed_on_all_tokens_at_once",
    "tests/analysis/test_report.py::test_a_run_without_inspections_gets_a_page_that_names_the_command",
    "tests/checkpoint/test_changes.py::test_weights_are_never_read_under_another_tokenizers_ids[load_path]",
    "tests/checkpoint/test_health.py::test_a_run_goes_back_one_checkpoint_and_no_further",
    "tests/data/test_streams.py::test_a_writer_ends_with_its_parent",
    "tests/distributed/test_layouts.py::test_deepseek_style[dp2]",
    "tests/distributed/test_layouts.py::test_deepseek_style[ep2tp2]",
    "tests/distributed/test_totals.py::test_one_all_reduce_per_microbatch[cp-ep2]",
    "tests/distributed/test_pipeline.py::test_tied_embeddings[tp2]",
    "tests/distributed/test_stopping.py::test_all_ranks_stop_for_a_signal_to_one[ep2]",
    "tests/evaluate/test_eval.py::test_log_likelihoods_are_those_of_the_harness_on_an_equal_model",
    "tests/generate/test_ranks.py::"
    "test_texts_and_log_probabilities_are_those_of_one_process[deepseek-float64-1e-09---parallelism.tp=2]",
    "tests/kernels/test_model.py::test_training_through_the_kernels_equals_training_without[exact]",
    "tests/optim/test_registry.py::test_muon_resumes_bitwise[false]",
    "tests/test_cli.py::test_a_signal_saves_and_the_same_command_continues[2-130]",
    "tests/test_few_packages.py::test_training_without_the_packages_of_other_verbs[False]",
    "tests/train/test_training.py::test_resumed_after_any_step_it_is_bitwise_the_same[]",
)
WHOLE_FILES = ("tests/test_docs.py", "tests/test_structure.py")  # their tests stay in the everyday part


def main() -> None:
    seconds: defaultdict[str, float] = defaultdict(float)
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        timed = re.fullmatch(r" *([\d.]+)s (?:call|setup|teardown) +(tests/.*?)\s*", line)
        if timed:
            seconds[timed.group(2)] += float(timed.group(1))
    known = LIST.read_text(encoding="utf-8").splitlines() if LIST.exists() else []
    slow = {name for name in known if name not in seconds} | {name for name, time in seconds.items() if time >= SECONDS}
    slow = {name for name in slow if name not in EVERYDAY and not name.startswith(WHOLE_FILES)}
    LIST.write_text("".join(f"{name}\n" for name in sorted(slow)), encoding="utf-8")
    print(f"{len(slow)} tests in {LIST.relative_to(ROOT)}")

    files = {name: int(time) for time, name in map(str.split, FILES.read_text(encoding="utf-8").splitlines())}
    timed_files = {name.partition("::")[0] for name in seconds}
    files |= {
        file: round(sum(t for name, t in seconds.items() if name.startswith(f"{file}::"))) for file in timed_files
    }
    longest = sorted((-time, name) for name, time in files.items() if time >= FILE_SECONDS)
    FILES.write_text("".join(f"{-time} {name}\n" for time, name in longest), encoding="utf-8")
    print(f"{len(longest)} files in {FILES.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
