"""What MoE layers, loss and metrics of one process share: the terms, and what the layers saw in a forward pass.

T tokens of a microbatch on this rank (B sequences of S), E experts, K chosen experts, L MoE layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from torchtitan_ext.carry import Carry, add_carry, empty_carry
from torchtitan_ext.collectives import Ranks, all_sum
from torchtitan_ext.metrics import dead_fraction, max_vio
from torchtitan_ext.ops.routing import labelled_counts, normalize_scores
from torchtitan_ext.terms import REGISTRY, LayerView, ModelFacts, Setting, TermOptions, Terms, Tokens, build_terms
from torchtitan_ext.terms.orthogonality import Orthogonality, orthogonality_of_gram
from torchtitan_ext.terms.specialization import Grams

NAME = "torchtitan_ext.adapters.torchtitan.losses"
SUPPORTED = ("lb", "z", "sp", "cp", "o", "v")


class Seen(NamedTuple):
    """What one MoE layer saw in one forward pass. Small enough to keep where the layer's activations are recomputed."""

    logits_TE: Tensor
    score: str
    """The function that makes scores of logits: softmax or sigmoid."""
    topk_ids_TK: Tensor
    gates_TK: Tensor
    hidden_dim: int
    """Hidden width of an expert."""
    gram_z_TKK: Tensor | None
    """Inner products of the activations of each token's experts, if sp is computed."""
    gram_y_TKK: Tensor | None
    """The same of the experts' outputs, if o is computed."""


class Record:
    """Terms and their sums. There is one, `RECORD`: TorchTitan trains one model in a process."""

    def __init__(self) -> None:
        self.configure({}, ())

    def configure(self, terms: Mapping[str, Any], measure: Sequence[str]) -> None:
        """Takes the options of the override and forgets all else. Raises ValueError for what is unknown or not supported."""
        for name in (*terms, *measure):
            if name not in SUPPORTED:
                raise ValueError(f"{NAME}: {_unsupported(name)}")
        self.options = {name: _options(name, given) for name, given in terms.items()}
        self.measure = tuple(measure)
        self.ranks = Ranks()
        self.step = 1
        self._terms: Terms | None = None
        self.layers: list[Any] = []
        """The model's MoE layers in their order, which add themselves. Each has `seen`, set by a forward pass."""
        self._total: Carry | None = None
        self._cross_entropy: Tensor | None = None

    def weighted(self, name: str) -> bool | None:
        """Whether a term has a weight; None if it is not even measured."""
        if name in self.options and self.options[name].weight > 0:
            return True
        return False if name in self.measure else None

    def take(self) -> list[Seen]:
        """What the layers saw in the last forward pass; they forget it."""
        found = [layer.seen for layer in self.layers if layer.seen is not None]
        for layer in self.layers:
            layer.seen = None
        return found

    def begin(self, step: int) -> None:
        """Called before the first forward pass of an optimizer step; 1 is the first."""
        self.step, self._total, self._cross_entropy = step, None, None
        if self.take():
            raise ValueError(f"{NAME}: a forward pass in training mode was not followed by a call of the loss")

    def objective(self, labels: Tensor, weights: Tensor, cross_entropy: Tensor) -> Tensor:
        """The weighted terms of the forward pass since the last call.

        labels: (B, S), to know the sequences. weights: (B, S), 1 / (labelled tokens of the global batch) on labelled tokens, 0
        elsewhere. cross_entropy: this rank's part of it, to be logged."""
        layers = self.take()
        if not layers:
            raise ValueError(f"{NAME}: the model has no MoE layer that the override has replaced")
        if self._terms is None:
            self._terms = self._build(layers)
        terms, (batch, length), device = self._terms, labels.shape, weights.device
        tokens = Tokens(
            weights,
            sequences=torch.arange(batch, device=device),
            step=torch.tensor(self.step),
            sequence_positions=torch.arange(length, device=device),
        )
        experts = layers[0].logits_TE.shape[1]
        carry = empty_carry(
            len(terms.terms),
            labels.numel(),
            len(layers),
            experts,
            torch.float32,
            device,
            terms.carried_width(experts),
            len(terms.measures),
            terms.sums_width(experts),
        )
        variant = next((term.options.variant for term in terms.terms if isinstance(term, Orthogonality)), "paper")
        for number, seen in enumerate(layers):
            view, observed = _view(number, seen, tokens, variant)
            carry = terms.add(view, observed, None, carry)
        carry = terms.complete(carry)
        self._total = add_carry(self._total, carry)
        detached = cross_entropy.detach().float()
        self._cross_entropy = detached if self._cross_entropy is None else self._cross_entropy + detached
        return terms.objective(carry.terms, terms.factors(self.step, {}))

    def _build(self, layers: Sequence[Seen]) -> Terms:
        """The terms, at the first forward pass, when the sizes of the layers and the process groups are known."""
        sizes = {(seen.logits_TE.shape[1], seen.topk_ids_TK.shape[1], seen.hidden_dim) for seen in layers}
        if len(sizes) > 1:
            raise ValueError(f"{NAME}: MoE layers differ in (experts, top_k, hidden_dim): {sorted(sizes)}")
        experts, top_k, hidden_dim = sizes.pop()
        terms = build_terms(self.options, Setting(top_k, hidden_dim, ranks=self.ranks), self.measure)
        for term in terms.terms:
            for option, problem in type(term).problems(term.options, ModelFacts(experts, top_k, len(layers))):
                raise ValueError(f"{NAME}: {term.name}.{option}: {problem}")
        return terms

    def metrics(self) -> dict[str, float]:
        """Terms and measures of the current step, over all ranks; empty before the first loss. A collective."""
        terms, total, cross_entropy = self._terms, self._total, self._cross_entropy
        if terms is None or total is None or cross_entropy is None:
            return {}
        numbers = torch.cat([cross_entropy.reshape(1), total.terms, total.sums.flatten()])
        numbers, counts = all_sum(numbers, self.ranks.data), all_sum(total.counts, self.ranks.data)
        names = [f"reg/{name}" for name in terms.names]
        values = dict(zip(["loss_metrics/cross_entropy", *names], numbers.tolist(), strict=False))
        measures = numbers[1 + len(names) :].view(-1, len(terms.measures)).mean(0).tolist()
        values |= {f"moe/{name}": value for name, value in zip(terms.measures, measures, strict=True)}
        return values | {
            "moe/max_vio": float(max_vio(counts).mean()),
            "moe/dead": float(dead_fraction(counts).mean()),
        }


