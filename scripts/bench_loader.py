"""Time to build one rank's data of a training step: 512 sequences of 2,048 tokens in the global batch.

    python scripts/bench_loader.py
    python scripts/bench_loader.py --ranks 8

A builds this rank's sequences (`TrainingLoader.build`), on ranks other than 0 without the CRC of the global batch. B builds the
global batch on every rank, window by window, with the CRC, and then takes this rank's sequences from it. A and B alternate. The
text is 100 million random tokens.
"""

import argparse
import statistics
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from benchmarking import interval, seconds

from titan_moe.data.loader import Batch, DataRank, TrainingLoader, Windows, step_windows
from titan_moe.data.shards import FORMAT_VERSION, Manifest, ShardWriter, TokenStream
from titan_moe.runtime.allocator import keep_freed_memory

SEQUENCES, SEQ_LEN, TOKENS = 512, 2048, 100_000_000


def random_stream(folder: Path) -> TokenStream:
    """Documents of log-normal length, about 660 tokens on average."""
    generator = np.random.default_rng(0)
    writer = ShardWriter(folder, "train", "uint16")
    while writer.tokens < TOKENS:
        length = int(generator.lognormal(6, 1)) + 2
        writer.add(generator.integers(0, 32000, length), domain=0, source_bytes=length)
    return TokenStream(
        folder, Manifest(FORMAT_VERSION, "", "", "uint16", [""], {"train": writer.finish()}, ""), "train"
    )


def build_globally(windows: Windows, part: DataRank, step: int) -> tuple[list[Batch], int]:
    """This rank's micro-batches, cut from the whole global batch."""
    stream, seq = windows.stream, windows.seq_len
    indices = step_windows(len(windows), SEQUENCES, 0, step)
    starts = indices[:, None] * seq
    positions = starts + np.arange(seq + 1)
    exists = positions < len(stream)
    ids = np.zeros(positions.shape, dtype=np.int64)
    for row, index in enumerate(indices):
        read = stream.read(int(index) * seq, int(index) * seq + seq + 1)
        ids[row, : len(read)] = read
    documents = np.where(exists, stream.documents_at(positions), -1)
    mask = exists[:, 1:] & (documents[:, 1:] == documents[:, :-1])
    arrays = (ids[:, :-1], ids[:, 1:], mask, documents[:, :-1], (positions - starts)[:, :-1], np.arange(SEQUENCES))
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    batch = Batch._make([*tensors, int(mask.sum())])
    data_crc = zlib.crc32(batch.tokens.numpy().tobytes())
    return batch.rows(torch.from_numpy(part.rows(SEQUENCES))).split(part.size), data_crc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=25)
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        windows = Windows(random_stream(Path(folder)), SEQ_LEN, 0)
        part = DataRank(SEQUENCES // options.ranks, options.ranks - 1, options.ranks)
        arms = {
            "A": TrainingLoader(windows, SEQUENCES, 0, part).build,
            "A with data_crc (rank 0)": TrainingLoader(windows, SEQUENCES, 0, part, checksum=True).build,
            "B": lambda step: build_globally(windows, part, step),
        }
        times: dict[str, list[float]] = {name: [] for name in arms}
        for step in range(options.pairs + 2):  # the first two warm up
            for name, build in arms.items():
                times[name].append(seconds(lambda build=build, step=step: build(step)))  # type: ignore[misc]
    for name, values in times.items():
        ratios = [value / other for value, other in zip(values[2:], times["B"][2:], strict=True)]
        low, high = interval(ratios)
        print(
            f"{name}: {1e3 * statistics.median(values[2:]):.1f} ms, / B {statistics.median(ratios):.3f} "
            f"({low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
