"""Rules for the source: no import cycle between folders, forbidden imports, file lengths, imports among tests."""

import ast
import graphlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.commands import ROOT

LINES = 450
PACKAGES = ("titan_moe", "torchtitan_ext")
# Folders of which every subfolder counts as a folder of its own.
DIVIDED = ("titan_moe/analysis",)
# Folder -> folders that none of its files may import. A name includes the folders below it.
FORBIDDEN = {
    "torchtitan_ext": ("titan_moe",),
    "titan_moe/config": tuple(f"titan_moe/{name}" for name in ("parallel", "model", "data", "train")),
    "titan_moe/data": tuple(f"titan_moe/{name}" for name in ("model", "parallel", "train")),
    "titan_moe/model": tuple(f"titan_moe/{name}" for name in ("parallel", "train", "checkpoint", "analysis", "verbs")),
}
# Folder -> the only folders that its files may import, next to itself.
ALLOWED: dict[str, tuple[str, ...]] = {
    "titan_moe/runtime": ("titan_moe/errors", "torchtitan_ext"),
    "torchtitan_ext/kernels": (),
}


class Import(NamedTuple):
    """One import statement, anywhere in a file: at the top, in a function or under TYPE_CHECKING."""

    file: str
    line: int
    module: str


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[Import]:
    """Every module that a file names in an import statement. `from a import b` names a.b where that is a module."""
    name = str(path.relative_to(ROOT))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            longer = [f"{module}.{alias.name}" for alias in node.names]
            modules = [one if source_of(one) is not None else module for one in longer]
        else:
            continue
        yield from (Import(name, node.lineno, module) for module in dict.fromkeys(modules))


def source_of(module: str) -> Path | None:
    """The source file of a module of this repository (its __init__.py, which need not exist, for a folder); else
    None."""
    path = ROOT.joinpath(*module.split("."))
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else None


def folder_of(path: Path) -> str:
    """The folder that a file counts for: titan_moe/model, titan_moe/analysis/report. A file directly in a package
    counts for itself: titan_moe/cli."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    depth = 3 if "/".join(parts[:2]) in DIVIDED and len(parts) > 3 else 2
    return "/".join(parts[:depth])


def edges() -> dict[tuple[str, str], list[Import]]:
    """Imports between different folders of the two packages, by (importing folder, imported folder)."""
    between: dict[tuple[str, str], list[Import]] = {}
    for path in sources(*PACKAGES):
        for one in imports(path):
            target = source_of(one.module) if one.module.split(".")[0] in PACKAGES else None
            if target is not None and folder_of(target) != folder_of(path):
                between.setdefault((folder_of(path), folder_of(target)), []).append(one)
    return between


def listed(statements: list[Import]) -> str:
    return "\n".join(f"{one.file}:{one.line} imports {one.module}" for one in statements)


def test_no_import_cycle_between_folders() -> None:
    between = edges()
    graph: dict[str, set[str]] = {}
    for importer, imported in between:
        graph.setdefault(importer, set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1][::-1]  # importer before imported
        lines = [listed(between[pair]) for pair in itertools.pairwise(cycle)]
        pytest.fail(f"{' -> '.join(cycle)}\n" + "\n".join(lines))


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_forbidden_imports_do_not_occur(folder: str) -> None:
    """config/ knows nothing of parallelism, data/ nothing of the model, and so on."""
    wrong = [
        one
        for (importer, imported), statements in edges().items()
        for one in statements
        if inside(importer, folder) and any(inside(imported, name) for name in FORBIDDEN[folder])
    ]
    assert not wrong, listed(wrong)


@pytest.mark.parametrize("folder", ALLOWED)
def test_leaf_folders_import_only_what_is_allowed(folder: str) -> None:
    wrong = [
        one
        for (importer, imported), statements in edges().items()
        for one in statements
        if inside(importer, folder) and not any(inside(imported, name) for name in ALLOWED[folder])
    ]
    assert not wrong, listed(wrong)


def inside(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")


def test_the_folders_of_these_rules_exist() -> None:
    """Otherwise a renamed folder would not be checked any more."""
    names = {*FORBIDDEN, *DIVIDED, *ALLOWED}
    names.update(name for rules in (FORBIDDEN, ALLOWED) for others in rules.values() for name in others)
    missing = [name for name in names if not (ROOT / name).is_dir() and not (ROOT / f"{name}.py").is_file()]
    assert not missing


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in sources(*PACKAGES, "scripts", "tests")
    }
    assert not {name: length for name, length in lengths.items() if length > LINES}


def test_tests_import_helpers_and_not_each_other() -> None:
    wrong = [
        one
        for path in sources("tests")
        for one in imports(path)
        if any(part == "conftest" or part.startswith("test_") for part in one.module.split("."))
    ]
    assert not wrong, listed(wrong)
