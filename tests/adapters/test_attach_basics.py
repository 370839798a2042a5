"""attach() as a user sees it: the loss has the terms, detaching restores the model, what does not fit is refused by name."""

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.moe_families import batch, build
from torchtitan_ext.adapters.transformers import Attached, attach, experts
from torchtitan_ext.terms import Needs, Term, register

pytest.importorskip("transformers", reason="the package transformers (extra hf) is not installed")


def forward(model: Any, **options: Any) -> Any:
    ids, labels = batch()
    return model(**{"input_ids": ids, "labels": labels, "use_cache": False, **options})


def test_the_loss_has_the_weighted_terms_and_metrics_has_their_values() -> None:
    model = build("qwen3_moe")
    plain = forward(model)
    attached = attach(model, {"sp": 0.5, "cp": {"weight": 0.25, "source": "activated"}}, measure=["z"])
    out = forward(model)
    found = attached.metrics(per_layer=True)
    assert torch.equal(out.logits, plain.logits)
    wanted = plain.loss.item() + 0.5 * found["reg/sp"] + 0.25 * found["reg/cp"]
    assert out.loss.item() == pytest.approx(wanted, rel=1e-6)
    assert found["reg/z"] > 0
    assert sum(found[f"layer-{layer}/reg/sp"] for layer in range(3)) == pytest.approx(found["reg/sp"])
    assert found["moe/overlap"] == pytest.approx(found["reg/sp"] / (3 * 3 * 2))


def test_assignments_are_those_of_the_labelled_tokens_of_a_step() -> None:
    """Two forward passes of a step: the experts that the routers chose for tokens whose next token is a label."""
    model = build("qwen3_moe")
    attached = attach(model, {"z": 0.1})
    attached.step = 1
    with pytest.raises(RuntimeError, match="nothing is counted"):
        attached.assignments()
    wanted, found = torch.zeros(3, 8, dtype=torch.int64), []
    hooks = [
        layer.router.register_forward_hook(lambda _module, _inputs, output: found.append(output[-1]))
        for layer in attached.structure.layers
    ]
    for seed in (1, 2):
        ids, labels = batch(seed)
        model(input_ids=ids, labels=labels, use_cache=False)
        counted = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)).flatten()
        wanted += torch.stack([chosen[counted].flatten().bincount(minlength=8) for chosen in found])
        found.clear()
    for hook in hooks:
        hook.remove()
    assert torch.equal(attached.assignments(), wanted)
    assert wanted.sum() > 0
    attached.step = 2
    with pytest.raises(RuntimeError, match="nothing is counted"):
        attached.assignments()


def test_detach_restores_loss_hooks_and_the_implementation() -> None:
    model = build("mixtral", "eager")
    plain = forward(model)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    attached = attach(model, {"sp": 0.5})
    assert forward(model).loss != plain.loss
    attached.detach()
    assert torch.equal(forward(model).loss, plain.loss)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert model.config._experts_implementation == "eager"


def test_a_saved_model_has_nothing_of_ours(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "before")
    attach(model, {"sp": 0.5})
    forward(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("before", "after"))
    assert before == after
    for name in before:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    assert "titan" not in json.dumps(json.loads((tmp_path / "after" / "config.json").read_text()))


def test_penalty_is_what_the_loss_would_get() -> None:
    model = build("qwen3_moe")
    plain = forward(model)
    attached = attach(model, {"sp": 0.5, "v": 0.1})
    added = forward(model).loss - plain.loss
    with pytest.raises(RuntimeError, match="add_to_loss=False"):
        attached.penalty(batch()[1])
    attached.add_to_loss = False
    assert torch.equal(forward(model).loss, plain.loss)
    torch.testing.assert_close(attached.penalty(batch()[1]), added, rtol=0, atol=1e-6)


def test_without_labels_nothing_is_added_and_generation_is_unchanged() -> None:
    model = build("qwen3_moe").eval()
    ids = batch()[0][:, :4]
    options = {"max_new_tokens": 5, "do_sample": False}
    before = model.generate(ids, **options)
    attach(model, {"sp": 0.5})
    assert torch.equal(model.generate(ids, **options), before)
    assert model(input_ids=ids).loss is None


