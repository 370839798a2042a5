"""sp, intra-layer specialization: squared cosines of the activations of a token's experts (Hu et al., Eq. 4).

The value is a function of one small Gram matrix per token, taken between the activation and the down projection. When experts
are on other ranks, the activations (of all tokens or of a sample), or sketches of them, are sent to the ranks of their tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from torchtitan_ext.terms.base import (
    COUNT_BYTES,
    ExpertRows,
    LayerView,
    Line,
    ModelFacts,
    Sizes,
    Term,
    TermOptions,
    Tokens,
    Weight,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor


def specialization_loss(
    z: Tensor, *, rows: Tensor | None = None, weights: Tensor | None = None, above_chance: bool = False
) -> Tensor:
    """sp: mean over tokens of the sum over ordered pairs of chosen experts of `cos(z_e, z_v)^2`, in [0, k(k-1)].

    z: (T, k, F) SwiGLU activations of each token's chosen experts; or (R, F) in any order together with rows: (T, k)
    int64, the row of token i's a-th expert. A zero vector has cosine 0 with everything; any other length, as far as the dtype
    goes, gives the same value. weights: (T,), replace 1/T.
    above_chance: max(cos^2 - 1/F, 0) in place of cos^2; 1/F is the mean for independent directions, so experts that overlap
    by chance alone get no gradient (our variant). Source: Hu et al., Eq. 4.
    """
    from torchtitan_ext.ops.gram import squared_cosines, token_gram, token_rows
    from torchtitan_ext.ops.routing import weighted_sum

    rows, z = token_rows(z, rows)
    floor = chance_overlap(z.shape[-1]) if above_chance else 0.0
    return weighted_sum(squared_cosines(token_gram(z, rows, scaled=True), floor), weights)


def chance_overlap(width: int) -> float:
    """The mean squared cosine of independent random directions in `width` dimensions."""
    return 1.0 / width


def sketched_specialization_loss(
    z: Tensor, rows: Tensor, sketch: Tensor, signs: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """sp from two independent sketches of the activations and their exact norms.

    z: (R, F), rows: (T, k). sketch: (m, F) of +-1, m even; its halves are the two sketches. signs: (T, F) of +-1, the same
    for a token's k rows. Row z becomes `S (r * z) / sqrt(m / 2)`, S one half of the sketch and r the token's signs; each
    half estimates an inner product without bias, and the product of both estimates its square without bias. Unlike the
    exact value a token's estimate may be negative. Raises ValueError for an odd m.
    """
    from torchtitan_ext.ops.routing import weighted_sum

    tokens, k = rows.shape
    gathered = z[rows].flatten(0, 1)
    sketched, norms = sketch_rows(gathered, signs.repeat_interleave(k, 0), sketch, scaled=True)
    return weighted_sum(sketched_cosines(sketched.unflatten(0, (tokens, k)), norms.unflatten(0, (tokens, k))), weights)


def sketch_rows(z: Tensor, signs: Tensor, sketch: Tensor, scaled: bool = False) -> tuple[Tensor, Tensor]:
    """What sp by sketches needs of each row: `S (r * z)` (R, m) in the dtype of z, and its squared norm (R,).

    z: (R, F), signs: (R, F), sketch: (m, F). Both are sums over hidden units, so tensor-parallel parts add up, unless
    scaled: rows whose fourth powers would overflow or underflow are first divided by their largest entry.
    """
    from torchtitan_ext.ops.gram import row_scales, squares_limit
    from torchtitan_ext.ops.routing import accumulate

    exact = accumulate(z)
    if scaled:
        exact = exact * row_scales(z, squares_limit(z.dtype) ** 0.25).unsqueeze(1)
    return ((exact * signs) @ sketch.t()).to(z.dtype), exact.square().sum(-1)


def sketched_cosines(sketched: Tensor, norms: Tensor) -> Tensor:
    """Estimates of each token's sum of squared cosines: sketches (T, k, m), squared norms (T, k) -> (T,)."""
    import torch

    from torchtitan_ext.ops.routing import accumulate

    if sketched.shape[2] % 2:
        raise ValueError(f"sketched_specialization_loss: {sketched.shape[2]} sketch dimensions can't be halved")
    half = sketched.shape[2] // 2
    parts = accumulate(sketched).unflatten(2, (2, half)).transpose(1, 2)
    products = (parts @ parts.transpose(2, 3)) / half
    positive = ~(norms < torch.finfo(norms.dtype).tiny)
    inverse = positive / torch.where(positive, norms, 1.0)
    squares = products[:, 0] * products[:, 1] * inverse.unsqueeze(2) * inverse.unsqueeze(1)
    off_diagonal = ~torch.eye(norms.shape[1], dtype=torch.bool, device=norms.device)
    return (squares * off_diagonal).sum((1, 2))


