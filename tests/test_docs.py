"""What README and guides show is right: commands name real options, the snippets run, the links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT
from titan_moe.analysis.sweep.grid import cell_config, cells_of, read_sweep
from titan_moe.config import extensions
from titan_moe.config.load import load_config
from titan_moe.verbs.words import take_flag, take_number, take_option
from torchtitan_ext.terms import REGISTRY

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_have_valid_options(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(page, "python"):
        if block.startswith("# "):
            (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    monkeypatch.chdir(tmp_path)
    before = dict(REGISTRY)
    try:
        for line in "\n".join(blocks(page, "bash")).splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words and words[0].endswith(("run_train.sh", "titan-moe")) and "--help" not in words:
                verb, options = (words[1], words[2:]) if words[0].endswith("titan-moe") else ("train", words[1:])
                check_options(verb, options, line)
    finally:
        for table in (REGISTRY, extensions.corpora, extensions.trackers):
            table.clear()
        REGISTRY.update(before)


def check_options(verb: str, options: list[str], line: str) -> None:
    world = re.search(r"NPROC=(\d+)", line)
    ranks = (int(world.group(1)) if world else 1) * (2 if "NNODES=2" in line else 1)
    if verb == "sweep":
        name, options = take_option(options, "--config", "")
        _, options = take_option(options, "--output", "")
        _, options = take_flag(options, "--tables")
        _, options = take_number(options, "--processes", 1, "")
        base, options = take_option(options, "--base", "")
        path, sweep = read_sweep(name, base)
        for cell in cells_of(path, sweep):
            cell_config(cell, sweep, Path("runs"), options, ranks)
        return
    if verb in ("inspect", "place", "report"):
        for flag in ("--all", "--by-paths"):
            _, options = take_flag(options, flag)
        for option in ("--output", "--text", "--sequences", "--cluster-tokens", "--examples", "--ranks"):
            _, options = take_option(options, option, "")
        options = [word for word in options if word.startswith("-")]
    if verb == "plan":
        ranks, options = take_number(options, "--world", ranks, "")
    name, options = take_option(options, "--config", "debug")
    load_config(name, options, world_size=ranks)


def test_readme_snippets() -> None:
    (snippet,) = blocks(ROOT / "README.md", "python")
    exec(snippet, {})


def test_readme_configuration(tmp_path: Path) -> None:
    (snippet,) = blocks(ROOT / "README.md", "toml")
    (tmp_path / "mine.toml").write_text(snippet)
    assert load_config(str(tmp_path / "mine.toml")).model.moe.top_k == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


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
