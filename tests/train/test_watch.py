"""Spikes, dead experts, collapsed routing."""

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch

from tests.helpers.runs import Make, rows, saved_tensors, train, untimed
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.train import trainer
from titan_moe.train.watch import RoutingWatch, Spikes


def test_a_spike_is_left_out_of_the_history() -> None:
    spikes = Spikes(4.0)
    norms = [1.0 + 0.01 * (n % 3) for n in range(40)]
    assert not any(spikes.over(norm) for norm in norms)
    assert spikes.over(2.0)
    assert list(spikes.norms) == norms
    assert not spikes.over(1.02)


def test_a_norm_that_stays_high_is_the_new_level() -> None:
    """At most MOST_IN_A_ROW updates in a row are left out; then the history begins again."""
    spikes = Spikes(6.0, [1.0 + 0.01 * (n % 3) for n in range(200)])
    high = [spikes.over(100.0 + n % 3) for n in range(300)]
    assert high == [True] * Spikes.MOST_IN_A_ROW + [False] * (300 - Spikes.MOST_IN_A_ROW)
    assert min(spikes.norms) == 100.0
    assert spikes.over(1000.0)  # still finds spikes


def test_spikes_with_ordinary_norms_between_them_are_all_left_out() -> None:
    spikes = Spikes(6.0, [1.0 + 0.01 * (n % 3) for n in range(200)])
    assert [spikes.over(norm) for norm in [9.0, 9.0, 1.0] * 20] == [True, True, False] * 20


def test_without_a_policy_nothing_is_a_spike() -> None:
    spikes = Spikes(0.0)
    assert not any(spikes.over(norm) for norm in [1.0] * 40 + [1e9])
    assert len(spikes.norms) == 41


def test_too_short_a_history_decides_nothing() -> None:
    spikes = Spikes(1.0)
    assert not any(spikes.over(norm) for norm in (1.0, 1.0, 100.0))


def test_a_skipped_step_updates_nothing_and_is_counted(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 4 is declared a spike; the runs resumed from steps 4 and 5 know of it."""

    class Declared(Spikes):
        asked = 0
        rows: ClassVar[list[int]] = []

        def __init__(self, deviations: float, norms: Sequence[float] = (), in_a_row: int = 0) -> None:
            super().__init__(deviations, norms, in_a_row)
            Declared.rows.append(in_a_row)

        def over(self, norm: float) -> bool:
            Declared.asked += 1
            if Declared.asked != 4:
                return super().over(norm)
            self.in_a_row += 1
            return True

    monkeypatch.setattr(trainer, "Spikes", Declared)
    words = [
        "--training.skip_spikes=6",
        "--lr_scheduler.decay=none",
        "--checkpoint.interval=1",
        "--validation.interval=0",
    ]
    train(tiny_config(*words, "--training.steps=4"))
    first = tiny_config(*words, "--training.steps=5")
    found = [row for row in train(first) if row["kind"] == "train"]
    assert [row["skipped"] for row in found] == [0, 0, 0, 1, 1]
    states = [json.loads((RunDir(first).checkpoint(n) / "state.json").read_text()) for n in (3, 4)]
    assert states[0]["norms"] == states[1]["norms"]
    assert [state["spikes_in_a_row"] for state in states] == [0, 1]
    assert Declared.rows == [0, 0, 1]  # a first trainer, and a second one before and after it resumed
    before, after = (load(first, n) for n in (3, 4))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(tiny_config(*words, "--training.steps=6"))
    assert rows(RunDir(first))[-2]["skipped"] == 1
    plain = untimed(train(tiny_config(*words[1:], "--job.name=plain", "--training.steps=4")))
    assert plain[4]["loss"] == found[3]["loss"]  # computed like any other


def load(config: Any, step: int) -> dict[str, torch.Tensor]:
    return saved_tensors(RunDir(config).checkpoint(step))


def counts(*layers: list[int]) -> torch.Tensor:
    return torch.tensor(layers)


def test_a_dead_expert_is_named_once() -> None:
    watch = RoutingWatch(2, 4, 2)
    dead, alive = counts([5, 5, 5, 5], [10, 0, 5, 5]), counts([5, 5, 5, 5], [5, 5, 5, 5])
    said = [list(watch.look(dead)) for _ in range(120)]
    assert sum(map(len, said)) == 1
    assert said[RoutingWatch.PATIENCE - 1] == ["MoE layer 1: expert 1 without a token for 50 steps"]
    assert list(watch.look(alive)) == []
    assert sum(len(list(watch.look(dead))) for _ in range(60)) == 1  # another event


def test_a_collapse_is_named_once_until_it_recovers() -> None:
    watch = RoutingWatch(1, 4, 2)
    collapsed, between, even = counts([48, 48, 2, 2]), counts([42, 43, 8, 7]), counts([25, 25, 25, 25])
    said = [line for _ in range(80) for line in watch.look(collapsed)]
    assert said == ["MoE layer 0: routing has collapsed: 2 experts have 96% of the tokens"]
    for step in (between, collapsed):  # not recovered: the same event
        assert not [line for _ in range(80) for line in watch.look(step)]
    list(watch.look(even))
    assert len([line for _ in range(80) for line in watch.look(collapsed)]) == 1


def test_all_experts_chosen_is_no_collapse() -> None:
    watch = RoutingWatch(1, 2, 2)
    assert not [line for _ in range(80) for line in watch.look(counts([5, 5]))]
