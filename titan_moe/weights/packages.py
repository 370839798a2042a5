"""Packages that are not installed with titan_moe itself."""

import importlib
from typing import Any

from titan_moe.errors import UserError


def optional(module: str, extra: str) -> Any:
    """A module of an optional package. Raises UserError that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(f"package {package!r} is not installed: pip install 'titan-moe[{extra}]'") from error
