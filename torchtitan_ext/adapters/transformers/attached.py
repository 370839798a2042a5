"""`attach(model, regularizers)`: the loss terms in a Mixture-of-Experts model of Transformers, through hooks.

T tokens of a micro-batch (B rows of S), L MoE layers, E experts, K chosen experts, N terms, M measures.
"""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_ext.adapters.transformers import evaluate, experts, inspection, record, structure, tokens
from torchtitan_ext.adapters.transformers.sums import StepSums, empty_sums
from torchtitan_ext.carry import Carry
from torchtitan_ext.collectives import Group, Ranks, all_sum
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.ops.routing import labelled_counts
from torchtitan_ext.terms import REGISTRY, LayerView, ModelFacts, Setting, Term, Terms, Tokens, build_terms
from torchtitan_ext.terms.base import matched

log = logging.getLogger(__name__)

Regularizers = Mapping[str, Any]


def attach(
    model: Any,
    regularizers: Regularizers,
    *,
    measure: Sequence[str] = (),
    seed: int = 0,
    group: Group | None = None,
    score: str | None = None,
    add_to_loss: bool = True,
    evaluation: bool = True,
) -> "Attached":
    """Adds loss terms to a causal language model of Transformers; undo it with `detach()`.

    model: a `...ForCausalLM` with MoE layers, or one wrapped by PEFT or DistributedDataParallel. regularizers: by term name,
    the weight or a table of options, as in `[regularizers.NAME]`. measure: terms to compute at weight 0 too. seed: of the draws
    of erc and of sp's estimators. group: the ranks that hold the other tokens of a micro-batch, for terms of scope "global"
    and cp's "transition"; all ranks when not given. score: "softmax" or "sigmoid", for model types that the adapter does not
    know. add_to_loss: False leaves `outputs.loss` as it is, for trainers that call `penalty`. evaluation: False adds nothing
    while the model is in eval mode. Raises ValueError for a model or options that do not fit.
    """
    return Attached(model, regularizers, measure, seed, group, score, add_to_loss, evaluation)


