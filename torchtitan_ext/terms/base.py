"""What a loss term is: a name, options, what it needs of an MoE layer, its value there, and the bytes that it sends.

Each regularizer is one subclass of `Term` in one file, registered by `@register`. Configuration tables, `--help`, the JSON
schema, checks, metrics, plots and `titan-moe plan` read all that they need from it.

Term files import torch inside functions, not at the top: the command line reads their options and must not wait for torch.

Shapes: T tokens of a microbatch (B sequences of S), E experts, K chosen experts, R routed rows, F expert hidden width,
D model width, P probes, N selected tokens, n numbers carried per token, X any width, () a scalar tensor.

Home order: the rows of this rank's own tokens, sorted by expert over all experts. On one rank, rows at the experts are in home
order; under expert parallelism they are other tokens' rows, until `ExpertRows.home` brings them to their tokens' ranks.

Probe: a vector that a term multiplies by every expert's SwiGLU gate matrix (erc: noisy rows of the router's weight).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor

    from torchtitan_ext.collectives import Ranks
    from torchtitan_ext.ops.router import RouterSums

COUNT_BYTES = 8  # int64

Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class TermOptions(BaseModel):
    """The options of a term: its table `[regularizers.NAME]`. The docstring under a field is its help text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    weight: Weight = 0.0
    """Weight in the objective."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the weight rises linearly from 0; 0: constant from the first step."""


class MatchedOptions(TermOptions):
    """Options of a term that can be scaled to the size of lb."""

    match_lb: bool = False
    """Multiply by the power of ten that brings the term to the size of lb, computed once, at the first step."""


def matched(options: TermOptions) -> bool:
    """Whether a term with these options has a weight and is scaled to the size of lb."""
    return isinstance(options, MatchedOptions) and options.match_lb and options.weight > 0


class ModelFacts(NamedTuple):
    """What a term's checks may depend on."""

    experts: int
    top_k: int
    moe_layers: int


class Setting(NamedTuple):
    """What a term may know of the run beside its options."""

    top_k: int
    hidden_dim: int = 0
    """Hidden width F of an expert, over all tensor-parallel ranks."""
    seed: int = 0
    ranks: Ranks | None = None
    """The process groups over whose tokens terms of a wider scope are formed; None: there is one rank."""


class Tokens(NamedTuple):
    """The tokens of a microbatch on this rank: B sequences of S tokens."""

    weights: Tensor
    """(B, S), 1 / (labelled tokens of the global batch) on labelled tokens and 0 elsewhere; at least float32."""
    sequences: Tensor
    """(B,) int64, index of each sequence in the global batch: random draws per token are keyed by it."""
    step: Tensor
    """() int64, the optimizer step, 1 is the first: every random draw is keyed by it."""
    sequence_positions: Tensor
    """(S,) int64, position of each token in its full sequence: random draws per token are keyed by it."""
    fraction: float = 1.0
    """Factor on terms without a sum over tokens (erc). The factors of a step sum to 1 over ranks and microbatches; 0: skip."""


class LayerView(NamedTuple):
    """What a term sees of one MoE layer and one microbatch."""

    layer: int
    """Index among the MoE layers, from 0."""
    tokens: Tokens
    logits_TE: Tensor
    """Router logits, at least float32."""
    scores_TE: Tensor
    """Routing scores, normalised to sum to 1."""
    topk_ids_TK: Tensor
    """The chosen experts, balancing bias included; int64."""
    gates_TK: Tensor
    """Gate weights of the chosen experts."""
    rows_TK: Tensor
    """Row of `z_RF` and `y_RD` that belongs to token i and its a-th expert; int64."""
    weights_T: Tensor
    """`tokens.weights`, flat."""
    counts_E: Tensor
    """Assignments of this rank's labelled tokens to experts; int64."""
    z_RF: Tensor | None = None
    """SwiGLU activations, one row per token and chosen expert; None unless a term needs `activations`."""
    y_RD: Tensor | None = None
    """Expert outputs before the gate weight, likewise; None unless a term needs `outputs`."""
    responses_PE: Tensor | None = None
    """`[p, e]`: norm of `W_gate^e probe_p`, `W_gate^e` the SwiGLU gate matrix of expert e; None if this term has no probes."""
    previous: Tensor | None = None
    """(T, n), what this term's `carried` returned at the MoE layer before; zeros at the first."""
    observed: Any = None
    """What this term's `observe` returned."""
    samples: Mapping[str, tuple[Tensor, Tensor]] = {}
    """By term name, what `Term.sample` returned."""
    sums: RouterSums | None = None
    """Functions of the router's logits that a kernel has computed already; None where PyTorch's operations route."""

    def detach(self) -> LayerView:
        """The same values without gradients. `observed` stays as it is: each `Term.observe` detaches it if not `weighted`."""
        import torch

        tensors: dict[str, Any] = {
            name: value.detach() for name, value in self._asdict().items() if isinstance(value, torch.Tensor)
        }
        if self.sums is not None:
            tensors["sums"] = self.sums.detach()
        return self._replace(**tensors)


