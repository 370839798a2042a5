"""README and docs: commands parse, snippets run, links exist, pictures are drawn from what they show, lines are
short."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.extensions import forget_optimizers
from titan_moe.analysis.sweep.grid import cell_config, cells_of, read_sweep
from titan_moe.cli import parse
from titan_moe.config import extensions
from titan_moe.config.load import load_config
from titan_moe.finetune.load import load_finetune
from torchtitan_ext.terms import REGISTRY

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_documented_commands_parse_and_their_configurations_are_valid(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in blocks(page, "python"):
        if block.startswith("# "):
            (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    monkeypatch.chdir(tmp_path)
    importlib.import_module("titan_moe.analysis.controls")  # its terms stay registered for later tests of this process
    before = dict(REGISTRY)
    try:
        for line in "\n".join(blocks(page, "bash")).replace(" && ", "\n").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words and words[0] == "sbatch":
                script = next(word for word in words if word.endswith(".slurm"))
                assert (ROOT / script).exists()
                words = ["run_train.sh", *words[words.index(script) + 1 :]]
            if words and words[0].endswith(("run_train.sh", "titan-moe")) and "--help" not in words:
                verb = [] if words[0].endswith("titan-moe") else ["train"]
                check_command([*verb, *words[1:]], line)
    finally:
        for table in (REGISTRY, extensions.corpora, extensions.trackers):
            table.clear()
        REGISTRY.update(before)
        forget_optimizers()


def check_command(words: list[str], line: str) -> None:
    """Parses a command and builds every configuration that it would run, for the number of ranks that its line sets."""
    nproc = re.search(r"NPROC=(\d+)", line)
    ranks = (int(nproc.group(1)) if nproc else 1) * (2 if "NNODES=2" in line else 1)
    arguments = parse(words)
    if words[0] == "finetune":
        load_finetune(arguments.config, arguments.overrides, ranks)
    elif words[0] == "sweep":
        path, sweep = read_sweep(arguments.config, arguments.base)
        for cell in cells_of(path, sweep):
            cell_config(cell, sweep, Path("runs"), arguments.overrides, ranks)
    else:
        name, world = getattr(arguments, "config", "debug"), getattr(arguments, "world", ranks)
        load_config(name, arguments.overrides, world_size=world)


def test_readme_snippets() -> None:
    (snippet,) = blocks(ROOT / "README.md", "python")
    exec(snippet, {})


def test_readme_configuration(tmp_path: Path) -> None:
    (snippet,) = blocks(ROOT / "README.md", "toml")
    (tmp_path / "mine.toml").write_text(snippet)
    assert load_config(str(tmp_path / "mine.toml")).model.moe.top_k == 4


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if target.startswith("http"):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_prose_lines_are_at_most_120_characters(page: Path) -> None:
    """Code blocks, tables, images, comments and lines that are one link may be longer."""
    text = re.sub(
        r"^ *```.*?^ *```", lambda block: "\n" * block.group().count("\n"), page.read_text(), flags=re.M | re.S
    )
    longer_allowed = re.compile(r"\||!\[|<!--|\s*([-*] )?\[[^]]*\]\([^)]*\)[.,;:]?$")
    long = [
        f"{page.name}:{number}: {len(line)} characters"
        for number, line in enumerate(text.splitlines(), start=1)
        if len(line) > 120 and not longer_allowed.match(line)
    ]
    assert not long


@pytest.mark.parametrize("script", ["draw_architecture", "draw_losses"])
def test_pictures_are_drawn_from_the_source_and_the_tables(script: str, tmp_path: Path) -> None:
    """The scripts stop when an import points upward in the picture, or a table of the results is missing."""
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), str(picture)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_file_in_the_readmes_tree_exists() -> None:
    tree = re.search(r"## What is where\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree is not None
    parent = ""
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            parent = name if name.endswith("/") else ""
            assert (ROOT / name).exists()
        else:
            assert (ROOT / parent / name).exists()
