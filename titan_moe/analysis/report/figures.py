"""The plots of a report, by matplotlib. Each is an SVG in the page's colours, a PNG, and the numbers behind it."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from titan_moe.analysis.report.runs import Run
from torchtitan_ext.terms import REGISTRY

INK = "#101112"  # replaced in the SVG by the page's text colour
COLOURS = ("#3b8fd6", "#e8743b", "#2ca58d", "#c2549d", "#a98f00", "#7a6ff0", "#8a8a8a")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "titan_moe",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "axes.prop_cycle": cycler(color=COLOURS),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("grid.color", "axes.titlecolor"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
POINTS = 300  # per curve, at most; longer curves are averaged over blocks of steps
WIDTH, HEIGHT = 3.3, 2.3  # inches of one panel
COLUMNS = 3
TERMS = {name: term.title or name for name, term in REGISTRY.items()}

Row = dict[str, Any]


class Plot(NamedTuple):
    """One figure of the page."""

    name: str
    """Stem of its file names, and its id in the page."""
    title: str
    caption: str
    svg: str
    png: bytes
    rows: list[Row]
    """The numbers shown, written as CSV."""


def plot(
    name: str, runs: Sequence[Run], draw: Callable[[Sequence[Run]], tuple[Figure, list[Row]]], suffix: str = ""
) -> Plot:
    """Draws a plot. name: a key of TITLES and CAPTIONS. suffix: distinguishes several plots of that name."""
    with mpl.rc_context(STYLE):
        figure, rows = draw(runs)
        name, title, caption = f"{name}{suffix}", TITLES[name], CAPTIONS[name]
        return Plot(name, title, caption, svg_of(figure, name), png_of(figure), rows)


def svg_of(figure: Figure, prefix: str) -> str:
    """SVG to embed in a page: no XML declaration, ids with `prefix`, the page's text colour, a flexible width."""
    buffer = io.StringIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<image[^>]*?) id="[^"]*"', r"\1", text)  # matplotlib gives equal images equal ids
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = text.replace(INK, "currentColor")
    width = figure.get_figwidth()
    opening, rest = text[: text.index(">")], text[text.index(">") :]
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} style="min-width: {0.6 * width:.1f}in; max-width: {1.3 * width:.1f}in"{rest}'


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def panels(count: int, columns: int = COLUMNS, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of `count` panels."""
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for extra in axes.flat[count:]:
        extra.set_visible(False)
    return figure, list(axes.flat[:count])


def curve(values: Sequence[tuple[int, float]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Steps and values, as means over at most POINTS blocks."""
    points = np.array(values, dtype=np.float64).reshape(-1, 2)
    blocks = np.array_split(points, min(POINTS, max(len(points), 1)))
    means = np.array([block.mean(0) for block in blocks if len(block)]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def over_steps(
    runs: Sequence[Run],
    keys: dict[str, str],
    rows_of: Callable[[Run], Sequence[Row]] = lambda run: run.rows("train"),
    chance: dict[str, float] | None = None,
) -> tuple[Figure, list[Row]]:
    """A panel per measure (key to title) that any run has, a line per run, against the training step.

    rows_of: the rows of a run, by default its training steps. chance: by measure, a level drawn as a dotted line."""
    rows_by_run = [rows_of(run) for run in runs]
    present = {key: title for key, title in keys.items() if any(key in row for rows in rows_by_run for row in rows)}
    figure, axes = panels(len(present))
    written: list[Row] = []
    for (key, title), axis in zip(present.items(), axes, strict=True):
        for number, (run, rows) in enumerate(zip(runs, rows_by_run, strict=True)):
            values = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*curve(values), label=run.name, color=colour(number), marker="." if len(values) < 40 else "")
            written += [{"run": run.name, "measure": key, "step": step, "value": value} for step, value in values]
        if chance and key in chance:
            axis.axhline(chance[key], color=INK, linestyle=":", linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("step")
    legend(figure, axes, runs)
    return figure, written


def inspection_rows(run: Run) -> list[Row]:
    """The summaries of a run's inspections, as rows."""
    return [{"step": one["step"], **one["summary"]} for one in run.inspections]


def task_rows(run: Run) -> list[Row]:
    """The rows of the tasks that were run during training."""
    return run.rows("eval")


def over_layers(
    runs: Sequence[Run], keys: dict[str, tuple[str, str]], part: str = "layers"
) -> tuple[Figure, list[Row]]:
    """A panel per measure of the newest inspections, a line per run, against the MoE layer.

    keys: measure to (title, name of its chance level or ""). part: "layers", or "pairs" of consecutive layers."""
    present = {key: value for key, value in keys.items() if any(key in one for run in runs for one in run.newest[part])}
    figure, axes = panels(len(present))
    rows: list[Row] = []
    for (key, (title, chance)), axis in zip(present.items(), axes, strict=True):
        for number, run in enumerate(runs):
            values = [(n, one) for n, one in enumerate(run.newest[part]) if key in one]
            indices = [n for n, _ in values]
            axis.plot(
                indices,
                [one[key] for _, one in values],
                marker="o",
                markersize=3.5,
                color=colour(number),
                label=run.name,
            )
            if chance and values:
                axis.plot(indices, [one[chance] for _, one in values], linestyle=":", linewidth=1, color=colour(number))
            rows += [
                {"run": run.name, "measure": key, "layer": n, "value": one[key], "chance": one.get(chance, "")}
                for n, one in values
            ]
        axis.set_title(title)
        axis.set_xlabel("MoE layer" if part == "layers" else "from layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, axes, runs)
    return figure, rows


def legend(figure: Figure, axes: Sequence[Axes], runs: Sequence[Run]) -> None:
    if len(runs) > 1 and axes:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 4))


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def heat(axis: Axes, matrix: npt.NDArray[Any], title: str, low: float = 0.0, high: float | None = None) -> Any:
    axis.grid(visible=False)
    image = axis.imshow(matrix, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axis.set_title(title)
    return image


def load_maps(runs: Sequence[Run]) -> tuple[Figure, list[Row]]:
    """A panel per run: every expert's load divided by the mean of its layer, a row per layer."""
    figure, axes = panels(len(runs), columns=2, height=2.6)
    rows: list[Row] = []
    for run, axis in zip(runs, axes, strict=True):
        load = np.array([layer["load"] for layer in run.newest["layers"]], dtype=np.float64)
        relative = load / load.mean(1, keepdims=True).clip(min=1e-30)
        image = heat(axis, np.sort(relative, axis=1)[:, ::-1], run.name, 0.0, max(2.0, float(relative.max())))
        axis.set_xlabel("expert, by load")
        axis.set_ylabel("MoE layer")
        figure.colorbar(image, ax=axis, label="load / mean")
        rows += [
            {"run": run.name, "layer": layer, "expert": expert, "load": int(load[layer, expert])}
            for layer, expert in np.ndindex(*load.shape)
        ]
    return figure, rows


def path_maps(run: Run) -> tuple[Figure, list[Row]]:
    """cond[e, v] of every pair of consecutive layers.

    Experts are ordered by composing the matchings from the first layer on, so matched experts are on the diagonal."""
    pairs = run.newest["pairs"]
    figure, axes = panels(len(pairs), columns=4, height=2.9)
    rows: list[Row] = []
    highest = max(float(np.max(pair["cond"])) for pair in pairs)
    order = np.argsort(-np.array(run.newest["layers"][0]["load"]), kind="stable")
    image = None
    for number, (pair, axis) in enumerate(zip(pairs, axes, strict=True)):
        following = np.array(pair["matching"])[order]
        cond = np.array(pair["cond"])
        image = heat(
            axis, cond[np.ix_(order, following)], f"{number} to {number + 1}: kappa {pair['kappa']:.2f}", 0.0, highest
        )
        axis.set_xlabel(f"experts of layer {number + 1}")
        axis.set_ylabel(f"experts of layer {number}")
        axis.set_xticks([])
        axis.set_yticks([])
        rows += [
            {"pair": number, "expert": e, "next": v, "cond": cond[e, v], "matched": int(pair["matching"][e]) == v}
            for e, v in np.ndindex(*cond.shape)
        ]
        order = following
    if image is not None:
        figure.colorbar(image, ax=axes, label="P(next | expert)")
    return figure, rows


def domain_maps(run: Run) -> tuple[Figure, list[Row]]:
    """A panel per layer: the fraction of each domain in every expert's assignments. Experts are sorted by main
    domain."""
    layers, domains = run.newest["layers"], run.newest["domains"]
    figure, axes = panels(len(layers), columns=2, height=0.9 + 0.18 * len(domains))
    rows: list[Row] = []
    for number, (layer, axis) in enumerate(zip(layers, axes, strict=True)):
        load = np.array(layer["domain_load"], dtype=np.float64)
        fraction = load / load.sum(0).clip(min=1)
        order = np.lexsort((-fraction.max(0), fraction.argmax(0)))
        heat(
            axis,
            fraction[:, order],
            f"layer {number}: I(expert; domain) {layer['domain_information']:.2f} nats",
            0.0,
            1.0,
        )
        axis.set_yticks(range(len(domains)), domains)
        axis.set_xticks([])
        axis.set_xlabel("experts")
        rows += [
            {"layer": number, "domain": domains[d], "expert": e, "assignments": int(load[d, e])}
            for d, e in np.ndindex(*load.shape)
        ]
    return figure, rows


def response_maps(run: Run) -> tuple[Figure, list[Row]]:
    """A panel per layer: erc's M."""
    layers = run.newest["layers"]
    figure, axes = panels(len(layers), columns=4, height=2.7)
    rows: list[Row] = []
    image = None
    for number, (layer, axis) in enumerate(zip(layers, axes, strict=True)):
        matrix = np.array(layer["erc_M"])
        image = heat(axis, matrix, f"layer {number}", 0.0, 1.5)
        axis.set_xlabel("expert")
        axis.set_ylabel("routing vector")
        rows += [{"layer": number, "vector": i, "expert": j, "M": matrix[i, j]} for i, j in np.ndindex(*matrix.shape)]
    if image is not None:
        figure.colorbar(image, ax=axes, label="M / its diagonal")
    return figure, rows


CAPTIONS = {
    "loss": "Training: means over blocks of steps. Validation: text that is not trained on.",
    "task_curves": "Every eval.every steps, on the first documents of each task.",
    "terms": "Unweighted sums over layers. lb is 1 per layer when balanced; cp >= -(number of layer pairs).",
    "balance": "max_vio: assignments of the busiest expert / mean, minus 1. Dead: fraction of experts without a token.",
    "sharpness": "Entropy of the routing scores in nats; score mass on the chosen experts; mean squared cosine of the "
    "activations of experts chosen for the same token (dotted: chance level 1/F).",
    "layers": "At the newest checkpoint. Dotted: chance level. overlap y: of the experts' outputs, not activations.",
    "load": "Assignments of each expert divided by the mean of its layer, sorted.",
    "paths": "Probability of each expert of the next layer, given an expert of this layer. Experts are ordered by the "
    "best one-to-one matching from layer to layer: a bright diagonal means that tokens follow fixed paths.",
    "kappa": "kappa: fraction of tokens whose first choices follow the best one-to-one matching (dotted: chance level, "
    "from the loads). Cluster agreement: fraction of tokens in matching clusters of router inputs.",
    "persistence": "Compared with the checkpoint before: fraction of tokens with the same first choice, and fraction "
    "of the k choices that are the same.",
    "clusters": "Router inputs grouped by first expert: silhouette, and fraction of a token's ten nearest neighbours "
    "with another expert.",
    "domains": "Fraction of each domain of text in every expert's assignments.",
    "response": "Activation norm of expert j for routing vector i, divided by that of expert i. When it is below 1 off "
    "the diagonal, every expert responds most to its own routing vector.",
}
TITLES = {
    "loss": "Cross-entropy",
    "task_curves": "Tasks during training",
    "terms": "Regularizers",
    "balance": "Balance",
    "sharpness": "Sharpness and overlap",
    "layers": "Measures by layer",
    "load": "Load by expert",
    "paths": "Transitions between experts",
    "kappa": "Paths and clusters by pair of layers",
    "persistence": "Persistence between checkpoints",
    "clusters": "How router inputs group by expert",
    "domains": "Domains by expert",
    "response": "Response of experts to routing vectors (M of erc)",
}
BY_LAYER = {
    "entropy": ("routing entropy", ""),
    "topk_mass": ("top-k mass", ""),
    "margin": ("margin of the k-th score", ""),
    "overlap": ("overlap", "overlap_chance"),
    "overlap_y": ("overlap y", "overlap_y_chance"),
    "load_variation": ("load: standard deviation / mean", ""),
}
BY_PAIR = {"kappa": ("kappa", "kappa_chance"), "cluster_agreement": ("cluster agreement", "")}
ROUTER_INPUTS = {
    "silhouette": ("silhouette", ""),
    "knn_overlap": ("neighbours with another expert", "knn_overlap_chance"),
}
OVER_TIME = {"persistence_top1": "first choice", "persistence_topk": "all choices", "kappa": "kappa, mean of pairs"}


def plots(runs: Sequence[Run]) -> Iterator[tuple[str, list[Plot]]]:
    """Sections of the page with their plots. A section without data is left out."""
    first = runs[0].config
    chance = {} if first.base else {"moe/overlap": 1.0 / first.model.moe.hidden_dim}
    terms = {f"reg/{name}": title for name, title in TERMS.items()} | custom_terms(runs)
    balance = {"moe/max_vio": "max_vio", "moe/dead": "dead experts"}
    sharpness = {"moe/entropy": "routing entropy", "moe/topk_mass": "top-k mass", "moe/overlap": "overlap"}
    yield (
        "Loss",
        [
            plot("loss", runs, losses),
            plot("terms", runs, lambda runs: over_steps(runs, terms)),
        ],
    )
    measures = (key for run in runs for row in run.rows("eval") for key in row if key.startswith("eval/"))
    tasks = {key: key.removeprefix("eval/") for key in measures}
    if tasks:
        yield "Tasks during training", [plot("task_curves", runs, lambda runs: over_steps(runs, tasks, task_rows))]
    yield (
        "Balance and sharpness over time",
        [
            plot("balance", runs, lambda runs: over_steps(runs, balance)),
            plot("sharpness", runs, lambda runs: over_steps(runs, sharpness, chance=chance)),
        ],
    )
    inspected = [run for run in runs if run.inspections]
    if not inspected:
        return
    yield (
        "Layers",
        [
            plot("layers", inspected, lambda runs: over_layers(runs, BY_LAYER)),
            plot("load", inspected, load_maps),
        ],
    )
    coupled = [run for run in inspected if run.newest["pairs"]]
    if coupled:
        yield (
            "Paths through depth",
            [
                *plot_per_run("paths", coupled, path_maps),
                plot("kappa", coupled, lambda runs: over_layers(runs, BY_PAIR, "pairs")),
            ],
        )
    if any("persistence_top1" in one["summary"] for run in inspected for one in run.inspections):
        yield (
            "Persistence",
            [plot("persistence", inspected, lambda runs: over_steps(runs, OVER_TIME, inspection_rows))],
        )
    if any("knn_overlap" in layer for run in inspected for layer in run.newest["layers"]):
        yield "Router inputs", [plot("clusters", inspected, lambda runs: over_layers(runs, ROUTER_INPUTS))]
    mixed = [run for run in inspected if len(run.newest["domains"]) > 1]
    if mixed:
        yield "Domains", plot_per_run("domains", mixed, domain_maps)
    yield "Routing vectors and experts", plot_per_run("response", inspected, response_maps)


def plot_per_run(name: str, runs: Sequence[Run], draw: Callable[[Run], tuple[Figure, list[Row]]]) -> list[Plot]:
    """One plot per run, named in its title when there are several."""
    result = []
    for number, run in enumerate(runs):
        one = plot(name, [run], lambda runs: draw(runs[0]), suffix=f"-{number}" if len(runs) > 1 else "")
        result.append(one._replace(title=f"{one.title}: {run.name}") if len(runs) > 1 else one)
    return result


def losses(runs: Sequence[Run]) -> tuple[Figure, list[Row]]:
    """Training and validation loss side by side."""
    figure, axes = panels(2, columns=2, height=2.8)
    rows: list[Row] = []
    for axis, (kind, key, title) in zip(
        axes, (("train", "ce", "training"), ("validation", "loss", "validation")), strict=True
    ):
        for number, run in enumerate(runs):
            values = [(row["step"], row[key]) for row in run.rows(kind)]
            axis.plot(*curve(values), color=colour(number), label=run.name, marker="." if kind == "validation" else "")
            rows += [
                {"run": run.name, "measure": f"{kind} loss", "step": step, "value": value} for step, value in values
            ]
        axis.set_title(f"{title}, nats per token")
        axis.set_xlabel("step")
    legend(figure, axes, runs)
    return figure, rows


def custom_terms(runs: Sequence[Run]) -> dict[str, str]:
    """Metrics of the user's own regularizers, to their names."""
    keys = (key for run in runs for row in run.rows("train")[:1] for key in row)
    return {key: key.removeprefix("reg/") for key in keys if key.startswith("reg/") and key[4:] not in TERMS}
