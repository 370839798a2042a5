"""A byte-level tokenizer.json, as other programs' models bring along."""

from typing import Any

END = "<|endoftext|>"


def byte_level(vocabulary: int = 300) -> Any:
    """Byte pairs with an end symbol, as Qwen's, OLMoE's and DeepSeek's tokenizers are."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        ["The quick brown fox jumps over the lazy dog. " * 20, "def f(x):\n\treturn x\n" * 20], trainer
    )
    return made
