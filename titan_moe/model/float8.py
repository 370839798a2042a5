"""float8 products of the dense linear layers, through torchao: attention, dense feed-forward layers and shared experts; with
`float8.experts` of the routed experts too (float8_experts.py).

Embedding, head and routers stay as they are. On a CPU torchao multiplies the float8 values in float32, which
shows what the rounding does and saves no time.
"""

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from titan_moe.config.tables import Float8
from titan_moe.errors import UserError
from titan_moe.model.float8_experts import GROUPED_UNITS, float8_grouped_linear
from titan_moe.model.gemm import Linear
from titan_moe.model.moe import Experts

FLOAT8_UNITS = (8, 9)  # the first CUDA capability that has them


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Only errors from these loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Float8Product:
    """`x @ weight.T` with x, weight and the gradient scaled and rounded to float8: (..., D), (N, D) -> (..., N)."""

    def __init__(self, recipe: str, emulate: bool) -> None:
        with quiet("torchao", "torch.utils._pytree"):  # they name every kernel library of another platform
            from torchao.float8 import Float8LinearConfig
            from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
        self.config = Float8LinearConfig.from_recipe_name(recipe)
        object.__setattr__(self.config, "emulate", emulate)  # frozen, and recipes don't take it
        with torch.device("meta"):
            self.products = Float8Linear(16, 16, bias=False, config=self.config).linear_mm_config
        self.apply = matmul_with_hp_or_float8_args.apply

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = self.apply(x, weight.to(x.dtype).t(), self.products, self.config)
        return result


def use_float8(model: nn.Module, settings: Float8, device: torch.device) -> None:
    """Lets the model's dense linear layers, and the experts if asked, multiply in float8, in place. Raises UserError for a GPU
    without the units."""
    if not settings.enable:
        return
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FLOAT8_UNITS:
        raise UserError(f"float8.enable: {torch.cuda.get_device_name(device)} has no float8 units; set it to false")
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    if settings.experts and major is not None and major not in GROUPED_UNITS:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"float8.experts: {name} has no scaled grouped product; set it to false")
    multiply = Float8Product(settings.recipe, emulate=device.type != "cuda")
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "output":
            module.multiply = multiply
        if isinstance(module, Experts) and settings.experts:
            module.multiply = float8_grouped_linear
