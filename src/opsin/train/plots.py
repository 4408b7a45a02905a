"""The report's drawings, as SVG.

Drawings inside the page take their colours from the page's CSS variables, so that one drawing serves light and dark;
the same drawing goes to a file with fixed colours.
"""

import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from opsin.train.table import Row, frontier

SERIES = (
    "#3b6fd4", "#e07b39", "#2f9e68", "#c2456f", "#8357c9", "#1593a5", "#b28a1e", "#9c5d3c", "#6b7a8f", "#d05ab0",
)  # fmt: skip


ONE_OPTION = re.compile(r"^(?P<form>[\w:.-]+\(\w+)=(?P<value>[^,()=]+)\)$")  # metanet_xt(mixer=tvconv)


@dataclass(frozen=True)
class Theme:
    """Colours of ink, secondary ink, lines and paper."""

    ink: str
    muted: str
    line: str
    paper: str


FILE = Theme("#1c2128", "#656d76", "#d9dee3", "#ffffff")
PAGE = Theme("#010203", "#010204", "#010205", "#010206")  # stand for variables
VARIABLES = {PAGE.ink: "var(--ink)", PAGE.muted: "var(--muted)", PAGE.line: "var(--line)", PAGE.paper: "var(--card)"}


def colours(models: Sequence[str]) -> dict[str, str]:
    """A colour for each model, the same in every drawing."""
    return {model: SERIES[i % len(SERIES)] for i, model in enumerate(models)}


def as_percent(score: str) -> bool:
    """Whether a score is a fraction that reads better as percent."""
    return not score.startswith(("psnr", "loss", "mae", "mse", "rmse"))


def with_spread(value: float, spread: float | None, score: str) -> str:
    """Mean and spread: 98.1 ± 0.3 %."""
    if spread is None:
        return show(value, score)
    number, _, unit = show(value, score).partition(" ")
    return f"{number} ± {show(spread, score).partition(' ')[0]} {unit}".strip()


def show(value: float, score: str, digits: int = 1) -> str:
    """A score for people: 0.981 as 98.1 %, decibels as they are."""
    return f"{100 * value:.{digits}f} %" if as_percent(score) else f"{value:.{digits + 1}f}"


@contextmanager
def _style(theme: Theme, text: str = "none") -> Iterator[None]:
    with mpl.rc_context({
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "svg.fonttype": text,
        "svg.hashsalt": "opsin", "text.color": theme.ink, "axes.labelcolor": theme.muted, "xtick.color": theme.muted,
        "ytick.color": theme.muted, "axes.edgecolor": theme.line, "axes.grid": True, "grid.color": theme.line,
        "grid.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "axes.facecolor": theme.paper, "figure.facecolor": theme.paper, "axes.titlesize": 10.5,
        "axes.titlelocation": "left", "axes.titleweight": "bold", "xtick.major.size": 0, "ytick.major.size": 0,
        "xtick.minor.size": 0, "ytick.minor.size": 0,
    }):  # fmt: skip
        yield


