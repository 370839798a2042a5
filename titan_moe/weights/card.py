"""The model card: what the model is, what it was trained on and with, what it reached, and how the files were made."""

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
    """README.md of an export. form: what the files are, such as "GGUF in q8_0"."""
    state, model, moe = source.state, source.model, source.model.moe
    shown = {name: without_none(state.config[name]) for name in TABLES if name in state.config}
    if "regularizers" in shown:
        shown["regularizers"] = used_terms(shown["regularizers"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {source.run.name}

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

titan_moe {state.titan_moe} with PyTorch {state.torch} trained the model; the weights are those after step {state.step:,}.
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
    return ", ".join(Path(str(name)).name for name in (named if isinstance(named, list) else [named]))


def used_terms(regularizers: dict[str, Any]) -> dict[str, Any]:
    """The terms with a weight."""
    return {
        name: table for name, table in regularizers.items() if isinstance(table, dict) and table.get("weight", 0) != 0
    }


def without_none(table: dict[str, Any]) -> dict[str, Any]:
    """A table as TOML can have it."""
    return {
        name: without_none(value) if isinstance(value, dict) else value
        for name, value in table.items()
        if value is not None
    }
