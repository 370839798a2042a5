"""The terms inside the trainers of Transformers and TRL, against their definition and against each other."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

import peft
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tests.helpers.tiny_models import CHATS, PAIRS, expected_terms, model, tokenizer
from titan_moe.finetune.model import lora_config
from titan_moe.finetune.tables import Lora
from torchtitan_ext.adapters.trainer import Regularized, TermsCallback
from torchtitan_ext.adapters.transformers import attach
from torchtitan_ext.adapters.trl import RegularizedSFTTrainer

WEIGHTS = {"sp": 0.5, "cp": 0.25, "z": 0.01}
MODES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "chat": (CHATS, {"assistant_only_loss": True}),
    "chat, packed": (CHATS, {"assistant_only_loss": True, "packing": True}),
    "pairs": (PAIRS, {}),
    "pairs, packed": (PAIRS, {"packing": True}),
    "pairs, cut anywhere": (PAIRS, {"packing": True, "packing_strategy": "wrapped"}),
}
COMMON = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def arguments(folder: Path, **options: Any) -> SFTConfig:
    return SFTConfig(
        str(folder),
        max_length=32,
        max_steps=6,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        router_aux_loss_coef=0.0,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **COMMON,
        **options,
    )


class Recorded:
    """Makes a trainer keep the micro-batches that it was trained on."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        self.batches = [*getattr(self, "batches", []), copy.deepcopy(self.recorded(inputs))]
        return super().compute_loss(model, inputs, *rest, **options)  # type: ignore[misc] # of the trainer

    def recorded(self, inputs: Any) -> dict[str, Any]:
        return dict(inputs)


class Recording(Recorded, RegularizedSFTTrainer):
    pass


def adapters(network: Any, rank: int = 4) -> Any:
    return lora_config(network, Lora(rank=rank, alpha=8.0))


def rows_of(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def slow_unless_first(mode: str, lora: bool) -> Any:
    everyday = (mode, lora) in (("chat, packed", True), ("pairs", False))
    return pytest.param(
        mode, lora, id=f"{mode}-{'lora' if lora else 'full'}", marks=[] if everyday else [pytest.mark.slow]
    )


@pytest.mark.parametrize(("mode", "lora"), [slow_unless_first(mode, lora) for mode in MODES for lora in (False, True)])
def test_sft_trains_on_the_terms_of_their_definition(mode: str, lora: bool, tmp_path: Path) -> None:
    """The first step's terms are those of the definition on the same micro-batches; the loss is the sum, and falls."""
    rows, options = MODES[mode]
    start = model()
    trained = copy.deepcopy(start)
    peft_config = adapters(trained) if lora else None
    trainer = Recording(
        trained,
        arguments(tmp_path, **options),
        regularizers=WEIGHTS,
        train_dataset=Dataset.from_list(rows * 6),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    history = rows_of(trainer)
    expected = expected_terms(start, trainer.batches[:2])
    for name in WEIGHTS:
        assert history[0][f"reg/{name}"] == pytest.approx(expected[name], rel=2e-6), name
    penalty = sum(WEIGHTS[name] * expected[name] for name in WEIGHTS)
    # Losses of about 6 in float32: a unit in the last place is 5e-7.
    assert history[0]["loss"] - history[0]["ce"] == pytest.approx(penalty, abs=1.5e-6)
    assert history[-1]["ce"] < history[0]["ce"] - (0.2 if lora else 0.5)
    if lora:
        check_adapters(trainer.model, start, tmp_path)


@torch.no_grad()
def check_adapters(trained: Any, start: Any, folder: Path) -> None:
    """Adapters are saved and loaded to the bit, and merged within rounding; the merged model is saved to the bit."""
    ids = torch.arange(20, 44).view(2, 12)
    trained.eval()
    logits = trained(input_ids=ids).logits
    trained.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(start), str(folder / "adapter")).eval()
    plain = again(input_ids=ids).logits
    torch.testing.assert_close(plain, logits, rtol=0, atol=0)
    merged = again.merge_and_unload()
    # W + BA in one product instead of two, in float32: rounding only. Logits are about 1.
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=0, atol=2e-5)
    merged.save_pretrained(folder / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    stored = loaded.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in merged.state_dict().items())


def language_rows() -> Dataset:
    """Tokenised prompts with completions, the prompts without labels, for `Trainer`."""
    rows = []
    for pair in PAIRS * 3:
        prompt, completion = (tokenizer()(pair[key])["input_ids"] for key in ("prompt", "completion"))
        ids = [*prompt, *completion]
        rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    length = max(len(row["input_ids"]) for row in rows)
    for row in rows:
        missing = length - len(row["input_ids"])
        row["attention_mask"] = [1] * len(row["input_ids"]) + [0] * missing
        row["input_ids"] += [0] * missing
        row["labels"] += [-100] * missing
    return Dataset.from_list(rows)