def _inline(figure: Figure, salt: str) -> str:
    """The figure as an SVG element for the page: no fixed size, no identifiers but those that it refers to."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<\?xml.*?<svg", "<svg", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    head, _, body = svg.partition(">")
    svg = re.sub(r'\s(width|height)="[^"]*"', "", head) + ">" + body
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.strip()


def pareto_svg(rows: Sequence[Row], colour: Mapping[str, str], score: str) -> str:
    """Accuracy against latency, for the page."""
    with _style(PAGE):
        return _inline(_pareto(rows, colour, score, PAGE), "pareto")


def save_pareto(rows: Sequence[Row], colour: Mapping[str, str], score: str, folder: Path) -> None:
    """Accuracy against latency as `pareto.svg` and `pareto.png`."""
    with _style(FILE, text="path"):
        figure = _pareto(rows, colour, score, FILE)
        figure.savefig(folder / "pareto.svg", metadata={"Date": None})
        figure.savefig(folder / "pareto.png", dpi=200)


def _pareto(rows: Sequence[Row], colour: Mapping[str, str], score: str, theme: Theme) -> Figure:
    points = [(row, row.latency_ms, row.val) for row in rows if row.val is not None and row.latency_ms]
    rows = [row for row, _, _ in points]
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    x, y = np.array([time for _, time, _ in points]), np.array([value for _, _, value in points])
    if len(x) and x.max() / x.min() > 5:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    bars = _draw_frontier(axes, rows, theme)
    for row, time, value in points:
        spread, quartiles = row.val_sd or 0.0, min((row.latency_iqr_ms or 0.0) / 2, 0.9 * time)
        bars += [(time, time, value - spread, value + spread), (time - quartiles, time + quartiles, value, value)]
        axes.errorbar(
            time, value, spread, quartiles, fmt="o", markersize=8,
            color=colour[row.model], ecolor=colour[row.model], elinewidth=1.4, markeredgecolor=theme.paper,
            markeredgewidth=1.2, zorder=4,
        )  # fmt: skip
    axes.margins(x=0.16, y=0.18)
    axes.set_xlabel("latency of one image, ms (median)")
    axes.set_ylabel(f"validation {score}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: show(v, score)))
    if as_percent(score) and len(y):
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.0 + 0.03 * float(np.ptp(axes.get_ylim()))))
    if axes.get_xscale() == "linear":
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    place_labels(axes, short_names([row.model for row in rows]), x, y, [colour[row.model] for row in rows], bars)
    return figure


def short_names(models: Sequence[str], most: int = 34) -> list[str]:
    """Names that fit into a drawing: what differs alone, where all are one network with one option; or cut.

    Those that would no longer differ stay whole.
    """
    matches = [ONE_OPTION.match(name) for name in models]
    if len({match and match["form"] for match in matches}) == 1 and len(models) > 1 and matches[0]:
        return [match["value"] for match in matches if match]
    short = [name if len(name) <= most else name[: most - 2] + "…)" for name in models]
    return [name if short.count(cut) > 1 else cut for name, cut in zip(models, short, strict=True)]


def _draw_frontier(axes: Axes, rows: Sequence[Row], theme: Theme) -> list[tuple[float, float, float, float]]:
    """The steps from each model worth taking to the next, and where they run (x0, x1, y0, y1)."""
    front = sorted((row.latency_ms or 0.0, row.val or 0.0) for row in frontier(rows))
    if not front:
        return []
    xs, ys = zip(*front, strict=True)
    axes.plot(xs, ys, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)), drawstyle="steps-post", zorder=2)
    steps = list(pairwise(front))
    flat = [(x0, x1, y0, y0) for (x0, y0), (x1, _) in steps]
    return flat + [(x1, x1, min(y0, y1), max(y0, y1)) for (_, y0), (x1, y1) in steps]


def place_labels(
    axes: Axes, texts: Sequence[str], x: NDArray, y: NDArray, colour: Sequence[str],
    bars: Sequence[tuple[float, float, float, float]] = (),
) -> list[Any]:  # fmt: skip
    """Writes a label beside each point where it covers no other label, no point and no bar (x0, x1, y0, y1).

    Greedy over 32 places around a point (eight directions, four distances), nearest first; the place with the least
    overlap is taken where none is free.
    """
    figure: Any = axes.figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # settles the layout
    renderer, scale = canvas.get_renderer(), figure.dpi / 72
    points = axes.transData.transform(np.column_stack([x, y])) if len(texts) else np.empty((0, 2))
    taken = [(px - 7 * scale, py - 7 * scale, px + 7 * scale, py + 7 * scale) for px, py in points]
    for x0, x1, y0, y1 in bars:
        (left, bottom), (right, top) = axes.transData.transform([(x0, y0), (x1, y1)])
        taken.append((left - 2, bottom - 2, right + 2, top + 2))
    frame = axes.get_window_extent(renderer)
    labels = []
    for i in np.argsort(-np.asarray(y)) if len(texts) else []:
        label = axes.annotate(
            texts[i], (x[i], y[i]), (0, 0), textcoords="offset points", fontsize=9.5, zorder=5,
            color=colour[i],
        )  # fmt: skip
        box = label.get_window_extent(renderer)
        offset = _best_place(points[i], (box.width, box.height), taken, frame, scale)
        label.set_position((offset[0] / scale, offset[1] / scale))
        left, bottom = points[i] + offset
        taken.append((left, bottom, left + box.width, bottom + box.height))
        labels.append(label)
    return labels


def _best_place(point: NDArray, size: tuple[float, float], taken: list, frame: Any, scale: float) -> NDArray:
    width, height = size
    best, least = np.zeros(2), math.inf
    for distance, (dx, dy) in product((10, 16, 24, 36), _directions()):
        centre = np.array([dx * (distance * scale + width / 2), dy * (distance * scale * 0.8 + height / 2)])
        offset = centre - np.array([width / 2, height / 2])
        left, bottom = point + offset
        box = (left, bottom, left + width, bottom + height)
        cost = sum(_overlap(box, other) for other in taken) + 4 * _outside(box, frame) + 0.5 * distance
        if cost < least - 1e-9:
            best, least = offset, cost
    return best


def _directions() -> tuple[tuple[float, float], ...]:
    return ((1, 0), (0, 1), (0, -1), (-1, 0), (0.75, 1), (0.75, -1), (-0.75, 1), (-0.75, -1))


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Sequence[float], frame: Any) -> float:
    inside = _overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1))
    return (box[2] - box[0]) * (box[3] - box[1]) - inside


Curve = tuple[NDArray, NDArray]  # seconds or steps, values


def band(curves: Sequence[Curve], points: int = 80) -> tuple[NDArray, NDArray, NDArray]:
    """Place, mean and sample standard deviation over seeds, where every seed has values (linear in between)."""
    start, stop = max(t[0] for t, _ in curves), min(t[-1] for t, _ in curves)
    grid = curves[0][0] if len(curves) == 1 else np.linspace(start, stop, points) if stop > start else np.empty(0)
    values = np.stack([np.interp(grid, t, v) for t, v in curves])
    spread = values.std(0, ddof=1) if len(curves) > 1 else np.zeros_like(grid)
    return grid, values.mean(0), spread


def smooth(curve: Curve, parts: int = 50) -> Curve:
    """The means of a curve over equal parts of its length; as it is where it has no more points than that."""
    place, values = curve
    if len(place) <= parts:
        return curve
    part = np.minimum((parts * (place - place[0]) / (place[-1] - place[0])).astype(int), parts - 1)
    counts = np.maximum(np.bincount(part, minlength=parts), 1)
    means = [np.bincount(part, weights=w, minlength=parts) / counts for w in (place, values)]
    there = np.bincount(part, minlength=parts) > 0
    return means[0][there], means[1][there]


def curves_svg(
    score: Mapping[str, Sequence[Curve]], loss: Mapping[str, Sequence[Curve]], colour: Mapping[str, str], name: str,
    place: str,
) -> str:  # fmt: skip
    """Validation score and training loss over the training (`place` says in what): mean and spread over seeds."""
    with _style(PAGE):
        figure = Figure(figsize=(9.4, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, series in ((left, score), (right, loss)):
            for model, curves in series.items():
                _draw_band(axes, curves, colour[model])
            axes.set_xlabel(place)
            axes.xaxis.set_major_locator(MaxNLocator(6))
        left.set_title(f"validation {name}")
        left.yaxis.set_major_formatter(FuncFormatter(lambda v, _: show(v, name, 0)))
        right.set_title("training loss")
        return _inline(figure, "curves")


def _draw_band(axes: Axes, curves: Sequence[Curve], colour: str) -> None:
    """A thin line for each seed; mean and spread where the seeds overlap."""
    for seconds, values in curves:
        axes.plot(seconds, values, color=colour, linewidth=0.8, alpha=0.35, marker="." if len(values) < 3 else None)
    grid, mean, spread = band(curves)
    axes.fill_between(grid, mean - spread, mean + spread, color=colour, alpha=0.14, linewidth=0)
    axes.plot(grid, mean, color=colour, linewidth=1.8)


def strip_svg(values: Sequence[float], low: float, high: float, colour: str) -> str:
    """A dot per seed, the mean as a bar, one standard deviation as a band, between the lowest and highest of all."""
    width, height, margin = 220, 26, 10
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return margin + (width - 2 * margin) * min(max((value - low) / span, -0.04), 1.04)

    mean = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    left, right = x(mean - spread), x(mean + spread)
    dots = "".join(f'<circle cx="{x(v):.1f}" cy="13" r="3.2" fill="{colour}" fill-opacity=".75"/>' for v in values)
    return (
        f'<svg viewBox="0 0 {width} {height}" class="strip" role="img" aria-label="scores of {len(values)} seeds">'
        f'<line x1="{margin}" x2="{width - margin}" y1="13" y2="13" stroke="var(--line)"/>'
        f'<rect x="{left:.1f}" y="7" width="{max(right - left, 0.1):.1f}" height="12" rx="3" fill="{colour}" '
        f'fill-opacity=".18"/>{dots}'
        f'<rect x="{x(mean) - 1:.1f}" y="4" width="2" height="18" rx="1" fill="{colour}"/></svg>'
    )


def confusion_svg(counts: NDArray, classes: Sequence[str]) -> str:
    """Counts by true (rows) and predicted class (columns); shades show the share of the true class."""
    k = len(classes)
    cell = 34 if k <= 12 else 24 if k <= 20 else max(3, 480 // k)
    named = k <= 40
    longest = max(len(name) for name in classes) if named else 0
    gutter = min(12 + 6.4 * longest, 150) if named else 22
    side = k * cell
    totals = np.maximum(counts.sum(1), 1)
    parts = [f'<svg viewBox="0 0 {gutter + side + 4:.0f} {gutter + side + 4:.0f}" class="confusion" role="img">']
    parts.append(f'<rect x="{gutter:.0f}" y="{gutter:.0f}" width="{side}" height="{side}" fill="var(--soft)" rx="4"/>')
    for i, j in zip(*np.nonzero(counts), strict=True):
        share, x, y = counts[i, j] / totals[i], gutter + j * cell, gutter + i * cell
        title = f"{_text(classes[i])} taken for {_text(classes[j])}: {counts[i, j]} of {totals[i]}"
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{cell - 1}" height="{cell - 1}" rx="{min(3, cell // 8)}" '
            f'fill="var(--{"good" if i == j else "bad"})" fill-opacity="{0.12 + 0.88 * share**0.6:.2f}">'
            f"<title>{title}</title></rect>"
        )
        if k <= 20:
            place = f'x="{x + cell / 2 - 0.5:.1f}" y="{y + cell / 2 + 3.5:.1f}"'
            parts.append(f'<text {place} class="n{" on" if share > 0.45 else ""}">{counts[i, j]}</text>')
    parts += _class_names(classes, gutter, cell) if named else []
    return "".join(parts) + "</svg>"


def _class_names(classes: Sequence[str], gutter: float, cell: int) -> Iterator[str]:
    size = min(11, cell * 0.8)
    for i, name in enumerate(classes):
        shown = _text(name if len(name) <= 22 else name[:21] + "…")
        middle = gutter + (i + 0.5) * cell
        yield f'<text x="{gutter - 7:.1f}" y="{middle + size / 3:.1f}" class="row" font-size="{size}">{shown}</text>'
        place = f'x="{middle:.1f}" y="{gutter - 7:.1f}"'
        if len(max(classes, key=len)) * 6.4 > cell:
            turn = f'transform="rotate(-90 {middle:.1f} {gutter - 7:.1f})" dy="{size / 3:.1f}" class="tilted"'
            yield f'<text {place} {turn} font-size="{size}">{shown}</text>'
        else:
            yield f'<text {place} class="column" font-size="{size}">{shown}</text>'


def _text(name: str) -> str:
    return html.escape(name)