def _view(number: int, seen: Seen, tokens: Tokens, variant: str) -> tuple[LayerView, dict[str, Any]]:
    """What terms see of a layer, and what sp and o have observed. variant: of o."""
    logits_TE, weights_T = seen.logits_TE, tokens.weights.flatten()
    if seen.score == "softmax":
        scores_TE = logits_TE.softmax(-1)
    else:
        scores_TE = normalize_scores(logits_TE.sigmoid(), F.logsigmoid(logits_TE))
    ids_TK = seen.topk_ids_TK
    view = LayerView(
        number,
        tokens,
        logits_TE=logits_TE,
        scores_TE=scores_TE,
        topk_ids_TK=ids_TK,
        gates_TK=seen.gates_TK,
        rows_TK=torch.arange(ids_TK.numel(), device=ids_TK.device).view_as(ids_TK),
        weights_T=weights_T,
        counts_E=labelled_counts(ids_TK, logits_TE.shape[1], weights_T),
    )
    observed: dict[str, Any] = {}
    if seen.gram_z_TKK is not None:
        observed["sp"] = Grams(seen.gram_z_TKK, weights_T)
    if seen.gram_y_TKK is not None:
        observed["o"] = orthogonality_of_gram(seen.gram_y_TKK, variant)
    return view, observed


def _unsupported(name: str) -> str:
    if name == "erc":
        return (
            "erc multiplies each expert's gate weights by noisy router rows, which this adapter does not do; remove erc"
        )
    return f"{name!r} is no term; choose from {', '.join(SUPPORTED)} and measure"


def _options(name: str, given: Any) -> TermOptions:
    table = {"weight": float(given)} if isinstance(given, int | float) and not isinstance(given, bool) else given
    try:
        options = REGISTRY[name].Options.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (name, *first["loc"]))
        raise ValueError(f"{NAME}: {place} = {first['input']!r}: {first['msg']}") from None
    method = getattr(options, "method", "exact")
    if method != "exact":
        raise ValueError(
            f"{NAME}: {name}.method = {method!r}: its random numbers are keyed by sequences, which TorchTitan does not "
            "number; only 'exact' is supported"
        )
    if getattr(options, "match_lb", False):
        raise ValueError(
            f"{NAME}: {name}.match_lb: its scale must be saved with the run, which TorchTitan's checkpoints do not do; set "
            "the weight instead"
        )
    return options


RECORD = Record()
