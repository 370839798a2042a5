"""Packages that are not installed with titan_moe itself."""

import importlib
from typing import Any

from titan_moe.errors import UserError, pip_install


def optional(module: str, extra: str, origin: str = "") -> Any:
    """A module of an optional package. Raises UserError that names the extra which installs it.

    origin: the file or setting that needs it, for the message."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        remedy = f"{pip_install(package)} (or all of the extra {extra})"
        raise UserError(f"{origin and f'{origin}: '}package {package!r} is not installed: {remedy}") from error
