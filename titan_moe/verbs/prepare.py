"""Tokenises the training text into the cache, as `titan-moe train` would, and prints what it contains.

example: titan-moe prepare --config debug --data.corpus=docs --tokenizer.vocab_size=1024
"""

from argparse import ArgumentParser, Namespace

from titan_moe.config.load import load_config, world_size_from_environment
from titan_moe.verbs.arguments import add_config


def add_arguments(parser: ArgumentParser) -> None:
    add_config(parser)


def run(arguments: Namespace) -> int:
    config = load_config(
        arguments.config, arguments.overrides, world_size=world_size_from_environment(), trust=arguments.trust
    )
    from titan_moe.data.needs import check_needs
    from titan_moe.data.prepare import prepare
    from titan_moe.data.streams import StreamFolder

    check_needs(config, has_tokenizer=False)
    tokenizer, folder, manifest = prepare(config, quiet=True, whole=True)
    splits = [(name, split, len(split.shards)) for name, split in manifest.splits.items()]
    if manifest.stream is not None:
        stream = StreamFolder(folder)
        splits.insert(0, ("train", stream.counts(), len(stream.shards)))
    for name, split, shards in splits:
        print(
            f"{name:<12} {split.tokens:,} tokens in {split.documents:,} documents, {split.source_bytes:,} bytes of text "
            f"({split.source_bytes / split.tokens:.2f} per token), {shards} shard(s)"
        )
    print(f"{'domains':<12} {', '.join(domain or 'none' for domain in manifest.domains)}")
    print(f"{'tokenizer':<12} {tokenizer.vocab_size:,} pieces{'' if tokenizer.lossless else ', not lossless'}")
    for name, line in zip(("read", *[""] * len(manifest.report)), manifest.report, strict=False):
        print(f"{name:<12} {line}")
    print(f"{'shards':<12} {folder}")
    return 0