class Needs(NamedTuple):
    """What a term needs beyond router outputs. What no enabled term needs is neither computed nor sent."""

    activations: bool = False
    """`LayerView.z_RF`: all hidden units of the activations of this rank's tokens."""
    outputs: bool = False
    """`LayerView.y_RD`: the expert outputs of this rank's tokens."""


class Probes(NamedTuple):
    """The probes of all terms, one below the other."""

    vectors_PD: Tensor
    counts: dict[str, int]
    """How many of them belong to each term, in order."""


class ExpertRows(Protocol):
    """Access to rows at the experts, which may be on other ranks. The model's MoE layer implements it."""

    @property
    def local(self) -> bool:
        """Whether all experts are on this rank, so that rows at the experts are in home order."""

    def home(self, x_RX: Tensor) -> Tensor:
        """Rows at the experts to the ranks of their tokens, in home order. Differentiable."""

    def home_subset(self, x_RX: Tensor, rows_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that include those of `rows_NK` (in home order), and the indices (N, K) of those. Differentiable."""

    def to_experts(self, keys_T: Tensor) -> Tensor:
        """A 32-bit integer per token, at each of its rows at the experts: (T,) -> (R,) int64."""

    def sum_hidden(self, x: Tensor) -> Tensor:
        """The sum over tensor-parallel ranks, each of which has summed over its own hidden units."""

    def first_hidden(self, width: int) -> int:
        """Index of this rank's first hidden unit, of `width` on each tensor-parallel rank."""


class Line(NamedTuple):
    """One row of `titan-moe plan`'s traffic table."""

    collective: str
    what: str
    bytes: int
    """Bytes that one rank passes to the collective in a step."""


class Sizes(NamedTuple):
    """What traffic formulas are made of. Bytes are per number."""

    steps: int
    """Microbatches of a rank in a step."""
    tokens: int
    """Tokens of a rank in a microbatch."""
    sequences: int
    """Sequences, or parts of them, of a rank in a microbatch."""
    compute: int
    """Bytes of a number in the compute dtype."""
    exact: int
    """Bytes of a number in the dtype of losses and reductions."""
    forwards: int
    """Forward passes of a block for one backward pass: 2 when activations are recomputed."""
    exchanges: int
    """Times that rows go to experts and home again for one backward pass: 2 when whole blocks are recomputed."""
    moe_layers: int
    """MoE layers of this rank."""
    experts: int
    top_k: int
    hidden: int
    """Hidden units of an expert on this rank."""
    dim: int
    ep: int
    tp: int
    cp: int
    token_ranks: int
    """Ranks, or groups of tensor-parallel ranks, that hold tokens of the same microbatch."""
    all_moe_layers: int
    """MoE layers of the model."""
    last_stage: bool
    """Whether this rank has the last pipeline stage, where terms with `Term.total` are formed."""

    @property
    def rows(self) -> int:
        """Routed rows of this rank's tokens in a microbatch."""
        return self.tokens * self.top_k

    @property
    def layer_passes(self) -> int:
        """Forward passes of MoE layers in a step."""
        return self.steps * self.moe_layers * self.forwards

    def scope_ranks(self, scope: str) -> int:
        """Ranks over which a term of this scope sums."""
        return {"global": self.token_ranks, "sequence": self.cp, "microbatch": 1}[scope]


class Term:
    """A loss term. Subclasses set `name`, `title` and `Options`, define `value`, and override what else they need."""

    name: ClassVar[str]
    """Key of its table `[regularizers.NAME]` and of its metric `reg/NAME`."""
    title: ClassVar[str] = ""
    """In plots; the name when empty."""
    Options: ClassVar[type[TermOptions]] = TermOptions
    needs: ClassVar[Needs] = Needs()
    measures: ClassVar[tuple[str, ...]] = ()
    """Names of what `measure` returns, for metrics `moe/NAME`."""

    def __init__(self, options: Any, setting: Setting) -> None:
        """options: an instance of this class's `Options`."""
        self.options, self.setting = options, setting

    @classmethod
    def problems(cls, options: Any, model: ModelFacts) -> Iterable[tuple[str, str]]:  # noqa: ARG003 - the interface
        """(option, what is wrong and what to do) for each combination that cannot work."""
        return ()

    @classmethod
    def without_effect(cls, options: Any, model: ModelFacts) -> str | None:  # noqa: ARG003 - the interface
        """Why the term has no gradient in this model although it can be computed; None if it has one."""
        return None

    @property
    def weighted(self) -> bool:
        """Whether the term has a gradient; otherwise it is only measured."""
        return bool(self.options.weight > 0)

    @property
    def ranks(self) -> Ranks:
        """The process groups of the ranks that hold the other tokens of a microbatch."""
        from torchtitan_ext.collectives import Ranks

        return self.setting.ranks or Ranks()

    def probes(self, router_weight_ED: Tensor, layer: int, tokens: Tokens) -> Tensor | None:  # noqa: ARG002 - the interface
        """Vectors (P, D), in at least float32, for `LayerView.responses_PE`; None: this term needs none."""
        return None

    def sample(self, layer: int, tokens: Tokens) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002 - the interface
        """Tokens (N,) whose rows `observe` will ask `ExpertRows.home_subset` for, and their weights (N,); None: not so.

        Called before tokens are dispatched, so that the ranks can tell each other how many rows that are in the same message
        as the sizes of the dispatch. Without it the host waits for the device once more."""
        return None

    def observe(self, z_RF: Tensor, view: LayerView, rows: ExpertRows) -> tuple[Tensor, Any]:  # noqa: ARG002 - the interface
        """Called between activation and down projection. Returns the z to continue with, and what becomes `view.observed`.

        z_RF: rows at the experts of this rank, not in home order: under expert parallelism `view.rows_TK` does not index
        them before `rows.home(z)`. Under tensor parallelism it has this rank's hidden units only. Detach what you take if
        not `self.weighted`.
        """
        return z_RF, None

    def activate(self, gate_up: Tensor, view: LayerView, rows: ExpertRows) -> tuple[Tensor, Any] | None:  # noqa: ARG002
        """What `observe` returns, when a kernel can compute it in one pass with SwiGLU, z being `silu(gate) * up` of the
        halves of gate_up (R, 2F); `observe` is then not called. None: no kernel can."""
        return None

    def per_token(self, view: LayerView, observed: Any) -> Any:  # noqa: ARG002 - the interface
        """What `value` needs of `z_RF` and `y_RD`, as a few numbers per token that depend on no token weight.

        Called instead of keeping z and y, in models whose token weights are known only after the last layer
        (adapters/transformers); `value` then gets the result as `view.observed`, and no z and y. observed: what `observe`
        returned. A term with `needs` must define it to work there."""
        return observed

    def activate_gated(
        self,
        gate_up: Tensor,  # noqa: ARG002 - the interface
        gates_TK: Tensor,  # noqa: ARG002
        view: LayerView,  # noqa: ARG002
        rows: ExpertRows,  # noqa: ARG002
    ) -> tuple[Tensor, Any] | None:
        """The same with each row of the returned z times its gate weight, so that the layer need not keep the experts' outputs
        for the gate weights' gradient. What is observed must be that of z before. None: not here."""
        return None

    def value(self, view: LayerView) -> Tensor:
        """The term's part from this layer and microbatch, a scalar. Parts are summed over layers, microbatches and ranks."""
        raise NotImplementedError

    def sums_width(self, experts: int) -> int:  # noqa: ARG002 - the interface
        """Numbers per layer that `token_sums` returns; above 0, `total` replaces `value`."""
        return 0

    def token_sums(self, view: LayerView) -> Tensor:
        """(n,), sums over this rank's tokens from which `total` forms the term."""
        raise NotImplementedError

    def total(self, sums_Ln: Tensor, counts_LE: Tensor) -> Tensor:
        """The term's part from all layers of this microbatch, a scalar. Called once, after the last layer, so that ranks
        exchange what they must in one collective and not in one per layer.

        sums: what `token_sums` returned. counts: assignments of this rank's labelled tokens."""
        raise NotImplementedError

    def at_layer(self, view: LayerView) -> Tensor:
        """The term's part from this layer, also for a term with a `total`: for models that add terms layer by layer."""
        if not self.sums_width(view.scores_TE.shape[-1]):
            return self.value(view)
        return self.total(self.token_sums(view).unsqueeze(0), view.counts_E.unsqueeze(0))

    def carried_width(self, experts: int) -> int:  # noqa: ARG002 - the interface
        """Numbers per token that `carried` returns."""
        return 0

    def carried(self, view: LayerView) -> Tensor:
        """(T, n), given to this term at the next MoE layer as `view.previous`. `previous` and `observed` are not set here."""
        raise NotImplementedError

    def measure(self, view: LayerView, value: Tensor) -> Mapping[str, Tensor]:  # noqa: ARG002 - the interface
        """A scalar per name in `measures`, without gradients. value: what `value` returned."""
        return {}

    def traffic(self, sizes: Sizes) -> Iterable[Line]:  # noqa: ARG002 - the interface
        """What the term itself sends in a step. Rows for `needs` are counted elsewhere."""
        return ()


REGISTRY: dict[str, type[Term]] = {}
"""Every term by name, built-in ones first."""

TermClass = TypeVar("TermClass", bound=type[Term])


def register(term: TermClass) -> TermClass:
    """Class decorator: makes a term known to configuration, training, plan and plots."""
    REGISTRY[term.name] = term
    return term
