"""titan-moe report: a page of curves, heat maps and tables from run directories and what inspect found in them."""

from pathlib import Path

from titan_moe.analysis.report.report import write_report
from titan_moe.errors import UserError
from titan_moe.verbs.words import take_option


def run(words: list[str]) -> int:
    output, words = take_option(words, "--output", "")
    unknown = next((word for word in words if word.startswith("-")), None)
    if unknown is not None or not words:
        wrong = f"no option {unknown!r}" if unknown else "which runs?"
        raise UserError(f"report: {wrong}; titan-moe report RUN DIRECTORY ... [--output DIR]")
    print(write_report([Path(word) for word in words], Path(output) if output else Path(words[0]) / "report"))
    return 0
