"""The report: a self-contained page for any runs, of limited size, with the numbers of every plot as CSV."""

import csv
import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.commands import titan_moe
from titan_moe.analysis.evaluate.results import write_results
from titan_moe.analysis.report.figures import INK
from titan_moe.analysis.report.report import task_rows, task_table, write_report
from titan_moe.analysis.report.runs import read_runs
from titan_moe.config.describe import to_toml
from titan_moe.config.load import load_config
from titan_moe.errors import UserError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write_run(folder: Path, name: str, words: list[str], steps: int = 30, checkpoints: int = 2, seed: int = 0) -> Path:
    """Writes a run directory with random metrics and inspections."""
    config = load_config("debug", [f"--job.name={name}", *words])
    layers, moe = config.model.layers, config.model.moe
    random = np.random.default_rng(seed)
    path = folder / name
    (path / "inspect").mkdir(parents=True)
    (path / "config.toml").write_text(to_toml(config))
    names = [
        "reg/lb",
        "reg/sp",
        "reg/mine",
        "moe/max_vio",
        "moe/dead",
        "moe/entropy",
        "moe/topk_mass",
        "moe/overlap",
        "ce",
    ]
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": n, "tokens": n * 100, **{key: float(random.random()) for key in names}}
        for n in range(1, steps + 1)
    ]
    rows.append({"kind": "eval", "step": steps, "eval/piqa/acc": 0.5, "eval/piqa/bits_per_byte": 1.0 + seed})
    rows.append({"kind": "validation", "step": steps, "loss": 4.0 + seed, "perplexity": 55.0, "bits_per_byte": 2.0})
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for number in range(1, checkpoints + 1):
        inspection = random_inspection(layers, moe.experts, random, number > 1)
        (path / "inspect" / f"step-{number * 10:08d}.json").write_text(json.dumps(inspection | {"step": number * 10}))
    return path


def random_inspection(layers: int, experts: int, random: np.random.Generator, later: bool) -> dict[str, Any]:
    kept = {"persistence_top1": 0.5, "persistence_topk": 0.6} if later else {}
    measures = ("entropy", "topk_mass", "margin", "overlap", "overlap_chance", "overlap_y", "overlap_y_chance")
    measures += ("load_variation", "domain_information", "silhouette", "knn_overlap", "knn_overlap_chance")
    layer_rows = [
        {
            **{name: float(random.random()) for name in measures},
            **kept,
            "load": random.integers(0, 1000, experts).tolist(),
            "domain_load": random.integers(0, 1000, (2, experts)).tolist(),
            "erc_M": random.random((experts, experts)).round(7).tolist(),
            "examples": [[["before <b>&amp;", "token</svg>"]] * 8 for _ in range(experts)],
        }
        for _ in range(layers)
    ]
    pairs = [
        {
            "kappa": float(random.random()),
            "kappa_chance": 0.1,
            "cluster_agreement": 0.4,
            "matching": random.permutation(experts).tolist(),
            "cond": random.random((experts, experts)).round(7).tolist(),
        }
        for _ in range(layers - 1)
    ]
    summary = dict.fromkeys((*measures, *kept, "kappa", "kappa_chance", "cluster_agreement"), 0.5)
    return {"layers": layer_rows, "pairs": pairs, "domains": ["a", "b <i>"], "summary": summary}


def write_task_results(run: Path, step: int, value: float, documents: int, name: str = "arc_easy") -> None:
    """A result of `eval` for a checkpoint."""
    rows = [
        {
            "task": "arc_easy",
            "measure": "acc",
            "value": value,
            "standard_error": 0.01,
            "chance": 0.25,
            "documents": documents,
        }
    ]
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    write_results(checkpoint, name, "tasks", rows, {"step": step, "documents": []})