def test_evaluation_without_terms() -> None:
    model = build("qwen3_moe")
    plain = forward(model.eval())
    attached = attach(model, {"sp": 0.5}, evaluation=False)
    with torch.no_grad():
        assert torch.equal(forward(model).loss, plain.loss)
    assert attached.metrics()["reg/sp"] > 0
    assert not torch.equal(forward(model.train()).loss, plain.loss)


def test_an_evaluation_between_micro_batches_is_not_part_of_the_step() -> None:
    model = build("qwen3_moe")
    attached = attach(model, {"sp": 0.5}, add_to_loss=False)
    attached.step = 1
    forward(model)
    with torch.no_grad():
        model(input_ids=batch()[0])  # of a reference, say: leaves the pass before it for `penalty`
    attached.penalty(batch()[1])
    step = attached.metrics()
    model.eval()
    ids, labels = batch(2)
    with torch.no_grad():
        model(input_ids=ids, labels=labels)
        attached.penalty(labels)
    assert attached.metrics()["reg/sp"] != pytest.approx(step["reg/sp"], rel=1e-3)
    model.train()
    forward(model)
    attached.penalty(batch()[1])
    assert attached.metrics() == step


def test_a_deep_copy_is_a_plain_model() -> None:
    model = build("qwen3_moe")
    plain = forward(model)
    attached = attach(model, {"sp": 0.5})
    assert torch.equal(forward(copy.deepcopy(model)).loss, plain.loss)
    assert not torch.equal(forward(model).loss, plain.loss)
    attached.detach()


