"""Text to batches: `corpora` yield documents, `tokenizer` and `prepare` make token shards once, `loader` reads them."""
