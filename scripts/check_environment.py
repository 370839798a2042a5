"""Exits 0 when this interpreter has what pyproject.toml asks for, 1 otherwise. `--dev` asks for the tests' packages too.

    python scripts/check_environment.py [--dev]

It reads metadata and looks modules up without importing them, so it costs a few hundredths of a second.
"""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

MODULE_OF = {
    "pillow": "PIL",
    "tomli-w": "tomli_w",
    "scikit-learn": "sklearn",
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
}


def listed(pyproject: str, key: str) -> list[str]:
    """The strings of the list `key = [...]`, read without a TOML parser: none may be installed yet."""
    found = re.search(rf"^{key} = \[(.*?)\]$", pyproject, re.MULTILINE | re.DOTALL)
    assert found, f"pyproject.toml has no list {key}"
    return re.findall(r'"([^"]+)"', found.group(1))


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def satisfied(requirement: str) -> bool:
    name = re.split(r"[<>=!~ ]", requirement, maxsplit=1)[0]
    if importlib.util.find_spec(MODULE_OF.get(name, name)) is None:
        return False
    have = release(importlib.metadata.version(name))
    bounds = re.findall(r"(>=|<)([\d.]+)", requirement)
    return all((have >= release(bound)) == (sign == ">=") for sign, bound in bounds)


def main() -> int:
    pyproject = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    wanted = listed(pyproject, "dependencies") + (listed(pyproject, "dev") if "--dev" in sys.argv else [])
    try:
        return 0 if all(map(satisfied, wanted)) else 1
    except importlib.metadata.PackageNotFoundError:
        return 1


sys.exit(main())