def test_an_attached_model_can_be_freed() -> None:
    model = build("qwen3_moe")
    attach(model, {"sp": 0.5})
    forward(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_warmup_follows_the_step() -> None:
    model = build("qwen3_moe")
    plain = forward(model).loss.item()
    attached = attach(model, {"sp": {"weight": 0.5, "warmup_steps": 4}})
    with pytest.raises(RuntimeError, match=r"sp has warmup_steps by step: set `attached.step = n`"):
        forward(model)
    for step, factor in ((1, 0.25), (3, 0.75), (9, 1.0)):
        attached.step = step
        added = forward(model).loss.item() - plain
        assert added == pytest.approx(0.5 * factor * attached.metrics()["reg/sp"], abs=1e-6)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "unknown term": ("qwen3_moe", {"spp": 0.1}, {}, "there is no term 'spp'; there are lb, z, sp"),
    "unknown option": ("qwen3_moe", {"sp": {"weigth": 0.1}}, {}, "weigth"),
    "match_lb": ("qwen3_moe", {"o": {"weight": 0.1, "match_lb": True}}, {}, "o.match_lb is for our own trainer"),
    "one expert per token": (
        "qwen3_moe",
        {"sp": 0.1},
        {"num_experts_per_tok": 1},
        "sp compares the experts of a token",
    ),
    "score": ("qwen3_moe", {"sp": 0.1}, {}, "score='linear' is not one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    name, regularizers, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        attach(build(name, **options), regularizers, score="linear" if case == "score" else None)


def test_dense_models_other_implementations_and_a_second_attach_are_refused() -> None:
    import transformers

    config = transformers.AutoConfig.for_model("qwen3", hidden_size=16, num_hidden_layers=1, vocab_size=32)
    with pytest.raises(ValueError, match="qwen3: is no Mixture-of-Experts model"):
        attach(transformers.AutoModelForCausalLM.from_config(config), {"sp": 0.1})
    model = build("qwen3_moe")
    model.config._experts_implementation = "deepgemm"
    with pytest.raises(
        ValueError, match=r"'deepgemm' does not show activations; call model.set_experts_implementation"
    ):
        attach(model, {"sp": 0.1})
    model.set_experts_implementation("grouped_mm")
    attached: Attached = attach(model, {"sp": 0.1})
    with pytest.raises(ValueError, match="attached already; call detach"):
        attach(model, {"cp": 0.1})
    attached.detach()
    attach(model, {"cp": 0.1})


def test_a_wrong_score_function_is_noticed_at_the_first_forward() -> None:
    model = build("qwen3_moe")
    attach(model, {"cp": 0.1}, score="sigmoid")
    with pytest.raises(RuntimeError, match="qwen3_moe: gate weights are not proportional to sigmoid scores"):
        forward(model)


COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "llama4_text": (
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "intermediate_size": 24,
            "num_key_value_heads": 2,
        },
        "llama4_text: 2 routers and 0 modules with the interface for experts functions",
    ),
    "nemotron_h": (
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "layers_block_type": ["moe", "attention"],
        },
        "nemotron_h: experts .* have no gate",
    ),
    "phimoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "num_key_value_heads": 2},
        "phimoe: gate weights are not proportional",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_structures_are_refused_by_name(name: str) -> None:
    import transformers

    options, message = OTHERS[name]
    config = transformers.AutoConfig.for_model(name, **COMMON, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    ids, labels = batch()

    def use() -> None:
        attach(model, {"sp": 0.1})
        model(input_ids=ids, labels=labels)

    with pytest.raises((ValueError, RuntimeError), match=message):
        use()


def test_an_eager_loop_with_operations_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("olmoe", "eager")
    kind: Any = type(model.model.layers[0].mlp.experts)
    plain = kind.forward.__wrapped__
    monkeypatch.setattr(kind.forward, "__wrapped__", lambda *arguments: plain(*arguments) * 1.5)
    monkeypatch.setattr(experts, "_SAME_LOOP", set())
    attach(model, {"sp": 0.1})
    with pytest.raises(RuntimeError, match=r"the eager loop of OlmoeExperts .* call model.set_experts_implementation"):
        forward(model)


def test_outputs_as_a_tuple_are_refused() -> None:
    model = build("qwen3_moe")
    attach(model, {"sp": 0.1})
    with pytest.raises(RuntimeError, match="return_dict=True"):
        forward(model, return_dict=False)


def test_shifted_labels_count_the_same_tokens() -> None:
    model = build("qwen3_moe")
    attached = attach(model, {"sp": 0.1, "z": 0.1})
    labels = batch()[1]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    losses = [forward(model).loss, forward(model, labels=labels.flip(1), shift_labels=shifted).loss]
    assert torch.equal(*losses)
    attached.detach()


def test_a_term_that_reads_activations_needs_per_token() -> None:
    class Reading(Term):
        name = "reading"
        needs = Needs(activations=True)

    register(Reading)
    with pytest.raises(ValueError, match="term reading does not define `per_token`"):
        attach(build("qwen3_moe"), {"reading": 0.1})


def test_bfloat16_logits_stay_and_terms_are_float32() -> None:
    model = build("qwen3_moe", dtype=torch.bfloat16)
    plain = forward(model)
    attached = attach(model, {"sp": 0.5, "cp": 0.1, "o": 0.1, "erc": 0.1})
    attached.step = 1
    out = forward(model)
    out.loss.backward()
    assert torch.equal(out.logits, plain.logits)
    exact = build("qwen3_moe")
    wanted = attach(exact, {"sp": 0.5})
    forward(exact)
    # Three significant digits of activations, averaged over 90 pairs.
    assert attached.metrics()["reg/sp"] == pytest.approx(wanted.metrics()["reg/sp"], rel=0.05)


def test_adapters_of_peft_on_experts_and_router_get_the_terms() -> None:
    peft = pytest.importorskip("peft", reason="the package peft (extra finetune) is not installed")
    plain = forward(build("qwen3_moe"))
    options = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        init_lora_weights=True,
    )
    model = peft.get_peft_model(build("qwen3_moe"), options)
    attached = attach(model, {"sp": 0.5, "erc": 0.5}, add_to_loss=False)
    attached.step = 1
    out = forward(model)
    assert torch.equal(out.logits, plain.logits)
    attached.penalty(batch()[1]).backward()
    moved = {
        name: p.grad.abs().sum() > 0 for name, p in model.named_parameters() if p.grad is not None and "lora_B" in name
    }
    assert moved["base_model.model.model.layers.0.mlp.gate.lora_B.default.weight"]
    assert any(grad for name, grad in moved.items() if "layers.2.mlp.experts" in name)
