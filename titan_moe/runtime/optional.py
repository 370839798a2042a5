"""Packages that are not installed with titan_moe itself."""

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

from titan_moe.errors import UserError, pip_install


def optional(module: str, extra: str, origin: str = "") -> Any:
    """A module of an optional package. Raises UserError that names the extra which installs it.

    origin: the file or setting that needs it, for the message."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(module.split(".")[0], extra, origin) from error


def check_installed(packages: Iterable[str], extra: str, origin: str = "") -> None:
    """Raises the same UserError for the first package that is not installed. Nothing is imported."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise missing(package, extra, origin)


def missing(package: str, extra: str, origin: str) -> UserError:
    remedy = f"{pip_install(package)} (or all of the extra {extra})"
    return UserError(f"{origin and f'{origin}: '}package {package!r} is not installed: {remedy}")
