"""Writes one HTML page of curves, heat maps and tables about runs, with the results that `titan-moe inspect` wrote.

example: titan-moe report runs/debug runs/without --output runs/comparison
"""

from argparse import ArgumentParser, Namespace

from titan_moe.verbs.arguments import directory_argument, path_argument


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--output", type=directory_argument, metavar="DIR", help="where to write (default: report/ in the first RUN)"
    )


def run(arguments: Namespace) -> int:
    from titan_moe.analysis.report.report import write_report

    print(write_report(arguments.runs, arguments.output or arguments.runs[0] / "report"))
    return 0
