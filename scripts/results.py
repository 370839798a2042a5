"""Fills the tables of docs/results_tables.md, results_copied.md and results.md. The text between them is written by hand.

    python scripts/results.py                                    # all tables whose rows are here
    python scripts/results.py --keep DIR --sweep NAME            # first copies a sweep's rows to docs/evidence/NAME/

Rows are taken from docs/evidence/NAME/, else from runs/sweeps/NAME/cells/. A table whose rows are in neither stays as it is,
and the command says so. A table is between a comment and `<!-- end -->`. The comments, first those that need rows:

    <!-- sweep NAME: column; ... -->            the sweep's own tables, with these columns
    <!-- differences NAME: measure; ... -->     every arm minus the baseline, paired by seed, with 95% intervals
    <!-- together NAME: a; b; both; measure ... -->   interaction of a and b: (both - baseline) - (a - baseline)
                                                - (b - baseline), paired by seed
    <!-- between NAME: a; b; measure ... -->    arm b minus arm a, paired by seed
    <!-- tasks NAME: measure; ... -->           zero-shot results with these measures
    <!-- placement NAME: arm; ... -->           traffic of experts placed on eight ranks, for the first seed of those arms;
                                                needs the checkpoints in runs/sweeps/NAME/runs/

and those that can also be made from the tables that the pages have:

    <!-- effects NAME: arm; ... | ; measure ... -->   what these arms do to these measures
    <!-- seeds NAME: margin; ... -->            how many seeds it takes to see such differences of the loss
    <!-- signs NAME: fraction; measure ... -->  ranges of measures over arms with fewer dead experts than that, and with more
    <!-- published NAME: title; NAME2; title2 -->   the paper's figures (docs/evidence/published.toml) beside ours
"""

import argparse
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from results_published import published_table
from results_sources import (
    BLOCK,
    EVIDENCE,
    ROOT,
    SWEEPS,
    TABLE_PAGES,
    PageTables,
    Rows,
    Source,
    find_rows,
    keep_rows,
    read_page,
)
from results_tables import DERIVED_TABLES, ROW_TABLES, has_checkpoints

from titan_moe.errors import UserError
from titan_moe.runtime.files import write_file

PAGES = (*TABLE_PAGES, ROOT / "docs" / "results.md")


class Pages:
    """Fills pages, in this order: the tables of the first are what later ones fall back on."""

    def __init__(self, pages: Sequence[Path], evidence: Path, sweeps: Path) -> None:
        self.pages = pages
        self.rows = lru_cache(maxsize=None)(lambda name: find_rows(name, evidence, sweeps))
        self.kept: dict[str, None] = {}
        """Tables that stayed as they were."""

    def source(self, name: str) -> Source:
        rows: Rows | None = self.rows(name)
        return rows or PageTables(name, self.pages)

    def table(self, kind: str, name: str, words: Sequence[str]) -> str | None:
        """The new table; None where the rows for it are missing. Raises UserError."""
        if kind == "published":
            title, other, other_title = words
            return published_table({one: self.source(one) for one in (name, other)}, {name: title, other: other_title})
        if kind in DERIVED_TABLES:
            return DERIVED_TABLES[kind](self.source(name), words)
        rows: Rows | None = self.rows(name)
        if rows is None or (kind == "placement" and not has_checkpoints(rows, words)):
            self.kept[f"{kind} {name}"] = None
            return None
        return ROW_TABLES[kind](rows, words)

    def fill(self, page: Path) -> None:
        """Writes the page with new tables. Raises UserError."""

        def filled(block: re.Match[str]) -> str:
            opening, kind, name, words, _, end = block.groups()
            if kind not in ROW_TABLES and kind not in DERIVED_TABLES and kind != "published":
                raise UserError(
                    f"{page}: <!-- {kind} {name}: there is no such table; see the top of scripts/results.py"
                )
            text = self.table(kind, name, [word.strip() for word in words.split(";")])
            return block.group() if text is None else f"{opening}{text}\n{end}"

        write_file(page, BLOCK.sub(filled, read_page(page)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="a sweep's directory whose rows are copied to --evidence"
    )
    parser.add_argument(
        "--sweep", metavar="NAME", help="the sweep of --keep: a file of train_configs/sweeps/ (default: DIR's name)"
    )
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="folder of row files (default: docs/evidence)")
    parser.add_argument("--sweeps", type=Path, default=SWEEPS, help="folder of sweeps (default: runs/sweeps)")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=list(PAGES), help="pages to fill, those with the tables first"
    )
    options = parser.parse_args(arguments)
    try:
        if options.keep:
            name = options.sweep or options.keep.resolve().name
            print(f"{options.evidence / name}: {keep_rows(options.keep, name, options.evidence)} rows copied")
        pages = Pages(options.pages, options.evidence, options.sweeps)
        for page in options.pages:
            pages.fill(page)
            print(page)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for kept in pages.kept:
        print(f"stays as it is, without rows or checkpoints: {kept}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
