"""Runs what is left of the sweeps of train_configs/evidence.toml, for M minutes, and keeps the rows of finished cells.

    python scripts/evidence.py --text            once, with network: text, tokenizer and token shards in runs/evidence
    python scripts/evidence.py --minutes 14      on the first GPU, or on the CPU where there is none
    python scripts/results.py                    then: the tables of docs/results.md, from all rows

Rows are files of docs/evidence/SWEEP/, one per cell. A cell that has one is not run again, on whatever machine it was made;
an unfinished one goes on from its newest checkpoint if runs/sweeps/SWEEP is still there. Nothing is committed.

runs/evidence is all that another machine needs: copy it there. Exit status: 0 when the time is over or nothing is left, 1
when a cell failed, 2 for the user's mistake, 130 after Ctrl-C, 143 after SIGTERM. After both, running cells have saved and
rows are kept; after SIGKILL the rows of this sitting are in runs/sweeps/SWEEP/cells only, and the next sitting keeps them.
"""

import argparse
import gzip
import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from titan_moe.analysis.sweep.grid import read_sweep
from titan_moe.analysis.sweep.rows import FOLDER
from titan_moe.analysis.sweep.sweep import SweepState, run_sweep
from titan_moe.config.load import load_config
from titan_moe.data.corpora import domains
from titan_moe.data.prepare import prepare
from titan_moe.data.tokenizer import train_tokenizer
from titan_moe.errors import UserError
from titan_moe.runtime.home import cache_folder
from titan_moe.verbs.sweep import minutes

ROOT = Path(__file__).resolve().parent.parent
TEXT = Path("runs") / "evidence" / "text"
TOKENIZER = "tokenizer.model"
SUMS = ROOT / "docs" / "evidence" / "text.json"
STYLES = ("evidence", "evidence_upcycled", "evidence_deepseek", "evidence_upcycled_bias")
MORE = "_more"
SWEEPS = (*STYLES, *(f"{style}{MORE}" for style in STYLES))
"""In the order in which they are wanted. Those with the other arms share the baseline's rows with those before."""
PIECES = 8192


def make_text() -> None:
    """Writes the documents of the corpus `domains`, a compressed file of JSON lines per domain, and a tokenizer, and tokenises
    them. Raises UserError when the files are not those of the rows in the repository."""
    documents = list(domains(cache_folder()).documents())
    TEXT.mkdir(parents=True, exist_ok=True)
    for domain in sorted({document.domain for document in documents}):
        rows = "".join(f"{json.dumps({'text': d.text})}\n" for d in documents if d.domain == domain)
        (TEXT / f"{domain}.jsonl.gz").write_bytes(gzip.compress(rows.encode(), mtime=0))
    (TEXT / TOKENIZER).write_bytes(train_tokenizer((document.text for document in documents), PIECES))
    if not SUMS.exists():
        SUMS.parent.mkdir(parents=True, exist_ok=True)
        SUMS.write_text(json.dumps(checksums(), indent=1) + "\n")
    check_text()
    prepared = prepare(load_config("evidence", []))
    for name, split in prepared.manifest.splits.items():
        print(f"{name}: {split.tokens:,} tokens")
    size = sum(path.stat().st_size for path in TEXT.parent.rglob("*") if path.is_file())
    print(f"{TEXT.parent}: {size / 1e6:.0f} MB")


def checksums() -> dict[str, str]:
    """SHA-256 of the text in every file, uncompressed, and of the tokenizer."""
    read: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".model": bytes}
    files = sorted(path for path in TEXT.iterdir() if path.suffix in read)
    return {path.name: hashlib.sha256(read[path.suffix](path.read_bytes())).hexdigest() for path in files}


def check_text() -> None:
    """Raises UserError when the text is missing, or is not the one of the rows in the repository."""
    if not TEXT.is_dir():
        raise UserError(
            f"{TEXT}: there is no text; python scripts/evidence.py --text makes it, or copy {TEXT.parent} here"
        )
    found, wanted = checksums(), json.loads(SUMS.read_text())
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{TEXT / name}: is not the text of the rows in {SUMS.parent}: python.jsonl.gz is the standard library of "
                f"Python 3.11.7; copy {TEXT.parent} from where they were made, or delete {SUMS} and the rows"
            )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the sweeps one after the other until the minutes are over."""
    states = {}
    for name in options.sweeps:  # a mistake is found before anything runs
        folder = options.output / read_sweep(name)[0].stem
        states[name] = SweepState(name, "", folder, overrides, 1, options.trust)
    end, status = time.monotonic() + 60 * options.minutes, 0
    for name, state in states.items():
        began, folder, cells = time.monotonic(), state.folder, state.cells
        stem, rows = folder.name, options.rows / folder.name
        if began >= end:
            print(f"{stem}: not started, the time is over")
            continue
        share_baseline(options.rows, stem, [cell.name for cell in cells if cell.arm == "lb"])
        keep(folder / FOLDER, rows)
        before = count(rows)
        try:
            status = max(
                status,
                run_sweep(
                    name,
                    "",
                    folder,
                    overrides,
                    options.processes,
                    minutes=(end - began) / 60,
                    sources=[rows] if before else [],
                    trust=options.trust,
                ),
            )
        finally:
            keep(folder / FOLDER, rows)
            report(stem, before, count(rows), len(cells), time.monotonic() - began)
    return status


def share_baseline(rows: Path, sweep: str, cells: Sequence[str]) -> None:
    """Gives a sweep with the other arms the baseline's rows of the sweep before: the same runs."""
    if sweep.endswith(MORE):
        keep(rows / sweep.removesuffix(MORE), rows / sweep, cells)


def keep(cells: Path, rows: Path, names: Sequence[str] | None = None) -> None:
    """Copies rows that are not there yet. names: of these cells only."""
    for path in sorted(cells.glob("*.json")):
        if (names is None or path.stem in names) and not (rows / path.name).exists():
            rows.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, rows / path.name)


def count(rows: Path) -> int:
    return len(list(rows.glob("*.json")))


def report(name: str, before: int, done: int, wanted: int, seconds: float) -> None:
    """Prints how many cells are done, and how long the others take if each takes as long as those of this sitting, in which
    preparation and unfinished cells count too."""
    new = done - before
    line = f"{name}: {done} of {wanted} cells have rows, {new} of them new"
    if new and done < wanted:
        line += f", {seconds / new / 60:.1f} minutes each; about {(wanted - done) * seconds / new / 60:.0f} minutes are left"
    print(line)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", action="store_true", help="make the text, the tokenizer and the token shards")
    what.add_argument("--minutes", metavar="M", help="run what is left, for M minutes")
    parser.add_argument("--rows", type=Path, default=SUMS.parent, help="folder of row files (default: docs/evidence)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs") / "sweeps", help="folder of the sweeps' directories"
    )
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), help=f"default: {' '.join(SWEEPS)}")
    parser.add_argument(
        "--processes", type=int, default=1, help="cells at the same time, on one GPU or CPU (default: 1)"
    )
    parser.add_argument("--trust", action="store_true", help="import modules that files of your own name")
    options, overrides = parser.parse_known_args(words)
    try:
        if options.text:
            make_text()
            return 0
        options.minutes = minutes(options.minutes)
        if not any(word.startswith("--data.corpus") for word in overrides):
            check_text()
        return run(options, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
