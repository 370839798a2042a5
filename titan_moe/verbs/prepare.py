"""titan-moe prepare: tokenises the text into the cache, as `train` would, and says what came of it."""

from titan_moe.data.prepare import prepare
from titan_moe.verbs.train import check_vocabulary
from titan_moe.verbs.words import configured


def run(words: list[str]) -> int:
    config = configured(words)
    found = prepare(config)
    check_vocabulary(config, found.tokenizer.vocab_size)
    for name, split in found.manifest.splits.items():
        print(
            f"{name:<12} {split.tokens:,} tokens in {split.documents:,} documents, {split.source_bytes:,} bytes of text "
            f"({split.source_bytes / split.tokens:.2f} per token), {len(split.shards)} shard(s)"
        )
    print(f"{'domains':<12} {', '.join(domain or 'none' for domain in found.manifest.domains)}")
    print(
        f"{'tokenizer':<12} {found.tokenizer.vocab_size:,} pieces{'' if found.tokenizer.lossless else ', not lossless'}"
    )
    print(f"{'shards':<12} {found.folder}")
    return 0
