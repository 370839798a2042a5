"""The model card: what the model is, what it was trained on and with, what it reached, and how the files were made."""

import re
from pathlib import Path
from typing import Any

import tomli_w

from titan_moe import __version__
from titan_moe.checkpoint.run_dir import read_rows
from titan_moe.weights.source import Source

TABLES = ("model", "regularizers", "balancer", "training", "optimizer", "lr_scheduler")
"""Tables of the configuration that the card shows. None of them names files."""
MEASURES = {"loss": "validation loss (nats per token)", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}


def model_card(source: Source, form: str) -> str:
    """README.md of an export. form: what the files are."""
    state, model, moe = source.state, source.model, source.model.moe
    shown = {name: without_none(state.config[name]) for name in TABLES if name in state.config}
    if "regularizers" in shown:
        shown["regularizers"] = used_terms(shown["regularizers"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {plain(source.run.name)}

A Mixture-of-Experts language model with {source.parameters:,} parameters: {model.layers} layers, {moe.experts} experts in an
MoE layer, of which each token uses {moe.top_k}, a vocabulary of {model.vocab_size:,} pieces, sequences of
{source.training.seq_len:,} tokens in training.

## Training

| | |
|---|---|
{chr(10).join(f"| {name} | {value} |" for name, value in facts(source).items())}

The complete tables of its configuration, with the weights of its loss terms:

```toml
{tomli_w.dumps(shown)}```

## How these files were made

titan_moe {plain(state.titan_moe)} with PyTorch {plain(state.torch)} trained the model, for {state.step:,}
steps up to these weights.
`titan-moe export` of titan_moe {__version__} wrote them as {form}.
"""


def facts(source: Source) -> dict[str, Any]:
    """Rows of the card's table: text, tokens, losses at the exported step as far as metrics.jsonl has them."""
    step, training = source.state.step, source.training
    found = {
        "steps": f"{step:,}",
        "tokens": f"{step * training.batch_size * training.seq_len:,}",
        "text": corpus(source.state.config.get("data", {}).get("corpus", "")),
    }
    metrics = source.run / "metrics.jsonl"
    rows = read_rows(metrics) if metrics.exists() else []
    for row in rows:
        if row["step"] == step and row["kind"] == "train":
            found["training cross-entropy (nats per token)"] = f"{row['ce']:.4f}"
            terms = {name.removeprefix("reg/"): value for name, value in row.items() if name.startswith("reg/")}
            found |= {f"term {name}": f"{value:.4g}" for name, value in terms.items()}
    evaluations = [row for row in rows if row["kind"] == "validation" and row["step"] <= step]
    if evaluations:
        last = evaluations[-1]
        found |= {f"{meaning} at step {last['step']:,}": f"{last[name]:.4f}" for name, meaning in MEASURES.items()}
    return found


def corpus(named: Any) -> str:
    """Names of the corpora; of paths only the last part, since a card may be published."""
    return ", ".join(plain(Path(str(name)).name) for name in (named if isinstance(named, list) else [named]))


def plain(name: str) -> str:
    """A name from a run that someone else may have made, without characters that mean something in Markdown or HTML."""
    return " ".join(re.sub(r"[^\w.+-]", " ", name).split())[:100]


def used_terms(regularizers: dict[str, Any]) -> dict[str, Any]:
    """The terms with a weight."""
    return {
        name: table for name, table in regularizers.items() if isinstance(table, dict) and table.get("weight", 0) != 0
    }


def without_none(value: Any) -> Any:
    """A value as TOML can have it."""
    if isinstance(value, dict):
        return {name: without_none(inside) for name, inside in value.items() if inside is not None}
    if isinstance(value, list):
        return [without_none(inside) for inside in value if inside is not None]
    return value
