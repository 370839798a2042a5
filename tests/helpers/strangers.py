"""Run directories as someone else could have made them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titan_moe.checkpoint.manifest import MANIFEST_FILE, entry_of, write_manifest
from titan_moe.cli import parse


def verb(*words: str) -> int:
    """Runs a verb of the command line in this process. Raises UserError as the verb does."""
    arguments = parse([*words])
    status: int = arguments.run(arguments)
    return status


def copied_run(run: Path, folder: Path) -> Path:
    """A copy of a run directory with its newest checkpoint only."""
    copy = folder / "download" / run.name
    newest = max((run / "checkpoints").glob("step-*"))
    shutil.copytree(newest, copy / "checkpoints" / newest.name)
    for name in ("config.toml", "metrics.jsonl", "tokenizer.model"):
        shutil.copyfile(run / name, copy / name)
    return copy


def checkpoint_of(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def sign(checkpoint: Path) -> None:
    """Writes a manifest that agrees with the files: whoever changes them can do that."""
    files = [path for path in checkpoint.iterdir() if path.name != MANIFEST_FILE]
    write_manifest(
        checkpoint, int(checkpoint.name.removeprefix("step-")), {path.name: entry_of(path) for path in files}
    )


def edit_state(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes state.json of a run's newest checkpoint, and its manifest to agree."""
    path = checkpoint_of(run) / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    sign(checkpoint_of(run))


def edit_config(run: Path, old: str, new: str) -> Path:
    """Replaces a line of a run's config.toml, and returns the file."""
    path = run / "config.toml"
    text = path.read_text()
    line = next(line for line in text.splitlines() if line.startswith(old))
    path.write_text(text.replace(line, new, 1))
    return path


def program(folder: Path) -> tuple[Path, Path]:
    """A module that writes a file when it is imported, and that file."""
    marker, module = folder / "it-ran", folder / "program.py"
    module.write_text(f"open({str(marker)!r}, 'w').close()\n")
    return module, marker
