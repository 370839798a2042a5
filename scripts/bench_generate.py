"""Tokens per second of `titan-moe generate` compared with Transformers on the same exported weights, in one process.

    python scripts/bench_generate.py runs/debug                         batches of 1 and 8 texts, 128 new tokens each
    python scripts/bench_generate.py runs/debug --dtype bfloat16 --pairs 40

Both continue the same random prompts, always with the most probable token and past the end of a document, each with its own
key-value cache. Times are of whole texts, prompts included. Runs alternate; a ratio is the median of paired ratios, with a
95% interval. Needs the extra `hf`. Says in how many tokens both agree, which in float32 should be all but ties.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarking import interval, seconds

from titan_moe.checkpoint.chosen import from_checkpoint
from titan_moe.generate.load import Loaded, load_model
from titan_moe.generate.loop import Options, generate
from titan_moe.generate.sampling import Sampling
from titan_moe.parallel.mesh import single
from titan_moe.runtime.device import pick_device
from titan_moe.weights.source import open_source
from titan_moe.weights.transformers_folder import export_folder

BATCHES = (1, 8)


class Endless:
    """A tokenizer for which no token ends a text, and which keeps the tokens instead of decoding them."""

    eos = -1

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def ours(loaded: Loaded, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The new tokens of each text."""
    texts = [""] * len(prompts)
    tokenizer: Any = Endless()
    for piece in generate(loaded.model, tokenizer, prompts, Options(count, sampling=Sampling(temperature=0.0))):
        texts[piece.text_number] += piece.text
    return [[*map(ord, text)] for text in texts]


def theirs(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    ids = torch.tensor(prompts, device=model.device)
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    new: list[list[int]] = made[:, ids.shape[1] :].tolist()
    return new


def transformers_model(run: Path, dtype: str, device: torch.device) -> Any:
    """Transformers' model with the run's weights, exported in `dtype`."""
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        for line in export_folder(open_source(run, 0), folder, dtype):
            print(line)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per text")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()

    device = pick_device()
    (checkpoint,), config = from_checkpoint([options.run], False, [f"--training.dtype={options.dtype}"], 1)
    loaded = load_model(checkpoint, config, single(device))
    peer = transformers_model(options.run, options.dtype, device)
    print(f"{options.dtype} on {device.type}, {torch.get_num_threads()} threads, {options.tokens} new tokens per text")
    source, vocabulary = torch.Generator().manual_seed(0), loaded.tokenizer.vocab_size
    for batch in BATCHES:
        prompts = torch.randint(3, vocabulary, (batch, options.prompt), generator=source).tolist()
        a, b = ours(loaded, prompts, options.tokens), theirs(peer, prompts, options.tokens)
        same = sum(x == y for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))
        times = []
        for pair in range(options.pairs):
            work = [lambda: ours(loaded, prompts, options.tokens), lambda: theirs(peer, prompts, options.tokens)]  # noqa: B023
            order = (0, 1) if pair % 2 == 0 else (1, 0)
            spent = {which: seconds(work[which]) for which in order}
            times.append((spent[0], spent[1]))
        made = batch * options.tokens
        rates = [made / statistics.median(side) for side in zip(*times, strict=True)]
        ratios = [there / here for here, there in times]
        low, high = interval(ratios)
        print(
            f"batch {batch}: ours {rates[0]:,.0f} tokens/s, Transformers {rates[1]:,.0f}; ours is "
            f"{statistics.median(ratios):.2f} times as fast [{low:.2f}, {high:.2f}]; {same} of {made} tokens are the same"
        )


if __name__ == "__main__":
    main()
