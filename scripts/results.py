"""Fills the tables of docs/results.md from the sweeps that it tells of. The prose between them is written by hand.

    for sweep in nano_lr nano_weights nano nano_upcycled_weights nano_upcycled; do
        titan-moe sweep --config $sweep --processes 2
    done
    python scripts/results.py [--sweeps runs/sweeps]

A table stands between `<!-- sweep NAME: column, ... -->` and `<!-- end -->`; `<!-- placement NAME: arm; ... -->` holds the
traffic of experts placed on eight ranks, for the first seed of those arms.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
RANKS = 8
BLOCK = re.compile(r"(<!-- (sweep|placement) (\w+): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def sweep_table(folder: Path, columns: Sequence[str]) -> str:
    """The sweep's own tables, with these columns only."""
    lines, places = [], None
    for line in (folder / "results.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            lines.append(line)
            places = None
            continue
        if places is None:
            missing = [column for column in columns if column not in cells]
            if missing:
                sys.exit(f"{folder / 'results.md'} has no column {missing[0]!r}; it has {', '.join(cells)}")
            places = [cells.index(column) for column in columns]
        lines.append(f"| {' | '.join(cells[place] for place in places)} |")
    return "\n".join(lines).strip()


def placement_table(folder: Path, arms: Sequence[str]) -> str:
    """Share of routed rows that cross ranks, on text that the placement was not fitted on."""
    with (folder / "results.csv").open(encoding="utf-8") as file:
        seed = next(csv.DictReader(file))["seed"]
    lines: list[str] = []
    for arm in arms:
        run = folder / "runs" / f"{arm.replace(' ', '_')}--seed{seed}"
        order = run / f"order-{RANKS}-ranks.json"
        if not order.exists():
            command = [sys.executable, "-m", "titan_moe.cli", "place", str(run), f"--ranks={RANKS}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        traffic = json.loads(order.read_text(encoding="utf-8"))["traffic"]
        if not lines:
            lines = [f"| arm | {' | '.join(traffic)} |", f"|{'---|' * (len(traffic) + 1)}"]
        shares = [f"{one['other']['share']:.3f} (load {one['other']['load']:.2f})" for one in traffic.values()]
        lines.append(f"| {arm} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=Path, default=Path("runs") / "sweeps")
    options = parser.parse_args()

    def filled(block: re.Match[str]) -> str:
        opening, kind, name, words, end = block.groups()
        if not (options.sweeps / name / "results.md").exists():
            sys.exit(f"{options.sweeps / name}: no results; run `titan-moe sweep --config {name}` first")
        make = sweep_table if kind == "sweep" else placement_table
        parts = [part.strip() for part in words.split(";" if kind == "placement" else ",")]
        return f"{opening}{make(options.sweeps / name, parts)}\n{end}"

    PAGE.write_text(BLOCK.sub(filled, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
