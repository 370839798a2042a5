"""Experts functions that show activations and outputs to an observer, registered through Transformers' own interface.

`ALL_EXPERTS_FUNCTIONS[name](experts_module, hidden (T, D), ids (T, K), gates (T, K)) -> (T, D)` is looked up at every call of
an experts module. Ours call the library's function with a stand-in for the module whose `_apply_gate` and `post_expert_norm`
show their results. Only `eager` has a loop of its own, since there the library has no function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakMethod, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_ext.adapters.transformers.structure import PREFIX


class Observer(Protocol):
    """Sees one call of one experts module."""

    outputs: bool
    """Whether it wants the outputs y."""

    def activations(self, z_RF: Tensor, rows_TK: Tensor, local: bool) -> Tensor:
        """Takes the activations; returns those to continue with. rows_TK: the row of each token's a-th expert. local: whether
        the returned tensor is the one that is used."""

    def expert_outputs(self, y_RD: Tensor, rows_TK: Tensor) -> None:
        """Takes the experts' outputs before the gate weights."""

    def end(self) -> None:
        """Called after both."""


Begin = Callable[[nn.Module, Tensor, Tensor], Observer | None]
"""(experts module, ids (T, K), gates (T, K)) to the observer of this call, if there is one."""
_BEGIN: "WeakKeyDictionary[nn.Module, WeakMethod[Begin]]" = WeakKeyDictionary()
"""Of the experts modules of attached models. Weak, so that a model can be freed: its hooks keep the methods' object alive."""


def watch(module: nn.Module, begin: Begin) -> None:
    """Calls a bound method at every call of an experts module, until `unwatch` or until its object is gone."""
    _BEGIN[module] = WeakMethod(begin)


def unwatch(module: nn.Module) -> None:
    """Ends what `watch` began."""
    _BEGIN.pop(module, None)


def watched(module: nn.Module) -> bool:
    """Whether `watch` is in force."""
    begin = _BEGIN.get(module)
    return begin is not None and begin() is not None


def _observer(module: nn.Module, ids_TK: Tensor, gates_TK: Tensor) -> Observer | None:
    """The observer of this call, if there is one."""
    method = _BEGIN.get(module)
    begin = None if method is None else method()
    return None if begin is None else begin(module, ids_TK, gates_TK)


class StandIn:
    """Looks like an experts module to the library's functions, and shows activations and outputs to an observer."""

    def __init__(self, module: Any, observer: Observer, rows_TK: Tensor) -> None:
        self._module, self._observer, self._rows = module, observer, rows_TK
        self.has_post_expert_norm = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._observer.activations(self._module._apply_gate(gate_up), self._rows, local=True)

    def post_expert_norm(self, y_RD: Tensor) -> Tensor:
        if self._module.has_post_expert_norm:
            y_RD = self._module.post_expert_norm(y_RD)
        if self._observer.outputs:
            self._observer.expert_outputs(y_RD, self._rows)
        return y_RD


def register() -> None:
    """Makes our experts functions known to Transformers; they serve all attached models. Raises ImportError."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "attach: needs the package 'transformers' 5 (extra hf): pip install 'transformers>=5,<6'"
        ) from error

    if PREFIX + "eager" not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(PREFIX + "eager", observed_eager)
        for name, rows in (("grouped_mm", grouped_rows), ("batched_mm", token_rows)):
            ALL_EXPERTS_FUNCTIONS.register(PREFIX + name, observed(ALL_EXPERTS_FUNCTIONS[name], rows))


def observed(function: Callable[..., Tensor], rows: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """One of the library's experts functions, observed. rows: of ids (T, K), the rows (T, K) in its activations."""

    def run(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        observer = _observer(self, top_k_index, top_k_weights)
        if observer is None:
            return function(self, hidden_states, top_k_index, top_k_weights)
        out_TD = function(StandIn(self, observer, rows(top_k_index)), hidden_states, top_k_index, top_k_weights)
        observer.end()
        return out_TD

    return run


def grouped_rows(ids_TK: Tensor) -> Tensor:
    """Rows of `grouped_mm`, which are sorted by expert: the same call of `sort` as the library's, whose order among equals
    is thus the same."""
    order_R = torch.sort(ids_TK.reshape(-1))[1]
    return inverse(order_R).view_as(ids_TK)


def token_rows(ids_TK: Tensor) -> Tensor:
    """Rows of `batched_mm`, which are in the order of tokens."""
    return torch.arange(ids_TK.numel(), device=ids_TK.device).view_as(ids_TK)


def inverse(order_R: Tensor) -> Tensor:
    """The row of each (token, choice) pair, from the pair of each row."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


_SAME_LOOP: "WeakSet[type]" = WeakSet()
"""Classes of experts whose own loop was seen to give the result of ours."""


class Part(NamedTuple):
    """One expert's rows."""

    expert: int
    choices: Tensor
    tokens: Tensor


def observed_eager(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The loop over experts that every experts class has, with the same operations in the same order, observed.

    The first result of each class is compared with that of its own loop. Raises RuntimeError if they differ."""
    observer = _observer(self, top_k_index, top_k_weights)
    if observer is None:
        plain: Tensor = type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
        return plain
    out_TD = torch.zeros_like(hidden_states)
    parts, activations, outputs = [], [], []
    for expert in range(self.num_experts):
        choices, tokens = torch.where(top_k_index.t() == expert)
        if len(tokens):
            parts.append(Part(expert, choices, tokens))
    for expert, choices, tokens in parts:
        gate_up = _linear(self, "gate_up_proj", hidden_states[tokens], expert)
        z = self._apply_gate(gate_up)
        y = _linear(self, "down_proj", z, expert)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        activations.append(z)
        outputs.append(y)
        out_TD.index_add_(0, tokens, (y * top_k_weights[tokens, choices, None]).to(out_TD.dtype))
    if type(self) not in _SAME_LOOP:
        with torch.no_grad():
            expected = type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
        if not torch.equal(expected, out_TD):
            raise RuntimeError(
                f"attach: the eager loop of {type(self).__name__} does something of its own; call "
                "model.set_experts_implementation('grouped_mm') before attach"
            )
        _SAME_LOOP.add(type(self))
    order_R = torch.cat([tokens * top_k_index.shape[1] + choices for _, choices, tokens in parts])
    rows_TK = inverse(order_R).view_as(top_k_index)
    observer.activations(torch.cat(activations), rows_TK, local=False)
    if observer.outputs:
        observer.expert_outputs(torch.cat(outputs), rows_TK)
    observer.end()
    return out_TD


def _linear(experts: Any, name: str, x: Tensor, expert: int) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    if not experts.is_transposed:
        product = F.linear(x, weight)
    else:
        product = x @ weight
    return product if bias is None else product + bias
