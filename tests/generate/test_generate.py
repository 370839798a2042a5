"""Generation: the key-value cache changes no logits and saves the work, and a text depends on nothing but itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from titan_moe.config.tables import Model, MoE
from titan_moe.generate.cache import KeyValueCache, extend, inference_inputs
from titan_moe.generate.load import prepare_for_inference
from titan_moe.generate.loop import Options, Piece, complete, generate
from titan_moe.generate.sampling import Sampling
from titan_moe.model.init import init_weights
from titan_moe.model.transformer import Transformer
from torchtitan_ext.terms import Terms

VOCAB = 40
PROMPTS = [[1, 5, 9, 14, 3], [1, 7], [1, 30, 31, 32, 33, 34, 35, 36, 2]]
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "grouped queries": ({"kv_heads": 2}, {}),
    "qk_norm": ({"kv_heads": 1, "qk_norm": True}, {}),
    "shared and dense": ({"tie_embeddings": False}, {"shared_experts": 1, "first_dense_layers": 1}),
    "sigmoid and bias": ({"document_mask": True}, {"score": "sigmoid", "normalize_topk": True, "route_scale": 2.5}),
}


class Letters:
    """A tokenizer with a character per token."""

    bos, eos = 1, 2

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("0") + i) for i in ids)


def network(variant: str = "grouped queries", dtype: torch.dtype = torch.float32) -> Transformer:
    options, moe = VARIANTS[variant]
    sizes: dict[str, Any] = {"dim": 16, "layers": 3, "heads": 4, "vocab_size": VOCAB}
    model = Transformer(Model(**sizes, **options, moe=MoE(experts=6, top_k=2, hidden_dim=10, **moe)), Terms(), dtype)
    init_weights(model, 0)
    source = torch.Generator().manual_seed(1)
    for layer in model.moe_modules():
        layer.router.expert_bias.copy_(
            torch.randn(6, generator=source) if variant == "sigmoid and bias" else torch.zeros(6)
        )
    prepare_for_inference(model)
    return model


def recomputed(model: Transformer, ids: list[int]) -> Tensor:
    """Logits after the last token, without a cache."""
    tokens = torch.tensor([ids])
    return model.logits(inference_inputs(tokens, torch.arange(len(ids)).unsqueeze(0)))[0, -1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_with_the_cache_are_those_of_a_recomputation(variant: str) -> None:
    """Prompts of different lengths in one batch, then single tokens, several at once, and after a row has left."""
    model, source = network(variant), torch.Generator().manual_seed(2)
    texts, cache = [list(prompt) for prompt in PROMPTS], KeyValueCache(3, torch.device("cpu"))
    new = [list(prompt) for prompt in PROMPTS]
    for step in range(8):
        logits = extend(model, cache, new)
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row], recomputed(model, text), rtol=1e-5, atol=1e-5)
        if step == 4:
            cache.keep([0, 2])
            texts = [texts[0], texts[2]]
        counts = [3, 1] if step == 5 else [1] * len(texts)
        new = [torch.randint(3, VOCAB, (count,), generator=source).tolist() for count in counts]
        texts = [text + ids for text, ids in zip(texts, new, strict=True)]


def test_a_new_token_costs_the_work_of_one_token() -> None:
    """Tokens that pass through each of the three blocks; logits are computed of the last tokens only."""
    model = network()
    passed: list[int] = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda _, arguments: passed.append(arguments[0].shape[:2].numel()))
    cache = KeyValueCache(2, torch.device("cpu"))
    extend(model, cache, [[1, 2, 3, 4], [1, 5, 6, 7]])
    for _ in range(3):
        assert extend(model, cache, [[8], [9]]).shape == (2, VOCAB)
    assert passed == [8] * 3 + [2] * 9


def test_the_model_is_as_before_after_the_cache() -> None:
    model = network()
    before = recomputed(model, PROMPTS[0])
    complete(model, Letters(), PROMPTS, Options(max_tokens=4))  # type: ignore[arg-type]
    assert torch.equal(recomputed(model, PROMPTS[0]), before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("variant", ["grouped queries", "sigmoid and bias"])
def test_a_batch_of_prompts_gives_each_prompts_own_text(variant: str, temperature: float) -> None:
    model = network(variant, torch.float64)
    options = Options(max_tokens=12, seed=3, sampling=Sampling(temperature=temperature, repetition_penalty=1.3))
    together = complete(model, Letters(), PROMPTS, options)  # type: ignore[arg-type]
    alone = [complete(model, Letters(), [prompt], options)[0] for prompt in PROMPTS]  # type: ignore[arg-type]
    assert together == alone
    assert sum(map(bool, together)) > 1  # the first token of one may end it, by the weights that this PyTorch draws


def test_greedy_text_is_the_most_probable_token_each_time() -> None:
    model, text = network(dtype=torch.float64), [*PROMPTS[0]]
    options = Options(max_tokens=10, sampling=Sampling(temperature=0.0))
    pieces = list(generate(model, Letters(), [PROMPTS[0]], options))  # type: ignore[arg-type]
    for _ in range(10):
        text.append(int(recomputed(model, text).argmax()))
    wanted = text[len(PROMPTS[0]) :]
    wanted = wanted[: wanted.index(2)] if 2 in wanted else wanted
    assert "".join(piece.text for piece in pieces) == Letters().decode(wanted)
    assert pieces[-1].ended == ("eos" if len(wanted) < 10 else "length")


def test_a_seed_gives_the_same_text_again_and_equal_prompts_different_ones() -> None:
    model, options = network(), Options(max_tokens=16, seed=5)
    first, second = (complete(model, Letters(), [[1, 7], [1, 7]], options) for _ in range(2))  # type: ignore[arg-type]
    other = complete(model, Letters(), [[1, 7], [1, 7]], options._replace(seed=6))  # type: ignore[arg-type]
    assert first == second
    assert first[0] != first[1]
    assert other[0] != first[0]


def test_a_text_ends_at_its_stop_string_and_leaves_the_batch() -> None:
    model = network(dtype=torch.float64)
    options = Options(max_tokens=20, seed=1)
    whole = complete(model, Letters(), PROMPTS, options)  # type: ignore[arg-type]
    stop = whole[0][3:6]
    rows: list[int] = []
    model.layers["0"].register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[0]))
    pieces: list[Piece] = list(generate(model, Letters(), PROMPTS, options._replace(stop=(stop,))))  # type: ignore[arg-type]
    texts = ["".join(piece.text for piece in pieces if piece.text_number == n) for n in range(3)]
    assert texts == [text.split(stop)[0] for text in whole]
    ends = {piece.text_number: piece for piece in pieces if piece.ended}
    assert ends[0].ended == "stop"
    passes = [end.tokens + (end.ended == "eos") for end in ends.values()]
    assert rows == [sum(count > n for count in passes) for n in range(max(passes))]


def test_weights_are_rounded_once_and_logits_stay_bitwise() -> None:
    sizes: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 4, "vocab_size": VOCAB}
    model = Transformer(Model(**sizes, moe=MoE(experts=6, top_k=2, hidden_dim=10)), Terms(), torch.bfloat16)
    init_weights(model, 0)
    with torch.no_grad():
        before = recomputed(model, PROMPTS[2])
    prepare_for_inference(model)
    assert torch.equal(recomputed(model, PROMPTS[2]), before)
    assert {p.dtype for name, p in model.named_parameters() if "router" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "router" not in name} == {torch.bfloat16}