class Page(html.parser.HTMLParser):
    """Ids, links, and whether tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []  # type: ignore[list-item]
        self.targets += [value for key in ("href", "src", "xlink:href") if (value := values.get(key))]
        if tag not in ("meta", "link", "br", "path", "use", "image", "rect", "stop"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_page_is_self_contained_and_every_link_has_a_target(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name, ["--model.layers=3"], seed=n) for n, name in enumerate(("one", "two"))]
    write_task_results(runs[1], 30, 0.125, 100)
    page = write_report(runs, tmp_path / "out")
    text = page.read_text()
    page_tags = Page(text)
    assert page_tags.open == []
    assert len(page_tags.ids) == len(set(page_tags.ids))
    for target in page_tags.targets:
        if target.startswith("#"):
            assert target[1:] in page_tags.ids, target
        elif not target.startswith("data:"):
            assert (tmp_path / "out" / target).is_file(), target
    assert not re.search(r"url\(['\"]?https?:|@import|<script|<iframe|src=\"http", text)
    assert INK not in text
    assert "currentColor" in text
    assert "token&lt;/svg&gt;" in text
    assert "<td>arc_easy</td><td>acc</td>" in text
    assert "#tasks-results" in page_tags.targets
    plots = sorted(path.stem for path in (tmp_path / "out").glob("*.png"))
    assert {
        "loss",
        "task_curves",
        "terms",
        "balance",
        "sharpness",
        "layers",
        "load",
        "kappa",
        "persistence",
        "clusters",
    } <= set(plots)
    assert {"paths-0", "paths-1", "domains-0", "response-1"} <= set(plots)
    for name in plots:
        rows = list(csv.DictReader((tmp_path / "out" / f"{name}.csv").open()))
        assert rows, name
        assert f'id="{name}"' in text
    assert "reg/mine" in (tmp_path / "out" / "terms.csv").read_text()


def test_differences_are_paired_by_step(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name, [], steps=40) for name in ("one", "two")]
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train":
            row["ce"] += 0.25 + 0.01 * (row["step"] % 4)
    (runs[1] / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_report(runs, tmp_path / "out")
    by_measure = {row["measure"]: row for row in csv.DictReader((tmp_path / "out" / "differences.csv").open())}
    assert float(by_measure["ce"]["difference"]) == pytest.approx(0.265, abs=1e-9)
    assert 0.25 < float(by_measure["ce"]["low"]) < 0.265 < float(by_measure["ce"]["high"]) < 0.28
    assert float(by_measure["moe/entropy"]["difference"]) == 0.0


def test_results_on_tasks_are_side_by_side(tmp_path: Path) -> None:
    """The newest checkpoint's, of these the one over most documents; a damaged file is named."""
    paths = [write_run(tmp_path, name, []) for name in ("one", "two", "three")]
    write_task_results(paths[0], 20, 0.5, 100)
    write_task_results(paths[0], 30, 0.25, 7, "arc_easy-piqa")
    write_task_results(paths[0], 30, 0.125, 100)
    write_task_results(paths[1], 10, 0.75, 100)
    losses = [{"file": "a.txt", "domain": "", "perplexity": 3.0}]
    write_results(paths[1] / "checkpoints" / "step-00000030", "text", "text", losses, {"step": 30})
    runs = read_runs(paths)
    cells = ["0.1250 ± 0.0100 (100 documents, step 30)", "0.7500 ± 0.0100 (100 documents, step 10)", ""]
    assert task_table(runs) == [("arc_easy", "acc", "0.2500", cells)]
    assert [(row["run"], row["step"], row["value"]) for row in task_rows(runs)] == [
        ("one", 30, 0.125),
        ("two", 10, 0.75),
    ]
    (paths[2] / "eval").mkdir()
    (paths[2] / "eval" / "step-00000030-piqa.json").write_text('{"kind": "tasks", "step": 30, "rows": [{"task": 1}]}')
    with pytest.raises(UserError, match=r"step-00000030-piqa\.json: damaged: rows\.0\.task.*evaluate the run again"):
        task_table(read_runs(paths))


def test_a_run_without_inspections_gets_a_page_that_names_the_command(tmp_path: Path) -> None:
    run = write_run(tmp_path, "plain", [], checkpoints=0)
    text = write_report([run], tmp_path / "out").read_text()
    assert f"titan-moe inspect {run} --all" in text
    assert not (tmp_path / "out" / "layers.png").exists()


@pytest.mark.slow
def test_the_page_of_a_medium_run_with_twenty_checkpoints_is_below_5_mb(tmp_path: Path) -> None:
    words = ["--model.layers=16", "--model.moe.experts=64", "--model.moe.top_k=4"]
    page = write_report([write_run(tmp_path, "medium", words, steps=3000, checkpoints=20)], tmp_path / "out")
    assert page.stat().st_size < 5e6


def open_in_browser(page: Path, profile: Path) -> subprocess.CompletedProcess[str]:
    """Loads the page in a browser as wide as a phone: the resulting DOM on stdout, console messages on stderr."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,844", "--enable-logging=stderr"]
    command = [str(BROWSER), *options, f"--user-data-dir={profile}", "--dump-dom", f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


PROBE = """<script>
document.querySelectorAll("details").forEach(e => e.open = true);
const reach = e => { e.focus(); return document.activeElement === e; };
const all = [...document.querySelectorAll("*")];
const scrolls = all.filter(e => e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX));
const controls = all.filter(e => e.matches("a[href], summary"));
const unreachable = [...scrolls, ...controls].filter(e => !reach(e)).map(e => e.outerHTML.slice(0, 80));
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.title = JSON.stringify({scrolls: scrolls.length, controls: controls.length, unreachable, wide});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_works_in_a_browser_by_keyboard_and_on_a_narrow_screen(tmp_path: Path) -> None:
    """No console message; every link and scrollable element can get the keyboard focus; the page is not wider than the
    screen."""
    page = write_report([write_run(tmp_path, "one", [])], tmp_path / "out")
    done = open_in_browser(page, tmp_path / "profile")
    assert "expert specialization" in done.stdout
    assert "CONSOLE" not in done.stderr
    probe = page.with_name("probe.html")
    probe.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    title = re.search(r"<title>(.*?)</title>", open_in_browser(probe, tmp_path / "profile").stdout)
    assert title is not None
    seen = json.loads(html.unescape(title[1]))
    assert seen["unreachable"] == []
    assert not seen["wide"]
    assert seen["scrolls"] > 3
    assert seen["controls"] > 20


def test_wrong_arguments_and_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path, "one", [])
    for words, message in (
        ([], "error: the following arguments are required: RUN; see `titan-moe report --help`"),
        (["/nowhere"], "error: /nowhere: not a run directory: there is no such directory; give the directory of a run"),
        ([str(run), "--nonsense"], "error: command line: unknown option --nonsense"),
    ):
        done = titan_moe("report", *words)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert message in done.stderr
    with pytest.raises(UserError, match="the same run is given twice"):
        write_report([run, run], tmp_path / "out")
    with pytest.raises(
        UserError, match=r"--output = '/dev/null/page': can't be written: Not a directory; name another one"
    ):
        write_report([run], Path("/dev/null/page"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"not a run directory: it has no config\.toml; give"):
        write_report([empty], tmp_path / "out")
    (run / "inspect" / "step-00000010.json").write_text("{")
    with pytest.raises(UserError, match=r"step-00000010\.json: can't be read"):
        write_report([run], tmp_path / "out")
