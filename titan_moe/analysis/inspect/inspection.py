"""Measures of checkpoints on a text (docs/metrics.md), accumulated batch by batch on any number of ranks.

With several checkpoints of one model, every one runs on the same text and is compared with the one before.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from titan_moe.analysis.inspect.tally import (
    PER_TOKEN,
    Recorder,
    Sample,
    Tally,
    largest,
    merged,
    record,
    unchanged_choices,
)
from titan_moe.analysis.processes import print_table
from titan_moe.checkpoint.changes import changed_keys
from titan_moe.checkpoint.dcp import load_checkpoint
from titan_moe.checkpoint.prepared import prepare_inspection
from titan_moe.checkpoint.resume import damage
from titan_moe.checkpoint.state import dump, read_state
from titan_moe.config.degrees import micro_batch_size
from titan_moe.config.tables import Config
from titan_moe.data.loader import DataRank, Windows, permuted, validation_batches
from titan_moe.data.prepare import Prepared
from titan_moe.data.shards import TokenStream
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError
from titan_moe.model.gemm import full
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh, from_first
from titan_moe.parallel.parallelize import build_runner
from titan_moe.runtime.files import own_folder, write_file
from titan_moe.train.build import build_model
from titan_moe.train.validation import Losses, LossSums, evaluate_batch
from torchtitan_ext.collectives import all_sum
from torchtitan_ext.metrics import (
    cluster_agreement,
    dead_fraction,
    domain_information,
    expert_response,
    knn_overlap,
    load_variation,
    match_experts,
    max_vio,
    mean_gate_imbalance,
    routing_silhouette,
)
from torchtitan_ext.ops.response import coupling_noise_bound
from torchtitan_ext.terms.specialization import chance_overlap

DIGITS = 7  # significant digits of matrix entries in the JSON file
UNSAFE = re.compile(r"[^\w.-]")  # characters replaced in file names
NEIGHBOURS = 10  # of a token, in knn_overlap
CONTEXT = 8  # tokens shown before an example
ROUTING_TOKENS = 1 << 17  # at the start of the text, whose chosen experts are compared between checkpoints

COLUMNS = {
    "load_variation": "load cv",
    "max_vio_global": "max vio",
    "dead": "dead",
    "entropy": "entropy",
    "topk_mass": "top-k mass",
    "margin": "margin",
    "overlap": "overlap",
    "overlap_y": "overlap y",
    "knn_overlap": "knn",
    "silhouette": "silhouette",
    "domain_information": "I(e; domain)",
    "persistence_top1": "persistence",
    "kappa": "kappa",
    "kappa_chance": "by chance",
    "cluster_agreement": "clusters",
}


class Options(NamedTuple):
    text: str = ""
    """A corpus as in data.corpus; empty: the validation text of the run."""
    sequences: int = 0
    """Sequences read, from the start of the text; 0: all."""
    cluster_tokens: int = 2048
    """Tokens whose router inputs are clustered; 0: none."""
    examples: int = 8
    """Tokens shown for each expert."""


def inspect(checkpoints: Sequence[Path], config: Config, mesh: Mesh, options: Options) -> list[dict[str, Any]]:
    """The measures of every checkpoint, on rank 0; an empty list on other ranks. Raises UserError.

    config: of the checkpoints' model, with the parallelism and dtype to run it with."""
    inspected = model_of(checkpoints[0], config, mesh, options)
    results: list[dict[str, Any]] = []
    before: Tally | None = None
    for checkpoint in checkpoints:
        tally = inspected.tally(kept_routing=ROUTING_TOKENS if len(checkpoints) > 1 else 0)
        inspected.load(checkpoint)
        losses = inspected.run_on_text(tally)
        result = {"checkpoint": str(checkpoint), "step": read_state(checkpoint, "checkpoint").step}
        result |= {"text": options.text or "validation", **losses._asdict()}
        measures = summary(inspected, tally, before)
        if mesh.first:
            results.append(result | measures)
        before = tally
    return results


def model_of(checkpoint: Path, config: Config, mesh: Mesh, options: Options) -> "InspectedModel":
    """The model of a checkpoint, whose weights are not loaded yet, with its tokenizer and text. Raises UserError."""
    state = read_state(checkpoint, "checkpoint")
    prepared = from_first(lambda: prepare_inspection(config, state, checkpoint, options.text))
    return InspectedModel(config, prepared, mesh, options)