class SpecializationOptions(TermOptions):
    """sp, intra-layer specialization: squared cosine of co-activated experts' SwiGLU activations."""

    weight: Weight = 0.0
    """Weight in the objective; the paper uses 2e-3."""
    method: Literal["exact", "sketch", "sample"] = "exact"
    """All tokens and full width, or an estimator: random projections of the activations, or a random subset of tokens."""
    sketch_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Numbers per activation (method "sketch"): two independent sketches of half as many each."""
    sample_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.125
    """Expected fraction of the tokens (method "sample")."""
    above_chance: bool = False
    """max(cos^2 - 1 / model.moe.hidden_dim, 0) in place of cos^2: the mean for independent directions is subtracted."""


class Grams(NamedTuple):
    """Gram matrices of N tokens."""

    gram_NKK: Tensor
    weights_N: Tensor


class Cosines(NamedTuple):
    """What one kernel computes together with SwiGLU, for N tokens."""

    values_N: Tensor
    """Sums of squared cosines, with `above_chance` of their excess."""
    overlaps_N: Tensor
    """Sums of squared cosines in any case, without a gradient."""
    weights_N: Tensor | None
    """None: those of the view's tokens, or of its sample of them."""


class Sketches(NamedTuple):
    """Sketches of this rank's routed rows, in home order."""

    sketched_RM: Tensor
    """In the dtype of z."""
    squared_norms_R: Tensor
    """Squared norms, in at least float32."""


