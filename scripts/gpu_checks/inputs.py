"""Sizes, and inputs of random tokens."""

import torch

from gpu_checks.report import Report
from titan_moe.config.load import load_config
from titan_moe.config.tables import Config, Model
from titan_moe.model.transformer import Inputs

GEOMETRIES = ["medium", "small", "large"]
TOY = [
    "--model.vocab_size=512",
    "--model.dim=64",
    "--model.layers=2",
    "--model.moe.experts=8",
    "--model.moe.top_k=4",
    "--model.moe.hidden_dim=48",
]


def random_inputs(vocabulary: int, sequences: int, seq: int, documents: int = 1) -> Inputs:
    """A batch of random tokens, all labelled, every sequence cut into this many documents."""
    tokens = torch.randint(0, vocabulary, (sequences, seq), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(seq)
    return Inputs(
        tokens,
        tokens.roll(-1, 1),
        (positions * documents // seq).expand_as(tokens),
        positions.expand_as(tokens),
        torch.full(tokens.shape, 1.0 / tokens.numel()),
        torch.arange(sequences),
        torch.tensor(1),
        positions,
    )


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on a device."""
    return Inputs._make(x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs)


def geometry(report: Report, name: str) -> Model:
    """The model of a scale of `train_configs/`, or a toy in its place."""
    return configuration(report, name, []).model


def configuration(report: Report, name: str, overrides: list[str]) -> Config:
    """A scale of the paper with its loss weights; its tokenizer and corpus are not read. Toy: the same, but tiny."""
    sequences, seq = (2, 64) if report.toy else (16, 2048)
    sizes = [
        f"--training.batch_size={sequences}",
        f"--training.microbatch_size={sequences}",
        f"--training.seq_len={seq}",
    ]
    return load_config(name, [*(TOY if report.toy else []), *sizes, *overrides], reads_files=False)
