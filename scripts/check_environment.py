"""Exits 0 when this interpreter has the packages that pyproject.toml requires, else 1. `--dev`: also those of the
tests.

    python scripts/check_environment.py [--dev]

It reads package metadata and imports nothing, so it takes a few hundredths of a second.
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
    "lm-eval": "lm_eval",
    "megatron-core": "megatron.core",
}


def list_in(pyproject: str, key: str) -> list[str]:
    """The strings of the list `key = [...]`, read without a TOML parser, which may not be installed yet."""
    match = re.search(rf"^{key} = \[(.*?)\]$", pyproject, re.MULTILINE | re.DOTALL)
    assert match, f"pyproject.toml has no list {key}"
    return re.findall(r'"([^"]+)"', match.group(1))


def release(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: "2.13.0+cpu" to (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def satisfied(requirement: str) -> bool:
    """Whether a requirement's module can be found and its version is in range. Raises PackageNotFoundError.

    One with a marker, "triton>=3.4; sys_platform == 'linux'", counts on that platform only.
    """
    requirement, _, marker = requirement.partition(";")
    if marker and not applies(marker):
        return True
    name = re.split(r"[<>=!~ ]", requirement, maxsplit=1)[0]
    if importlib.util.find_spec(MODULE_OF.get(name, name)) is None:
        return False
    return in_range(requirement, importlib.metadata.version(name))


def applies(marker: str) -> bool:
    """Whether a marker holds here, such as "python_version >= '3.11' and sys_platform == 'linux'"."""
    for part in marker.split(" and "):
        condition = re.fullmatch(r"\s*(sys_platform ==|python_version >=) '([^']+)'\s*", part)
        assert condition, f"pyproject.toml: marker {part.strip()!r} is not one that this script reads"
        name, value = condition.groups()
        if name == "sys_platform ==" and sys.platform != value:
            return False
        if name == "python_version >=" and sys.version_info[:2] < release(value):
            return False
    return True


def in_range(requirement: str, version: str) -> bool:
    """Whether a version is one that a requirement such as "numpy>=1.26,<3" allows."""
    bounds = re.findall(r"(>=|<)([\d.]+)", requirement)
    return all((release(version) >= release(bound)) == (sign == ">=") for sign, bound in bounds)


def main() -> int:
    pyproject = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    requirements = list_in(pyproject, "dependencies") + (list_in(pyproject, "dev") if "--dev" in sys.argv else [])
    try:
        return 0 if all(map(satisfied, requirements)) else 1
    except importlib.metadata.PackageNotFoundError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