@register
class Specialization(Term):
    name = "sp"
    title = "sp: overlap in a layer"
    Options = SpecializationOptions
    measures = ("overlap",)

    @classmethod
    def problems(cls, options: Any, model: ModelFacts) -> Iterable[tuple[str, str]]:
        if model.top_k == 1:
            yield "weight", "sp compares the experts of a token, and model.moe.top_k = 1; set the weight to 0"
        if options.above_chance and options.method == "sketch":
            yield (
                "above_chance",
                "a sketch does not give single cosines; set regularizers.sp.method to 'exact' or 'sample'",
            )

    def observe(self, z_RF: Tensor, view: LayerView, rows: ExpertRows) -> tuple[Tensor, Any]:
        # Tensor-parallel ranks have parts of a row and would scale them differently.
        scaled = z_RF.shape[1] >= self.setting.hidden_dim
        if self.options.method == "sketch":
            return z_RF, self._sketches(z_RF, view, rows, scaled)
        from torchtitan_ext.ops.gram import gram_through, token_gram

        rows_NK, weights_N = self._selected(view)
        source = z_RF if self.weighted else z_RF.detach()
        if not rows.local:
            # A selection may be empty by chance, but every rank takes part in the exchange.
            all_rows = self.options.method == "exact"
            source, rows_NK = (rows.home(source), rows_NK) if all_rows else rows.home_subset(source, rows_NK)
            gram_NKK = token_gram(source, rows_NK, scaled)
        elif self.weighted:
            z_RF, gram_NKK = gram_through(z_RF, rows_NK, scaled)
        else:
            gram_NKK = token_gram(source, rows_NK, scaled)
        return z_RF, Grams(rows.sum_hidden(gram_NKK), weights_N)

    def sample(self, layer: int, tokens: Tokens) -> tuple[Tensor, Tensor] | None:
        """Method "sample": the tokens (N,) whose activations are used, and their weights."""
        if self.options.method != "sample":
            return None
        from torchtitan_ext.ops import draws

        weights_T, fraction = tokens.weights.flatten(), self.options.sample_fraction
        key = (draws.SP_SAMPLE, self.setting.seed, layer, tokens.step)
        positions: dict[str, Any] = {
            "rows_B": tokens.sequences,
            "columns_S": tokens.sequence_positions,
            "device": weights_T.device,
        }
        if draws.may_count(weights_T.device):
            chosen_N = draws.sample(fraction, *key, **positions)
            return chosen_N, weights_T.index_select(0, chosen_N) / fraction
        chosen_N, drawn_N = draws.padded_sample(fraction, *key, **positions)
        return chosen_N, weights_T.index_select(0, chosen_N) / fraction * drawn_N

    def activate(self, gate_up: Tensor, view: LayerView, rows: ExpertRows) -> tuple[Tensor, Any] | None:
        return self._activate(gate_up, None, view, rows)

    def activate_gated(
        self, gate_up: Tensor, gates_TK: Tensor, view: LayerView, rows: ExpertRows
    ) -> tuple[Tensor, Any] | None:
        return self._activate(gate_up, gates_TK, view, rows)

    def _activate(
        self, gate_up: Tensor, gates_TK: Tensor | None, view: LayerView, rows: ExpertRows
    ) -> tuple[Tensor, Any] | None:
        from torchtitan_ext.ops import select
        from torchtitan_ext.ops.swiglu import swiglu_cosines, swiglu_gram

        if self.options.method == "sketch" or not rows.local or not select.fused(gate_up):
            return None
        # Of all tokens, since the kernel has every token's activations at hand; `sample` takes its own from the results.
        chosen_N, weights_N = self._chosen(view)
        if gate_up.shape[1] // 2 < self.setting.hidden_dim:
            z_RF, gram_TKK = swiglu_gram(gate_up, view.rows_TK, gates_TK)
            gram_NKK = gram_TKK if chosen_N is None else gram_TKK.index_select(0, chosen_N)
            return z_RF, Grams(rows.sum_hidden(gram_NKK if self.weighted else gram_NKK.detach()), weights_N)
        z_RF, values_T, overlaps_T = swiglu_cosines(gate_up, view.rows_TK, self._floor, gates_TK)
        parts = (values_T if self.weighted else values_T.detach(), overlaps_T)
        if chosen_N is not None:
            parts = (parts[0].index_select(0, chosen_N), overlaps_T.index_select(0, chosen_N))
        return z_RF, Cosines(*parts, weights_N)

    @property
    def _floor(self) -> float:
        return chance_overlap(self.setting.hidden_dim) if self.options.above_chance else 0.0

    def _selected(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """Rows (N, K) and weights (N,) of the tokens whose Gram matrices are taken."""
        chosen_N, weights_N = self._chosen(view)
        return view.rows_TK if chosen_N is None else view.rows_TK.index_select(0, chosen_N), weights_N

    def _chosen(self, view: LayerView) -> tuple[Tensor | None, Tensor]:
        """Indices of the sampled tokens (N,), None for all tokens, and weights (N,)."""
        chosen = view.samples.get(self.name) or self.sample(view.layer, view.tokens)
        return (None, view.tokens.weights.flatten()) if chosen is None else chosen

    def _sketches(self, z_RF: Tensor, view: LayerView, rows: ExpertRows, scaled: bool) -> Sketches:
        import torch

        from torchtitan_ext.dtypes import accumulation_dtype
        from torchtitan_ext.ops import draws

        tokens, device, seed = view.tokens, z_RF.device, self.setting.seed
        dtype, width, first = accumulation_dtype(z_RF.dtype), z_RF.shape[1], rows.first_hidden(z_RF.shape[1])
        key = (seed, view.layer, tokens.step)
        keys_BS = draws.keyed_bits(
            draws.SP_SIGNS, *key, tokens.sequences.unsqueeze(1), tokens.sequence_positions, device=device
        )
        distinct, index_R = draws.distinct(rows.to_experts(keys_BS.flatten()))
        signs_RF = draws.signs_of(distinct, width, dtype, first).index_select(0, index_R)
        dims = torch.arange(self.options.sketch_dim, device=device)
        bits = draws.keyed_bits(draws.SP_SKETCH, *key, dims, device=device)
        source = z_RF if self.weighted else z_RF.detach()
        sketched, norms = sketch_rows(source, signs_RF, draws.signs_of(bits, width, dtype, first), scaled)
        sketched, norms = rows.home(sketched), rows.home(norms)
        return Sketches(rows.sum_hidden(sketched), rows.sum_hidden(norms))

    def per_token(self, view: LayerView, observed: Any) -> Any:
        from torchtitan_ext.ops.gram import squared_cosines

        if isinstance(observed, Sketches):
            rows_TK = view.rows_TK
            values_T = sketched_cosines(observed.sketched_RM[rows_TK], observed.squared_norms_R[rows_TK])
            return Cosines(values_T, values_T.detach(), None)
        if isinstance(observed, Grams):
            values_N = squared_cosines(observed.gram_NKK, self._floor)
            overlaps_N = squared_cosines(observed.gram_NKK.detach()) if self._floor else values_N.detach()
            return Cosines(values_N, overlaps_N, None)
        return observed._replace(weights_N=None)

    def value(self, view: LayerView) -> Tensor:
        return self._value(view, self._floor)

    def _value(self, view: LayerView, floor: float) -> Tensor:
        from torchtitan_ext.ops.gram import squared_cosines
        from torchtitan_ext.ops.routing import weighted_sum

        seen = view.observed
        if isinstance(seen, Cosines):
            weights_N = self._chosen(view)[1] if seen.weights_N is None else seen.weights_N
            return weighted_sum(seen.values_N if floor == self._floor else seen.overlaps_N, weights_N)
        if isinstance(seen, Sketches):
            rows_TK = view.rows_TK
            return weighted_sum(
                sketched_cosines(seen.sketched_RM[rows_TK], seen.squared_norms_R[rows_TK]), view.weights_T
            )
        return weighted_sum(squared_cosines(seen.gram_NKK, floor), seen.weights_N)

    def measure(self, view: LayerView, value: Tensor) -> Mapping[str, Tensor]:
        """overlap: the mean squared cosine. Nothing is subtracted, with `above_chance` neither."""
        k = view.topk_ids_TK.shape[1]
        if k == 1:
            return {"overlap": view.weights_T.new_zeros(())}
        squares = self._value(view.detach(), 0.0) if self.options.above_chance else value.detach()
        return {"overlap": squares / (k * (k - 1))}

    def traffic(self, sizes: Sizes) -> Iterable[Line]:
        options, s = self.options, sizes
        fraction = options.sample_fraction if options.method == "sample" else 1.0
        rows = int(fraction * s.rows)
        trips = s.exchanges + (1 if self.weighted else 0)  # to the tokens' ranks; the gradient back
        if options.method == "sketch":
            sketch = options.sketch_dim * s.compute + s.exact
            sent, keys = s.rows * trips * sketch, s.exchanges * s.rows * 4
            summed = s.rows * sketch
        else:
            sent = rows * trips * s.hidden * s.compute
            # One byte a row: is it wanted; and how many are, per expert.
            wanted = s.exchanges * s.rows + s.forwards * s.experts * COUNT_BYTES
            keys = wanted if options.method == "sample" else 0
            summed = rows * s.top_k * s.exact
        if s.ep > 1:
            yield Line("all-to-all", "sp: activations", s.steps * s.moe_layers * (sent + keys))
        if s.tp > 1:
            yield Line("all-reduce", "sp: sums over hidden units", s.layer_passes * summed)