class InspectedModel:
    """A model whose MoE layers report to a tally, and the text to run it on."""

    def __init__(self, config: Config, prepared: Prepared, mesh: Mesh, options: Options) -> None:
        """Raises UserError."""
        self.config, self.prepared, self.mesh, self.options = config, prepared, mesh, options
        split = "text" if options.text else "validation"
        self.stream = TokenStream(self.prepared.folder, self.prepared.manifest, split)
        seq_len, end = config.training.seq_len, self.prepared.tokenizer.eos
        self.windows = Windows(self.stream, seq_len, end, config.model.document_mask)
        self.sequences = min(options.sequences or len(self.windows), len(self.windows))
        self.model = build_model(config, self.prepared.tokenizer.vocab_size, mesh)
        self.runner = build_runner(self.model, config, mesh)
        if self.model.moe_layers == 0:
            raise UserError("the model has no MoE layer; there is nothing to inspect")
        clustered = min(options.cluster_tokens, self.sequences * seq_len)
        least = max(config.model.moe.experts, NEIGHBOURS + 1)
        if 0 < clustered < least:
            raise UserError(
                f"--cluster-tokens: {clustered} tokens of the text are too few to cluster; give {least} or more, or 0 for none"
            )
        self.recorder = Recorder()
        record(self.model, self.recorder, inputs=options.cluster_tokens > 0)

    def tally(self, **more: Any) -> Tally:
        """An empty tally. more: Tally's options."""
        moe, stream = self.config.model.moe, self.stream
        return Tally(
            layers=self.model.moe_layers,
            experts=moe.experts,
            domains=len(self.prepared.manifest.domains),
            seq_len=self.windows.seq_len,
            device=self.mesh.device,
            domain_at=lambda positions: stream.domains[stream.documents_at(positions)],
            sampled=sampled_positions(self.sequences * self.windows.seq_len, self.options.cluster_tokens),
            examples=self.options.examples,
            **more,
        )

    def load(self, checkpoint: Path) -> None:
        """Loads a checkpoint's weights. Raises UserError when it is damaged or of another model."""
        state = read_state(checkpoint, "checkpoint")
        different = changed_keys(state.model_table(str(checkpoint)), dump(self.config)["model"], "model.")
        if different:
            raise UserError(f"{checkpoint}: a checkpoint of another model: {different[0]} differs")
        if state.tokenizer != self.prepared.tokenizer.fingerprint:
            raise UserError(
                f"{checkpoint}: a checkpoint with another tokenizer; its weights would be read under other ids"
            )
        problem = damage(checkpoint, self.mesh)
        if problem is not None:
            raise UserError(f"{checkpoint} is damaged: {problem}")
        load_checkpoint(checkpoint, self.model, None)

    @torch.no_grad()
    def run_on_text(self, tally: Tally) -> Losses:
        """Runs the model on the text and returns the losses. Fills the tally and sums it over ranks."""
        mesh = self.mesh
        self.recorder.tally = tally
        part = DataRank(micro_batch_size(self.config, mesh.degrees), mesh.data_rank, mesh.degrees.data)
        sums = LossSums()
        batches = validation_batches(self.windows, self.sequences, part)
        quiet = not (mesh.first and sys.stderr.isatty())
        count, console = -(-self.sequences // (part.size * part.ranks)), Console(stderr=True)
        for batch in track(batches, "Inspecting", count, console=console, transient=True, disable=quiet):
            evaluated = evaluate_batch(self.runner, batch, mesh)
            sums.add(evaluated, self.prepared.tokenizer)
            tally.add_pairs(evaluated.routing_pairs, evaluated.labelled)
        tally.sum_over_ranks(mesh)
        return sums.over_ranks(mesh)


def sampled_positions(count: int, wanted: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """A mask of the `wanted` positions, of `count`, to cluster: the same for any number of ranks and any batch size."""
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[permuted(np.arange(min(wanted, count), dtype=np.int64), count, key=0)] = True
    return chosen


class RankResult(NamedTuple):
    """Results of one rank that rank 0 merges, since they are no sums."""

    responses: dict[int, tuple[Tensor, Tensor]]
    """By layer, erc's M and eps."""
    samples: dict[int, Sample]
    best_gates: Tensor
    best_positions: Tensor


def summary(inspected: InspectedModel, tally: Tally, before: Tally | None) -> dict[str, Any]:
    """Every measure by layer, by pair of consecutive layers, and its means. A collective; returns {} except on rank
    0."""
    model, mesh, prepared, stream = inspected.model, inspected.mesh, inspected.prepared, inspected.stream
    responses = {moe.layer: response(moe.router.weight, moe.experts.gate_up) for moe in model.moe_modules()}
    unchanged = None if before is None else unchanged_choices(before, tally)
    if unchanged is not None:
        unchanged = all_sum(all_sum(unchanged.to(mesh.device), mesh.ranks.data), mesh.pp)
    ours = RankResult(responses, tally.samples, tally.best_gates.cpu(), tally.best_positions.cpu())
    parts = [ours]
    if mesh.degrees.world > 1:
        everyone: list[Any] = [None] * mesh.degrees.world
        dist.gather_object(ours, everyone if mesh.first else None)
        parts = everyone
    if not mesh.first:
        return {}
    samples = merged([part.samples for part in parts])
    gates = torch.cat([part.best_gates for part in parts], dim=2)
    positions = torch.cat([part.best_positions for part in parts], dim=2)
    examples = [unique_largest(g, p, tally.examples) for g, p in zip(gates, positions, strict=True)]
    layers = []
    for layer in range(tally.layers):
        measures = layer_measures(tally, layer, model)
        matrix, eps = next(part.responses[layer] for part in parts if layer in part.responses)
        measures |= {"erc_eps": rounded(eps), "erc_M": rounded(matrix)}
        if layer in samples:
            measures |= cluster_measures(*samples[layer])
        if unchanged is not None:
            first, kept, count = unchanged[layer].tolist()
            measures |= {"persistence_top1": first / max(count, 1), "persistence_topk": kept / max(count, 1)}
        if tally.examples:
            measures["examples"] = [
                [context(stream, prepared.tokenizer, position) for position in row if position >= 0]
                for row in examples[layer].tolist()
            ]
        layers.append(measures)
    pairs = [pair_measures(tally, pair) for pair in range(tally.layers - 1)]
    if samples:
        agreements = cluster_agreement([samples[layer][0] for layer in range(tally.layers)], tally.experts)
        for measures, agreement in zip(pairs, agreements, strict=True):
            measures["cluster_agreement"] = agreement
    return {
        "domains": [name or "none" for name in prepared.manifest.domains],
        "summary": means([*layers]) | means(pairs),
        "layers": layers,
        "pairs": pairs,
    }


def layer_measures(tally: Tally, layer: int, model: Transformer) -> dict[str, Any]:
    """Measures of one MoE layer that follow from the summed tally."""
    moe = model.settings.moe
    counts = tally.counts[layer].cpu()
    tokens = max(int(counts.sum()) // moe.top_k, 1)
    sums = dict(zip(PER_TOKEN, (tally.sums[layer] / tokens).tolist(), strict=True))
    mean_gates = (tally.gates[layer] / tokens).cpu()
    return {
        "load": counts.tolist(),
        "load_variation": load_variation(counts).item(),
        "max_vio_global": max_vio(counts).item(),
        "dead": dead_fraction(counts).item(),
        **{name: sums[name] for name in ("entropy", "topk_mass", "margin", "overlap")},
        "overlap_chance": chance_overlap(moe.hidden_dim),
        "overlap_y": sums["overlap_y"],
        "overlap_y_chance": chance_overlap(model.settings.dim),
        "routing_variance": (sums["squared_gates"] - mean_gates.square().sum().item()) / moe.experts,
        "mean_gate_imbalance": mean_gate_imbalance(mean_gates.unsqueeze(0)).item(),
        "domain_load": tally.domain_load[layer].tolist(),
        "domain_information": domain_information(tally.domain_load[layer]),
    }


def pair_measures(tally: Tally, pair: int) -> dict[str, Any]:
    """Measures of the routing from one MoE layer to the next."""
    joint, first = tally.joint[pair].cpu().double(), tally.first_joint[pair].cpu().double()
    matching, kappa = match_experts(first)
    used = tally.counts[pair].cpu().clamp(min=1).unsqueeze(1)
    chance = match_experts(torch.outer(first.sum(1), first.sum(0)))[1]
    return {
        "kappa": kappa,
        "kappa_chance": chance,
        "matching": matching.tolist(),
        "cond": rounded(joint / used),
    }


def cluster_measures(inputs: Tensor, top1: Tensor) -> dict[str, float]:
    """How router inputs (N, D) group by their first expert (N,)."""
    fractions = torch.bincount(top1).double() / len(top1)
    measures = {
        "knn_overlap": knn_overlap(inputs, top1, NEIGHBOURS),
        "knn_overlap_chance": 1.0 - fractions.square().sum().item(),
    }
    if 1 < int((fractions > 0).sum()) < len(top1):
        measures["silhouette"] = routing_silhouette(inputs, top1)
    return measures


def response(router_weight: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """erc's M (E, E), its rows divided by their diagonal, and eps (E,), from the all-gathered weights of a layer."""
    router, gate = full(router_weight).detach(), full(gate_up).detach()[:, 0]
    return expert_response(router, gate).cpu(), coupling_noise_bound(router).cpu()


def unique_largest(gates: Tensor, positions: Tensor, count: int) -> Tensor:
    """Each expert's positions with the largest gates, (E, count); -1 where there are fewer tokens.

    gates, positions: (E, n) of all ranks. Tensor-parallel ranks report the same tokens; each counts once."""
    order = positions.argsort(dim=1, stable=True)
    gates, positions = gates.gather(1, order), positions.gather(1, order)
    repeated = torch.zeros_like(positions, dtype=torch.bool)
    repeated[:, 1:] = positions[:, 1:] == positions[:, :-1]
    gates, positions = gates.masked_fill(repeated, -torch.inf), positions.masked_fill(repeated, -1)
    return largest(gates, positions, count)[1]


def context(stream: TokenStream, tokenizer: Tokenizer, position: int) -> list[str]:
    """The last tokens before a position, within its document, and the token at it, both as text."""
    start = max(position - CONTEXT, int(stream.starts[stream.documents_at(np.array([position]))[0]]))
    ids = stream.read(start, position + 1).tolist()
    return [tokenizer.decode(ids[:-1]), tokenizer.decode(ids[-1:])]


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means of every number that all rows have."""
    names = [name for name, value in rows[0].items() if isinstance(value, int | float)] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in names if all(name in row for row in rows)}


def rounded(x: Tensor) -> Any:
    """Nested lists of numbers with few digits, for JSON."""

    def short(value: Any) -> Any:
        return [short(v) for v in value] if isinstance(value, list) else float(f"{value:.{DIGITS}g}")

    return short(x.double().tolist())


def write_results(checkpoints: Sequence[Path], results: list[dict[str, Any]], text: str, output: Path | None) -> None:
    """Prints the result of each checkpoint as a table, and writes it as JSON, completely or not at all.

    output: a file, or a directory for several checkpoints; None: `inspect/` of the run directory. results: empty on
    ranks other than 0, which write nothing."""
    for checkpoint, result in zip(checkpoints, results, strict=bool(results)):
        path = place_of(checkpoint, text)
        if output:
            path = output / path.name if len(checkpoints) > 1 else output
        if output:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            own_folder(path.parent.parent, path.parent.name)
        write_file(path, json.dumps(result, allow_nan=False))
        print_table(table(result))
        print(path)


def table(result: dict[str, Any]) -> Table:
    """One row per MoE layer. Measures of a pair of layers are in the row of the earlier layer."""
    title = f"{result['checkpoint']}: loss {result['loss']:.4f} on {result['tokens']:,} tokens of {result['text']}"
    rows = [*map(dict, result["layers"]), result["summary"]]
    for row, pair in zip(rows, result["pairs"], strict=False):
        row |= pair
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    result_table = Table(title=title)
    for title in ("layer", *(COLUMNS[name] for name in names)):
        result_table.add_column(title, justify="right")
    for number, row in enumerate(rows):
        label = str(number) if number < len(result["layers"]) else "mean"
        result_table.add_row(label, *(f"{row[name]:.3g}" if name in row else "" for name in names))
    return result_table


def place_of(checkpoint: Path, text: str) -> Path:
    """The file for the result of a checkpoint: in `inspect/` of its run directory."""
    name = f"{checkpoint.name}-{UNSAFE.sub('_', text)}" if text else checkpoint.name
    return checkpoint.parent.parent / "inspect" / f"{name}.json"