class Attached:
    """The loss terms of one model. Made by `attach`."""

    def __init__(
        self,
        model: Any,
        regularizers: Regularizers,
        measure: Sequence[str],
        seed: int,
        group: Group | None,
        score: str | None,
        add_to_loss: bool,
        evaluation: bool,
    ) -> None:
        experts.register()
        self.model: Any = structure.causal_lm(model)
        self.add_to_loss, self.evaluation = add_to_loss, evaluation
        self.structure = structure.find_structure(self.model, score)
        self.score = self.structure.score
        if any(experts.watched(layer.experts) for layer in self.structure.layers):
            raise ValueError("attach: the model has terms attached already; call detach() of those first")
        if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.group.WORLD
        self.group = group
        terms = self._build(regularizers, measure, seed)
        per_sequence = [term for term in terms.terms if getattr(term.options, "scope", None) == "sequence"]
        self.terms = Terms([term for term in terms.terms if term not in per_sequence])
        self.sequence_terms = Terms(per_sequence)
        self._step: int | None = None
        self._record: record.Record | None = None
        self._logits: dict[int, tuple[Tensor, Any]] = {}
        self._sums: StepSums | None = None
        self._positions: Tensor | None = None
        self._checked = False
        self._hooks: list[Any] = []
        self._install()

    def _build(self, regularizers: Regularizers, measure: Sequence[str], seed: int) -> Terms:
        found = self.structure
        unknown = [name for name in [*regularizers, *measure] if name not in REGISTRY]
        if unknown:
            raise ValueError(f"attach: there is no term {unknown[0]!r}; there are {', '.join(REGISTRY)}")
        setting = Setting(found.top_k, found.hidden_dim, seed, Ranks(data=self.group))
        terms = build_terms(regularizers, setting, measure)
        facts = ModelFacts(found.experts, found.top_k, len(found.layers))
        for term in terms.terms:
            for option, problem in term.problems(term.options, facts):
                raise ValueError(f"attach: {term.name}.{option}: {problem}")
            if matched(term.options):
                raise ValueError(
                    f"attach: {term.name}.match_lb is for our own trainer; set the weight to what it should be"
                )
            needs = term.needs.activations or term.needs.outputs
            if needs and type(term).per_token is Term.per_token:
                raise ValueError(f"attach: term {term.name} does not define `per_token`")
        if "lb" in terms.names and getattr(self.model.config, "output_router_logits", False):
            log.warning(
                "The model adds Transformers' own router loss too: set output_router_logits=False where lb is attached"
            )
        return terms

    def _install(self) -> None:
        for layer in self.structure.layers:
            experts.watch(layer.experts, self._begin)
            self._hooks.append(layer.router.register_forward_hook(self._routed))
        self._numbers = {id(layer.experts): number for number, layer in enumerate(self.structure.layers)}
        self._routers = {id(layer.router): number for number, layer in enumerate(self.structure.layers)}
        self.model.set_experts_implementation(structure.PREFIX + self.structure.implementation)
        self._hooks.append(self.model.register_forward_pre_hook(self._start, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._finish, with_kwargs=True))

    def __deepcopy__(self, memo: Any) -> "Attached":
        """Itself: a copy of the model has copies of the hooks, which do nothing there."""
        return self

    def detach(self) -> None:
        """Removes everything from the model; it is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for layer in self.structure.layers:
            experts.unwatch(layer.experts)
        if self.model.config.get_text_config()._experts_implementation.startswith(structure.PREFIX):
            self.model.set_experts_implementation(self.structure.implementation)
        self._record = None

    @property
    def step(self) -> int | None:
        """The optimizer step, 1 is the first; set it before every step. Warm-ups and draws follow it, and `metrics` covers
        it. None, the default: `metrics` covers one forward pass."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        if step != self._step:
            self._sums = None
        self._step = int(step)

    # What runs during a forward pass of the model.

    def _start(self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if model is not self.model:
            return
        gradients = torch.is_grad_enabled()
        labels = self._given(arguments, options).get("labels") is not None
        if gradients or labels:
            self._record = record.Record(len(self.structure.layers), gradients)
            self._require_step()
        elif self._record is not None and self._record.open:  # of a pass that ended with an exception
            self._record = None

    def _require_step(self) -> None:
        for term in (*self.terms.terms, *self.sequence_terms.terms):
            draws = term.name == "erc" or getattr(term.options, "method", "exact") != "exact"
            if self._step is None and (draws or term.options.warmup_steps):
                what = "draws random numbers" if draws else "has warmup_steps"
                raise RuntimeError(
                    f"attach: {term.name} {what} by step: set `attached.step = n` before every step, from 1"
                )

    def _given(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward by name."""
        if not arguments:
            return options
        names = list(inspect.signature(type(self.model).forward).parameters)[1:]
        return dict(zip(names, arguments, strict=False)) | options

    def _layer_tokens(self, count: int, like: Tensor) -> Tokens:
        """Inside a layer all tokens are one row with weights of 1: labels and rows are not known there."""
        rank = dist.get_rank(self.group) if self.group is not None else 0
        device = like.device
        return Tokens(
            torch.ones(1, count, dtype=accumulation_dtype(like.dtype), device=device),
            torch.full((1,), rank, device=device),
            torch.tensor(self._step or 1, device=device),
            torch.arange(count, device=device),
        )

    def _watching(self) -> bool:
        """Whether the layers are observed now: in a forward pass that is recorded, or in its recomputation."""
        if self._record is None or not self._record.open:
            return torch.is_grad_enabled()
        if self._record.gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                "attach: reentrant activation checkpointing would give wrong gradients; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return True

    def _routed(self, router: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG002 - a hook's arguments
        number = self._routers.get(id(router))
        if number is None or not self._watching():
            return
        logits = output[self.structure.logits_index]
        logits_TE = logits.reshape(-1, logits.shape[-1])
        layer = self.structure.layers[number]
        # Read here: an adapter of PEFT on the router's weight is in place only while the router runs.
        self._logits[number] = logits_TE, layer.router_weight

    def _begin(self, module: nn.Module, ids_TK: Tensor, gates_TK: Tensor) -> record.LayerObserver | None:
        number = self._numbers[id(module)]
        if not self._watching():
            return None
        logits_TE, router_weight_ED = self._logits.pop(number)
        layer_tokens = self._layer_tokens(len(ids_TK), logits_TE)
        with torch.no_grad():
            scores_TE = record.scores_of(logits_TE, self.score or "softmax")
        weights_T = layer_tokens.weights.flatten()
        view = LayerView(
            number,
            layer_tokens,
            logits_TE,
            scores_TE,
            ids_TK,
            gates_TK,
            rows_TK=ids_TK,
            weights_T=weights_T,
            counts_E=labelled_counts(ids_TK, logits_TE.shape[1], weights_T),
        )
        layer = self.structure.layers[number]
        responses = record.probe_responses(self.terms, layer, number, router_weight_ED, layer_tokens)
        recorded = self._record if self._record is not None and self._record.open else None
        return record.LayerObserver(self.terms, view, recorded, responses)

    def _finish(self, model: nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> Any:
        if model is not self.model or self._record is None or not self._record.open:
            return None
        self._record.open = False
        given = self._given(arguments, options)
        self._positions = given.get("position_ids")
        shifted = given.get("shift_labels")
        labels = given.get("labels") if shifted is None else shifted
        if not self.add_to_loss or labels is None:
            return None
        if not hasattr(output, "loss"):
            raise RuntimeError("attach: the terms need a forward pass with return_dict=True")
        if output.loss is None:  # the caller computes the loss himself, and asks for `penalty`
            return None
        ignored = given.get("ignore_index", tokens.IGNORED)
        labelled = tokens.labelled(labels, shifted is not None, ignored)
        extra = self._penalty(labelled, given.get("num_items_in_batch"))
        if self.evaluation or self.model.training:
            output.loss = output.loss + extra.to(output.loss.device)
        return output

    # What is computed after it.

    def penalty(self, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The weighted sum of the terms of the last forward pass, for trainers that do not use `outputs.loss`.

        labels: (B, S) as for the model, not shifted. num_items_in_batch: the labelled tokens of all micro-batches and ranks of
        the step; None: those of `labels`. Raises RuntimeError if no forward pass is left, or its loss has the terms already.
        """
        return self._penalty(tokens.labelled(labels), num_items_in_batch)

    def _penalty(self, labelled_BS: Tensor, count: Any) -> Tensor:
        if self._record is None:
            raise RuntimeError(
                "attach: no forward pass is left to compute terms of; outputs.loss has them already unless attach() was "
                "called with add_to_loss=False"
            )
        layers = self._record.complete()
        self._record = None
        if labelled_BS.numel() != len(layers[0].topk_ids_TK):
            raise RuntimeError(
                f"attach: {labelled_BS.numel()} labels, but the MoE layers saw {len(layers[0].topk_ids_TK)} tokens"
            )
        if not self._checked:
            kind = self.model.config.get_text_config().model_type
            self.score, self._checked = evaluate.checked_score(layers, self.score, kind), True
        dtype = accumulation_dtype(layers[0].logits_TE.dtype)
        device = layers[0].logits_TE.device
        labelled_BS = labelled_BS.to(device)
        weights_BS = tokens.token_weights(labelled_BS, count, dtype)
        flat = self._layer_tokens(labelled_BS.numel(), weights_BS)._replace(
            weights=weights_BS.reshape(1, -1), fraction=cast(float, weights_BS.sum())
        )
        by_layer, carry = evaluate.evaluate(self.terms, layers, flat, None, cast(str, self.score))
        values, names = [by_layer], [*self.terms.names]
        extra = self.terms.objective(by_layer.sum(0), self._factors(self.terms))
        if self.sequence_terms.names:
            found = tokens.documents(self._positions, *weights_BS.shape)
            sequences = evaluate.sequence_tokens(weights_BS, found, flat.step)
            by_layer, _ = evaluate.evaluate(self.sequence_terms, layers, sequences, found, cast(str, self.score))
            extra = extra + self.sequence_terms.objective(by_layer.sum(0), self._factors(self.sequence_terms))
            values.append(by_layer)
            names += self.sequence_terms.names
        self._add(names, torch.cat(values, 1).detach(), carry, weights_BS)
        return extra

    def _factors(self, terms: Terms) -> dict[str, float]:
        return terms.factors(self._step, {}) if self._step is not None else {}

    def _add(self, names: list[str], values_LN: Tensor, carry: Carry, weights_BS: Tensor) -> None:
        training = bool(self.model.training)
        if self._sums is None or self._step is None or self._sums.training != training:
            self._sums = empty_sums(names, self.terms.measures, training, values_LN, carry)
        self._sums.add(values_LN, carry, weights_BS.sum().detach())

    def metrics(self, per_layer: bool = False, group: Group | None = None) -> dict[str, float]:
        """Terms and routing measures of the last step (or forward pass, if `step` is not set): means over labelled tokens.

        Passes in eval mode are not mixed with those in training mode: after an evaluation these are its values.

        `reg/NAME` are unweighted sums over layers, `moe/NAME` means over layers. per_layer: with `layer-0/reg/NAME` and so on.
        group: sums over these ranks, which must all call it. Empty before the first labelled forward pass.
        """
        return {} if self._sums is None else self._sums.metrics(per_layer, group)

    def assignments(self, group: Group | None = None) -> Tensor:
        """Assignments of labelled tokens to experts in the last step (or forward pass, if `step` is not set).

        (L, E) int64 for L MoE layers and E experts; by it a balancing bias is moved. group: as for `metrics`. Raises
        RuntimeError before the first labelled forward pass."""
        if self._sums is None:
            raise RuntimeError("attach: no forward pass with labels has been run in this step, so nothing is counted")
        return all_sum(self._sums.counts_LE, group)

    @torch.no_grad()
    def inspect(self, batches: Iterable[Mapping[str, Any]], step: int = 0) -> dict[str, Any]:
        """The measures of `titan-moe inspect` on these batches, in the form that `titan-moe report` reads.

        batches: arguments of the model, with labels. step: written into the result. The model runs in eval mode; terms and
        `metrics()` are left as they are. Raises ValueError without a labelled token."""
        found = self.structure
        measures = inspection.Measures(len(found.layers), found.experts, found.top_k)
        kept = {name: getattr(self, name) for name in ("terms", "sequence_terms", "_sums", "add_to_loss")}
        training, loss, count = self.model.training, 0.0, 0
        self.terms, self.sequence_terms, self.add_to_loss = Terms([measures]), Terms(), True
        self._sums = None
        try:
            self.model.eval()
            for batch in batches:
                out = self.model(**{"use_cache": False, **batch})
                here = int(tokens.labelled(batch["labels"]).sum())
                loss, count = loss + float(out.loss) * here if here else loss, count + here
        finally:
            self.model.train(training)
            for name, value in kept.items():
                setattr(self, name, value)
        if count == 0:
            raise ValueError("inspect: the batches have no labelled token")
        losses = {"loss": loss / count, "tokens": count}
        return measures.result(found.layers, found.hidden_dim, step, losses)

    def objective(self, metrics: Mapping[str, float]) -> float:
        """The weighted sum of the terms in `metrics()`: what they add to the loss."""
        terms = (self.terms, self.sequence_terms)
        factors = self._factors(self.terms) | self._factors(self.sequence_terms)
        return sum(
            term.options.weight * factors.get(term.name, 1.0) * metrics[f"reg/{term.name}"]
            for one in terms
            for term in one.terms
        )
