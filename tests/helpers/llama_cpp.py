"""llama.cpp through its own server, in this process."""

import json
import math
import urllib.request
from pathlib import Path

import pytest

xllamacpp = pytest.importorskip("xllamacpp")


class LlamaCpp:
    """A GGUF file, served with keys and values in float32 and without flash attention, so that only the file rounds."""

    def __init__(self, path: Path, length: int) -> None:
        """length: of the longest text."""
        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx = options.n_batch = options.n_ubatch = max(256, length)
        options.n_parallel = 1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.warmup = False
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(options)
        self.letter = self.tokenize("e", special=False)[-1]

    def log_probabilities(self, ids: list[int], best: int) -> dict[int, float]:
        """Of the `best` most probable tokens after `ids`, the first one first."""
        # The server withholds tokens that are parts of a character, so it is made to choose a letter. The probabilities are
        # those before that.
        request = {"prompt": ids, "n_predict": 1, "n_probs": best, "logit_bias": [[self.letter, 1000.0]]}
        answer = self.server.handle_completions(request | {"post_sampling_probs": False, "cache_prompt": False})
        result = answer if isinstance(answer, dict) else json.loads(answer)
        (chosen,) = result["choices"][0]["logprobs"]["content"]
        found = {entry["id"]: entry["logprob"] for entry in chosen["top_logprobs"]}
        assert all(map(math.isfinite, found.values()))
        return found

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` most probable tokens after `ids`."""
        text = list(ids)
        for _ in range(count):
            text.append(next(iter(self.log_probabilities(text, 1))))
        return text[len(ids) :]

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Ids of a text. special: read the names of control symbols as the symbols."""
        body = json.dumps({"content": text, "add_special": False, "parse_special": special}).encode()
        request = urllib.request.Request(f"{self.server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            tokens: list[int] = json.load(answer)["tokens"]
        return tokens