class RecordingTrainer(Recorded, Trainer):
    pass


def test_trainer_needs_only_the_callback(tmp_path: Path) -> None:
    """`Trainer` uses the model's own loss. Its logs have the terms of the definition over both micro-batches of a step."""
    start, network = model(), model()
    attached = attach(network, WEIGHTS)
    options = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, **COMMON
    )
    trainer = RecordingTrainer(network, options, train_dataset=language_rows(), callbacks=[TermsCallback(attached)])
    trainer.train()
    expected = expected_terms(start, trainer.batches[:2])
    first = rows_of(trainer)[0]
    for name in WEIGHTS:
        assert first[f"reg/{name}"] == pytest.approx(expected[name], rel=2e-6), name
    without = RecordingTrainer(model(), options, train_dataset=language_rows())
    without.train()
    penalty = sum(WEIGHTS[name] * expected[name] for name in WEIGHTS)
    assert first["loss"] - rows_of(without)[0]["loss"] == pytest.approx(penalty, abs=1.5e-6)


def test_weights_warm_up_by_the_trainers_step(tmp_path: Path) -> None:
    """With `warmup_steps = 4` the weight is 1/4 in the first step, 2/4 in the second, also after a resumption."""
    options = arguments(tmp_path)
    options.learning_rate, options.save_strategy, options.save_steps, options.max_steps = 0.0, "steps", 3, 6
    spec = {"sp": {"weight": 0.5, "warmup_steps": 4}}
    histories = []
    for resume in (False, True):
        trainer = Recording(
            model(),
            options,
            regularizers=spec,
            train_dataset=Dataset.from_list(PAIRS * 6),
            processing_class=tokenizer(),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        histories.append(rows_of(trainer))
    rows = [*histories[0], *histories[1][3:]]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    for row in rows:
        share = min(row["step"] / 4, 1.0)
        assert row["loss"] - row["ce"] == pytest.approx(0.5 * share * row["reg/sp"], abs=1.5e-6), row["step"]


def test_sft_without_the_subclass_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SFTTrainer never reads the model's loss: its own loss is the same with and without the terms, and a line says so."""
    losses = []
    for weights in (WEIGHTS, None):
        network = model()
        callbacks = [TermsCallback(attach(network, weights))] if weights else []
        options = arguments(tmp_path)
        options.max_steps = 1
        rows = Dataset.from_list(PAIRS)
        trainer = SFTTrainer(network, options, train_dataset=rows, processing_class=tokenizer(), callbacks=callbacks)
        with caplog.at_level(logging.WARNING, logger="torchtitan_ext"):
            trainer.train()
        losses.append(rows_of(trainer)[0]["loss"])
    assert losses[0] == losses[1]
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "the attached terms have no effect" in caplog.records[0].message


def test_a_loss_function_of_the_users_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_loss_func"), pytest.warns(FutureWarning):
        RegularizedSFTTrainer(
            model(),
            arguments(tmp_path),
            regularizers=WEIGHTS,
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer(),
            compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.loss,  # noqa: ARG005
        )


class RegularizedDPO(Recorded, Regularized, DPOTrainer):
    def recorded(self, inputs: Any) -> dict[str, Any]:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_with_the_mixin(lora: bool, tmp_path: Path) -> None:
    """The loss of DPO plus the terms on the completions' tokens. The reference model's forward passes add nothing."""
    start = model()
    pairs = [
        {"prompt": one["prompt"].strip(), "chosen": " " + one["completion"], "rejected": " no idea"} for one in PAIRS
    ]
    options = DPOConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_length=64,
        router_aux_loss_coef=0.0,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **COMMON,
    )
    network = copy.deepcopy(start)
    trainer = RegularizedDPO(
        network,
        None if lora else copy.deepcopy(start),
        options,
        regularizers=WEIGHTS,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        peft_config=adapters(network) if lora else None,
    )
    trainer.train()
    first = rows_of(trainer)[0]
    # DPO's loss is a mean over micro-batches, and so are the terms: each of the two is a batch of its own.
    parts = [expected_terms(start, [batch]) for batch in trainer.batches[:2]]
    penalty = sum(WEIGHTS[name] * (parts[0][name] + parts[1][name]) / 2 for name in WEIGHTS)
    assert first["loss_without_terms"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)  # equal models
    assert first["loss"] - first["loss_without_terms"] == pytest.approx(penalty, abs=1e-6)
