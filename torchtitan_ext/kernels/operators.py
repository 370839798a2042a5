"""The kernels as operators torch.ops.torchtitan_ext.*, with fakes that give torch.compile and FakeTensors their shapes.

They have no derivatives of their own. The autograd.Functions that call them do (torchtitan_ext/ops/swiglu.py and router.py,
titan_moe/model/moe.py): under torch.compile an operator of `Library.define` costs a sixth of a `custom_op` per call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("torchtitan_ext", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Defines one operator. CPU tensors go through Triton's interpreter (ops/select.py)."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"torchtitan_ext::{name}", fake, lib=LIBRARY)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _activations(gate_up: Tensor, gates: Tensor | None = None) -> Tensor:  # noqa: ARG001 - the schema
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _swiglu(gate_up: Tensor, gates: Tensor | None) -> Tensor:
    from torchtitan_ext.kernels import swiglu

    z_RF = _activations(gate_up)
    swiglu.forward(gate_up.contiguous(), None, {"z": z_RF}, gates=_contiguous(gates))
    return z_RF


def _gradients(gate_up: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for the gradients of gate_up and of the gate weights; without gates the second is empty."""
    return _like(gate_up), gate_up.new_empty(0, dtype=torch.float32) if gates is None else _like(gates)


def _swiglu_backward_fake(gate_up: Tensor, dz_RF: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _gradients(gate_up, gates)


def _swiglu_backward(gate_up: Tensor, dz_RF: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor]:
    from torchtitan_ext.kernels import swiglu

    out, d_gates = _gradients(gate_up, gates)
    more = {"gates": _contiguous(gates), "d_gates": d_gates}
    swiglu.backward(gate_up.contiguous(), None, dz_RF.contiguous(), out, **more)
    return out, d_gates


def _cosines_fake(
    gate_up: Tensor,
    rows_TK: Tensor,
    floor: float,  # noqa: ARG001 - the schema
    gates_TK: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    tokens, k = rows_TK.shape
    shapes = ((tokens,), (tokens,), (tokens, k, k), (tokens, k))
    return _activations(gate_up), *(gate_up.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _cosines(gate_up: Tensor, rows_TK: Tensor, floor: float, gates_TK: Tensor | None) -> tuple[Tensor, ...]:
    from torchtitan_ext.kernels import swiglu

    out = _cosines_fake(gate_up, rows_TK, floor, gates_TK)
    tensors = dict(zip(("z", "values", "overlaps", "slopes", "scales"), out, strict=True))
    swiglu.forward(gate_up.contiguous(), rows_TK.contiguous(), tensors, floor, _contiguous(gates_TK))
    return out


def _cosines_backward_fake(
    gate_up: Tensor,
    rows_TK: Tensor,  # noqa: ARG001 - the schema
    dz_RF: Tensor,  # noqa: ARG001
    slopes_TKK: Tensor,  # noqa: ARG001
    scales_TK: Tensor,  # noqa: ARG001
    d_values_T: Tensor,  # noqa: ARG001
    gates_TK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _gradients(gate_up, gates_TK)


def _cosines_backward(
    gate_up: Tensor,
    rows_TK: Tensor,
    dz_RF: Tensor,
    slopes_TKK: Tensor,
    scales_TK: Tensor,
    d_values_T: Tensor,
    gates_TK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from torchtitan_ext.kernels import swiglu

    out, d_gates = _gradients(gate_up, gates_TK)
    tensors = (slopes_TKK, scales_TK, d_values_T.contiguous(), _contiguous(gates_TK), d_gates)
    swiglu.backward(gate_up.contiguous(), rows_TK.contiguous(), dz_RF.contiguous(), out, *tensors)
    return out, d_gates


def _gram_fake(gate_up: Tensor, rows_TK: Tensor, gates_TK: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    tokens, k = rows_TK.shape
    return _activations(gate_up), gate_up.new_empty(tokens, k, k, dtype=torch.float32)


def _gram(gate_up: Tensor, rows_TK: Tensor, gates_TK: Tensor | None) -> tuple[Tensor, Tensor]:
    from torchtitan_ext.kernels import swiglu

    z_RF, gram_TKK = _gram_fake(gate_up, rows_TK, gates_TK)
    tensors = {"z": z_RF, "gram": gram_TKK}
    swiglu.forward(gate_up.contiguous(), rows_TK.contiguous(), tensors, gates=_contiguous(gates_TK))
    return z_RF, gram_TKK


def _gram_backward_fake(
    gate_up: Tensor,
    rows_TK: Tensor,  # noqa: ARG001 - the schema
    dz_RF: Tensor,  # noqa: ARG001
    coefficients_TKK: Tensor,  # noqa: ARG001
    gates_TK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _gradients(gate_up, gates_TK)


def _gram_backward(
    gate_up: Tensor, rows_TK: Tensor, dz_RF: Tensor, coefficients_TKK: Tensor, gates_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    from torchtitan_ext.kernels import swiglu

    out, d_gates = _gradients(gate_up, gates_TK)
    tensors = (rows_TK.contiguous(), dz_RF.contiguous(), out, coefficients_TKK.contiguous())
    swiglu.backward(gate_up.contiguous(), *tensors, gates=_contiguous(gates_TK), d_gates=d_gates)
    return out, d_gates


def _combine_fake(y_RD: Tensor, rows_TK: Tensor, gates_TK: Tensor | None) -> Tensor:  # noqa: ARG001 - the schema
    return y_RD.new_empty(rows_TK.shape[0], y_RD.shape[1])


def _combine(y_RD: Tensor, rows_TK: Tensor, gates_TK: Tensor | None) -> Tensor:
    from torchtitan_ext.kernels import combine

    out_TD = _combine_fake(y_RD, rows_TK, gates_TK)
    gates_TK = None if gates_TK is None else gates_TK.contiguous()
    combine.forward(y_RD.contiguous(), rows_TK.contiguous(), gates_TK, out_TD)
    return out_TD


def _combine_backward_fake(
    d_out_TD: Tensor,  # noqa: ARG001 - the schema
    y_RD: Tensor,
    rows_TK: Tensor,  # noqa: ARG001
    gates_TK: Tensor,
) -> tuple[Tensor, Tensor]:
    return _like(y_RD), _like(gates_TK)


def _combine_backward(d_out_TD: Tensor, y_RD: Tensor, rows_TK: Tensor, gates_TK: Tensor) -> tuple[Tensor, Tensor]:
    from torchtitan_ext.kernels import combine

    d_y_RD, d_gates_TK = _like(y_RD), _like(gates_TK)
    inputs = (d_out_TD.contiguous(), y_RD.contiguous(), rows_TK.contiguous(), gates_TK.contiguous())
    combine.backward(*inputs, d_y_RD, d_gates_TK)
    return d_y_RD, d_gates_TK


_operator("swiglu(Tensor gate_up, Tensor? gates) -> Tensor", _activations, _swiglu)
_operator(
    "swiglu_backward(Tensor gate_up, Tensor dz, Tensor? gates) -> (Tensor, Tensor)",
    _swiglu_backward_fake,
    _swiglu_backward,
)
_operator(
    "swiglu_cosines(Tensor gate_up, Tensor rows, float floor, Tensor? gates)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _cosines_fake,
    _cosines,
)
_operator(
    "swiglu_cosines_backward(Tensor gate_up, Tensor rows, Tensor dz, Tensor slopes, Tensor scales, Tensor d_values,"
    " Tensor? gates) -> (Tensor, Tensor)",
    _cosines_backward_fake,
    _cosines_backward,
)
_operator("swiglu_gram(Tensor gate_up, Tensor rows, Tensor? gates) -> (Tensor, Tensor)", _gram_fake, _gram)
_operator(
    "swiglu_gram_backward(Tensor gate_up, Tensor rows, Tensor dz, Tensor coefficients, Tensor? gates)"
    " -> (Tensor, Tensor)",
    _gram_backward_fake,
    _gram_backward,
)
_operator("combine(Tensor y, Tensor rows, Tensor? gates) -> Tensor", _combine_fake, _combine)
_operator(
    "combine_backward(Tensor d_out, Tensor y, Tensor rows, Tensor gates) -> (Tensor, Tensor)",
    _combine_backward_fake,
    _combine_backward,
)


def _choose_fake(logits_TE: Tensor, bias_E: Tensor, top_k: int, sigmoid: bool) -> Tensor:  # noqa: ARG001 - the schema
    return logits_TE.new_empty(logits_TE.shape[0], top_k, dtype=torch.int64)


def _choose(logits_TE: Tensor, bias_E: Tensor, top_k: int, sigmoid: bool) -> Tensor:
    from torchtitan_ext.kernels import router

    ids_TK = _choose_fake(logits_TE, bias_E, top_k, sigmoid)
    router.choose(logits_TE.contiguous(), bias_E.contiguous(), ids_TK, sigmoid)
    return ids_TK


def _route_fake(logits_TE: Tensor, ids_TK: Tensor, *_: Any) -> tuple[Tensor, ...]:
    (tokens, experts), k = logits_TE.shape, ids_TK.shape[1]
    shapes = ((tokens, experts), (tokens, k), (tokens,), (tokens,), (tokens,), (tokens,))
    counts_E = logits_TE.new_empty(experts, dtype=torch.int64)
    return *(logits_TE.new_empty(shape) for shape in shapes), counts_E, logits_TE.new_empty(experts)


def _route(
    logits_TE: Tensor, ids_TK: Tensor, weights_T: Tensor, sigmoid: bool, normalize: bool, scale: float
) -> tuple[Tensor, ...]:
    from torchtitan_ext.kernels import router

    out = _route_fake(logits_TE, ids_TK)[:-2]
    parts = (router.programs(*logits_TE.shape), logits_TE.shape[1])
    counts_PE, shares_PE = logits_TE.new_empty(parts, dtype=torch.int32), logits_TE.new_empty(parts)
    inputs = (logits_TE.contiguous(), ids_TK.contiguous(), weights_T.contiguous())
    router.forward(*inputs, (*out, counts_PE, shares_PE), sigmoid, normalize, scale)
    return *out, counts_PE.sum(0), shares_PE.sum(0)


def _route_backward(
    logits_TE: Tensor,
    ids_TK: Tensor,
    weights_T: Tensor,
    d_scores_TE: Tensor | None,
    d_gates_TK: Tensor | None,
    d_lse_T: Tensor | None,
    d_largest_mass_T: Tensor | None,
    d_shares_E: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    from torchtitan_ext.kernels import router

    given = (d_scores_TE, d_gates_TK, d_lse_T, d_largest_mass_T, d_shares_E)
    gradients, out = tuple(None if x is None else x.contiguous() for x in given), _like(logits_TE)
    inputs = (logits_TE.contiguous(), ids_TK.contiguous(), weights_T.contiguous())
    router.backward(*inputs, gradients, out, sigmoid, normalize, scale)
    return out


_operator("choose_experts(Tensor logits, Tensor bias, int top_k, bool sigmoid) -> Tensor", _choose_fake, _choose)
_operator(
    "route(Tensor logits, Tensor ids, Tensor weights, bool sigmoid, bool normalize, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _route_fake,
    _route,
)
_operator(
    "route_backward(Tensor logits, Tensor ids, Tensor weights, Tensor? d_scores, Tensor? d_gates, Tensor? d_lse,"
    " Tensor? d_largest_mass, Tensor? d_shares, bool sigmoid, bool normalize, float scale) -> Tensor",
    _like,
    _route_backward,
)


def _cross_entropy_fake(
    logits_tV: Tensor,
    columns_t: Tensor,  # noqa: ARG001 - the schema
    weights_t: Tensor,  # noqa: ARG001
    gradient: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    highest_t, sums_t, label_logits_t = (logits_tV.new_empty(logits_tV.shape[0], dtype=torch.float32) for _ in range(3))
    return highest_t, sums_t, label_logits_t


def _cross_entropy(
    logits_tV: Tensor, columns_t: Tensor, weights_t: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from torchtitan_ext.kernels import cross_entropy

    out = _cross_entropy_fake(logits_tV, columns_t, weights_t, gradient)
    assert logits_tV.is_contiguous()  # they are overwritten
    cross_entropy.launch(logits_tV, columns_t.contiguous(), weights_t.contiguous(), out, gradient)
    return out


def _cross_entropy_gradient(
    logits_tV: Tensor, columns_t: Tensor, weights_t: Tensor, highest_t: Tensor, sums_t: Tensor
) -> None:
    from torchtitan_ext.kernels import cross_entropy

    assert logits_tV.is_contiguous()
    inputs = (columns_t.contiguous(), weights_t.contiguous())
    cross_entropy.launch(logits_tV, *inputs, (highest_t.contiguous(), sums_t.contiguous()), True)


_operator(
    "cross_entropy_(Tensor(a!) logits, Tensor columns, Tensor weights, bool gradient) -> (Tensor, Tensor, Tensor)",
    _cross_entropy_fake,
    _cross_entropy,
)
_operator(
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor columns, Tensor weights, Tensor highest, Tensor sums) -> ()",
    lambda *_: None,
    _cross_entropy_gradient,
)


def _rotate(x_NHd: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    from torchtitan_ext.kernels import rotary

    out = _like(x_NHd)
    rotary.rotate(x_NHd.contiguous(), cos.contiguous(), sin.contiguous(), out, back)
    return out


_operator("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", _like, _rotate)
