"""A checkpoint and text in, the measures of docs/metrics.md out: streaming, on any number of ranks.

With several checkpoints of one model the text goes through each, and each is compared with the one before.
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
from titan_moe.checkpoint.dcp import load_checkpoint
from titan_moe.checkpoint.resume import damage
from titan_moe.checkpoint.run_dir import STATE_FILE, changed_keys, read_state, saved_steps
from titan_moe.config.degrees import micro_batch_size
from titan_moe.config.load import saved_config
from titan_moe.config.tables import Config
from titan_moe.data.loader import DataRank, Windows, permuted, validation_batches
from titan_moe.data.prepare import prepare
from titan_moe.data.shards import TokenStream
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError
from titan_moe.model.gemm import whole
from titan_moe.model.transformer import Transformer
from titan_moe.parallel.mesh import Mesh, from_first
from titan_moe.parallel.parallelize import build_runner
from titan_moe.train.build import build_model
from titan_moe.train.validation import Losses, LossSums, evaluate_batch
from torchtitan_ext.collectives import all_sum
from torchtitan_ext.metrics import (
    cluster_agreement,
    dead_share,
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

DIGITS = 7  # significant ones of the numbers in matrices
UNSAFE = re.compile(r"[^\w.-]")  # in a file's name
CONTEXT = 8  # tokens shown before an example
ROUTING_TOKENS = 1 << 17  # from the text's start, whose choices are compared between checkpoints

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
    """Of the text, from its start; 0: all."""
    cluster_tokens: int = 2048
    """Tokens whose router inputs are clustered; 0: none."""
    examples: int = 8
    """Tokens shown for each expert."""


def inspect(checkpoints: Sequence[Path], config: Config, mesh: Mesh, options: Options) -> list[dict[str, Any]]:
    """What there is to say of each checkpoint; empty on all ranks but the first. config: the model's, and how to run it.
    Raises UserError."""
    watched = Watched(config, mesh, options)
    results: list[dict[str, Any]] = []
    before: Tally | None = None
    for checkpoint in checkpoints:
        tally = watched.tally(kept_routing=ROUTING_TOKENS if len(checkpoints) > 1 else 0)
        watched.load(checkpoint)
        losses = watched.go_through(tally)
        result = {"checkpoint": str(checkpoint), "step": int(read_state(checkpoint, "checkpoint")["step"])}
        result |= {"text": options.text or "validation", **losses._asdict()}
        found = summary(watched, tally, before)
        if mesh.first:
            results.append(result | found)
        before = tally
    return results


class Watched:
    """A model whose layers report to a tally, and the text that goes through it."""

    def __init__(self, config: Config, mesh: Mesh, options: Options) -> None:
        """Raises UserError."""
        self.config, self.mesh, self.options = config, mesh, options
        self.prepared = from_first(lambda: prepare(config, options.text))
        split = "text" if options.text else "validation"
        self.stream = TokenStream(self.prepared.folder, self.prepared.manifest, split)
        seq_len, end = config.training.seq_len, self.prepared.tokenizer.eos
        self.windows = Windows(self.stream, seq_len, end, config.model.document_mask)
        self.sequences = min(options.sequences or len(self.windows), len(self.windows))
        self.model = build_model(config, self.prepared.tokenizer.vocab_size, mesh)
        self.runner = build_runner(self.model, config, mesh)
        if self.model.moe_layers == 0:
            raise UserError("the model has no MoE layer; there is nothing to inspect")
        self.recorder = Recorder()
        record(self.model, self.recorder, inputs=options.cluster_tokens > 0)

    def tally(self, **more: Any) -> Tally:
        """An empty one."""
        moe, stream = self.config.model.moe, self.stream
        return Tally(
            layers=self.model.moe_layers,
            experts=moe.experts,
            domains=len(self.prepared.manifest.domains),
            seq_len=self.windows.seq_len,
            device=self.mesh.device,
            domain_at=lambda places: stream.domains[stream.documents_at(places)],
            sampled=sampled_places(self.sequences * self.windows.seq_len, self.options.cluster_tokens),
            examples=self.options.examples,
            **more,
        )

    def load(self, checkpoint: Path) -> None:
        """Takes a checkpoint's weights. Raises UserError for a damaged one, and one of another model."""
        state = read_state(checkpoint, "checkpoint")
        different = changed_keys(state["config"]["model"], self.config.model_dump(mode="json")["model"], "model.")
        if different:
            raise UserError(f"{checkpoint}: a checkpoint of another model: {different[0]} differs")
        problem = damage(checkpoint, self.mesh)
        if problem is not None:
            raise UserError(f"{checkpoint} is damaged: {problem}")
        load_checkpoint(checkpoint, self.model, None)

    @torch.no_grad()
    def go_through(self, tally: Tally) -> Losses:
        """Streams the text through the model; the tally fills and is summed over ranks."""
        mesh = self.mesh
        self.recorder.tally = tally
        part = DataRank(micro_batch_size(self.config, mesh.degrees), mesh.data_rank, mesh.degrees.data)
        sums = LossSums()
        batches = validation_batches(self.windows, self.sequences, part)
        quiet = not (mesh.first and sys.stderr.isatty())
        count, console = -(-self.sequences // (part.size * part.ranks)), Console(stderr=True)
        for batch in track(batches, "Inspecting", count, console=console, transient=True, disable=quiet):
            found = evaluate_batch(self.runner, batch, mesh)
            sums.add(found, self.prepared.tokenizer)
            tally.add_pairs(found.routing_pairs, found.labelled)
        tally.sum_over_ranks(mesh)
        return sums.over_ranks(mesh)


def sampled_places(count: int, wanted: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Which of `count` positions of the text are clustered: the same ones on any number of ranks and in any batches."""
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[permuted(np.arange(min(wanted, count), dtype=np.int64), count, key=0)] = True
    return chosen


class Part(NamedTuple):
    """What one rank has that does not simply add up."""

    responses: dict[int, tuple[Tensor, Tensor]]
    samples: dict[int, Sample]
    best_gates: Tensor
    best_places: Tensor


def summary(watched: Watched, tally: Tally, before: Tally | None) -> dict[str, Any]:
    """Every measure: by layer, by pair of layers, and means. Collective; the result counts on the first rank."""
    model, mesh, prepared, stream = watched.model, watched.mesh, watched.prepared, watched.stream
    responses = {moe.layer: response(moe.router.weight, moe.experts.gate_up) for moe in model.moe_modules()}
    persistent = None if before is None else unchanged_choices(before, tally)
    if persistent is not None:
        persistent = all_sum(all_sum(persistent.to(mesh.device), mesh.ranks.data), mesh.pp)
    own = Part(responses, tally.samples, tally.best_gates.cpu(), tally.best_places.cpu())
    parts = [own]
    if mesh.degrees.world > 1:
        everyone: list[Any] = [None] * mesh.degrees.world
        dist.gather_object(own, everyone if mesh.first else None)
        parts = everyone
    if not mesh.first:
        return {}
    samples = merged([part.samples for part in parts])
    gates = torch.cat([part.best_gates for part in parts], dim=2)
    places = torch.cat([part.best_places for part in parts], dim=2)
    examples = [unique_largest(g, p, tally.examples) for g, p in zip(gates, places, strict=True)]
    layers = []
    for layer in range(tally.layers):
        found = layer_measures(tally, layer, model)
        matrix, eps = next(part.responses[layer] for part in parts if layer in part.responses)
        found |= {"erc_eps": rounded(eps), "erc_M": rounded(matrix)}
        if layer in samples:
            found |= cluster_measures(*samples[layer])
        if persistent is not None:
            first, kept, count = persistent[layer].tolist()
            found |= {"persistence_top1": first / max(count, 1), "persistence_topk": kept / max(count, 1)}
        if tally.examples:
            found["examples"] = [
                [context(stream, prepared.tokenizer, place) for place in row if place >= 0]
                for row in examples[layer].tolist()
            ]
        layers.append(found)
    pairs = [pair_measures(tally, pair) for pair in range(tally.layers - 1)]
    if samples:
        shares = cluster_agreement([samples[layer][0] for layer in range(tally.layers)], tally.experts)
        for found, share in zip(pairs, shares, strict=True):
            found["cluster_agreement"] = share
    return {
        "domains": [name or "none" for name in prepared.manifest.domains],
        "summary": means([*layers]) | means(pairs),
        "layers": layers,
        "pairs": pairs,
    }


def layer_measures(tally: Tally, layer: int, model: Transformer) -> dict[str, Any]:
    moe = model.settings.moe
    counts = tally.counts[layer].cpu()
    tokens = max(int(counts.sum()) // moe.top_k, 1)
    sums = dict(zip(PER_TOKEN, (tally.sums[layer] / tokens).tolist(), strict=True))
    mean_gates = (tally.gates[layer] / tokens).cpu()
    return {
        "load": counts.tolist(),
        "load_variation": load_variation(counts).item(),
        "max_vio_global": max_vio(counts).item(),
        "dead": dead_share(counts).item(),
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
    """Of one layer and the next."""
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
    shares = torch.bincount(top1).double() / len(top1)
    found = {"knn_overlap": knn_overlap(inputs, top1), "knn_overlap_chance": 1.0 - shares.square().sum().item()}
    if 1 < int((shares > 0).sum()) < len(top1):
        found["silhouette"] = routing_silhouette(inputs, top1)
    return found


def response(router_weight: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """erc's M, rows divided by their diagonal, and eps, of a layer's whole weights."""
    router, gate = whole(router_weight).detach(), whole(gate_up).detach()[:, 0]
    return expert_response(router, gate).cpu(), coupling_noise_bound(router).cpu()


def unique_largest(gates: Tensor, places: Tensor, count: int) -> Tensor:
    """The places (E, count) of the largest gates when ranks that share tokens report each of them; -1 where there is none."""
    order = places.argsort(dim=1, stable=True)
    gates, places = gates.gather(1, order), places.gather(1, order)
    again = torch.zeros_like(places, dtype=torch.bool)
    again[:, 1:] = places[:, 1:] == places[:, :-1]
    gates, places = gates.masked_fill(again, -torch.inf), places.masked_fill(again, -1)
    return largest(gates, places, count)[1]


def context(stream: TokenStream, tokenizer: Tokenizer, place: int) -> list[str]:
    """What stands before a token in its document, and the token, as text."""
    start = max(place - CONTEXT, int(stream.starts[stream.documents_at(np.array([place]))[0]]))
    ids = stream.read(start, place + 1).tolist()
    return [tokenizer.decode(ids[:-1]), tokenizer.decode(ids[-1:])]


def means(found: list[dict[str, Any]]) -> dict[str, float]:
    """Of every number that all of them have."""
    names = [name for name, value in found[0].items() if isinstance(value, int | float)] if found else []
    return {name: sum(one[name] for one in found) / len(found) for name in names if all(name in one for one in found)}


def rounded(x: Tensor) -> Any:
    """A matrix for a file."""

    def short(value: Any) -> Any:
        return [short(v) for v in value] if isinstance(value, list) else float(f"{value:.{DIGITS}g}")

    return short(x.double().tolist())


def write_results(checkpoints: Sequence[Path], results: list[dict[str, Any]], text: str, output: Path | None) -> None:
    """Prints the result of each checkpoint as a table, and writes it as JSON, completely or not at all.

    output: a file, or a directory for several checkpoints; None: `inspect/` of the run directory. results: empty on ranks
    other than 0, which write nothing.
    """
    for checkpoint, result in zip(checkpoints, results, strict=bool(results)):
        path = place_of(checkpoint, text)
        if output:
            path = output / path.name if len(checkpoints) > 1 else output
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}")
        fresh.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
        fresh.replace(path)
        print_table(table(result))
        print(path)


def table(result: dict[str, Any]) -> Table:
    """A row a layer; what belongs to a pair stands with the earlier layer."""
    title = f"{result['checkpoint']}: loss {result['loss']:.4f} on {result['tokens']:,} tokens of {result['text']}"
    rows = [*map(dict, result["layers"]), result["summary"]]
    for row, pair in zip(rows, result["pairs"], strict=False):
        row |= pair
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    found = Table(title=title)
    for title in ("layer", *(COLUMNS[name] for name in names)):
        found.add_column(title, justify="right")
    for number, row in enumerate(rows):
        label = str(number) if number < len(result["layers"]) else "mean"
        found.add_row(label, *(f"{row[name]:.3g}" if name in row else "" for name in names))
    return found


def place_of(checkpoint: Path, text: str) -> Path:
    """Where the result of a checkpoint of a run directory is kept."""
    name = f"{checkpoint.name}-{UNSAFE.sub('_', text)}" if text else checkpoint.name
    return checkpoint.parent.parent / "inspect" / f"{name}.json"


def chosen_checkpoints(paths: Sequence[Path], every: bool) -> list[Path]:
    """Checkpoints as they are, and of run directories the newest, or every one. Raises UserError."""
    found = []
    for path in paths:
        steps = saved_steps(path / "checkpoints")
        if steps:
            found += [path / "checkpoints" / f"step-{step:08d}" for step in (steps if every else steps[-1:])]
        elif (path / STATE_FILE).exists():
            found.append(path)
        else:
            raise UserError(f"{path}: neither a checkpoint nor a run directory with one")
    return found


def from_checkpoint(paths: Sequence[Path], every: bool, words: Sequence[str], world: int) -> tuple[list[Path], Config]:
    """The checkpoints that paths mean, and their model's configuration, to be run here. words: `--section.key=value`."""
    checkpoints = chosen_checkpoints(paths, every)
    state = read_state(checkpoints[0], "checkpoint")
    reset = ("parallelism", "compile", "activation_checkpoint")
    return checkpoints, saved_config(state["config"], str(checkpoints[0]), words, world_size=world, reset=reset)
