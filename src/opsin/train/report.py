"""The report of a comparison: one HTML file that needs nothing else, and the exported winner beside it."""

import json
import re
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from markupsafe import Markup, escape

from opsin.data import Data
from opsin.deploy.export import write as export
from opsin.deploy.runner import OnnxRunner, Runner
from opsin.errors import OpsinError
from opsin.tasks.registry import task_by_name
from opsin.train.comparison import Comparison
from opsin.train.plots import (
    Curve,
    as_percent,
    colours,
    confusion_svg,
    curves_svg,
    pareto_svg,
    save_pareto,
    short_names,
    show,
    smooth,
    strip_svg,
    with_spread,
)  # fmt: skip
from opsin.train.progress import duration
from opsin.train.run import Run
from opsin.train.samples import Answers, Samples, answers, choose, confused_pairs, explained_samples
from opsin.train.table import Row, frontier

WINNER, WINNER_FACTS = "winner.onnx", "winner.json"
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Winner:
    """The exported winner. reason: why there is no file, where there is none.

    difference: the largest absolute one between the file's outputs and PyTorch's. latency_ms: of the file, one image.
    """

    model: str
    run: str
    weights: str
    difference: float | None = None
    bytes: int = 0
    latency_ms: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Showcase:
    """What a classifier does on held-out images."""

    split: str
    images: int
    accuracy: float
    confusion: Markup
    confused: list[tuple[str, str, int]]
    samples: Samples


def write_report(comparison: Comparison, data: Data, jobs: int = 1) -> Path:
    """Exports the winner and writes report.html, pareto.svg and pareto.png into the comparison's folder."""
    run = Run.load(comparison.best_run)
    model = run.model()
    winner = export_winner(comparison, run, data)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= FILTERS
    page = environment.get_template("report.html.j2").render(
        **results(comparison), comparison=comparison, data=data, size=data.size, jobs=jobs,
        winner=winner,
        circumstances=comparison.circumstances, command=command(comparison, jobs), showcase=showcase(model, data),
        snippet=onnx_snippet(winner, run), date=today(),
    )  # fmt: skip
    partial = comparison.folder / ".report.html"
    partial.write_text(page, encoding="utf-8")
    return partial.replace(comparison.report)


def results(comparison: Comparison) -> dict[str, Any]:
    """What the tables say, in words and drawings."""
    s, rows = comparison.settings, comparison.ranking
    score, colour = task_by_name(s.task).score, colours(s.models)
    save_pareto(rows, colour, score, comparison.folder)
    return {
        "s": s, "rows": rows, "best": rows[0], "score": score, "colour": colour, "percent": as_percent(score),
        "short": dict(zip(s.models, short_names(s.models), strict=True)),
        "show": lambda value: show(value, score), "gap": lambda value: gap(value, score),
        "pm": lambda value, spread: with_spread(value, spread, score),
        "verdict": verdict(rows, score, s.samples.get("val")), "strips": strips(comparison, colour),
        "pareto": Markup(pareto_svg(rows, colour, score)), "frontier": [row.model for row in frontier(rows)],
        "curves": curves(comparison, score, colour),
        "failed": comparison.query("SELECT model, seed, reason FROM trials WHERE status = 'failed' ORDER BY ALL"),
    }  # fmt: skip


def today() -> str:
    now = datetime.now()
    return f"{now.day} {now:%B %Y}"


def export_winner(comparison: Comparison, run: Run, data: Data) -> Winner:
    """Writes winner.onnx, unless it is there already and was made of these weights.

    Where images differ in size, the file takes images of the size of the first one that was validated on.
    """
    folder = comparison.folder
    weights = sha256((run.path / "weights.safetensors").read_bytes()).hexdigest()[:16]
    known = folder / WINNER_FACTS
    if known.is_file() and (folder / WINNER).is_file():
        there = Winner(**json.loads(known.read_text(encoding="utf-8")))
        if (there.weights, there.run) == (weights, run.path.name):
            return there
    name = run.config["request"]["model"]
    try:
        height, width = data.size or data.val[0][0].shape[-2:]
        file = export(run, folder / WINNER, input_size=(height, width), force=True)
        time_ms = _latency(OnnxRunner(file.path))
        winner = Winner(name, run.path.name, weights, file.difference, file.bytes, time_ms)
    except OpsinError as error:
        (folder / WINNER).unlink(missing_ok=True)
        winner = Winner(name, run.path.name, weights, reason=str(error))
    known.write_text(json.dumps(asdict(winner), indent=1) + "\n", encoding="utf-8")
    return winner


def _latency(runner: Runner, repeats: int = 30) -> float:
    """Median milliseconds for one image."""
    image = torch.rand(1, runner.facts.channels, *runner.facts.size)
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        runner(image)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def verdict(rows: Sequence[Row], score: str, val_images: int | None) -> list[str]:
    """What the numbers allow to say, in sentences, and what they do not."""
    best, ranked = rows[0], [row for row in rows if row.val is not None]
    others = ranked[1:]
    if not others:
        return ["There is nothing to compare it with."]
    if best.seeds < 2:
        return ["With one seed no difference between models can be told from chance; run it with --seeds 3 or more."]
    tied = [row for row in others if row.tied]
    said = []
    if len(tied) < len(others):
        clear = len(others) - len(tied)
        everything = "every other model" if not tied else f"{clear} of the {len(others)} other models"
        said.append(f"It is ahead of {everything} by more than the error over {best.seeds} paired seeds.")
    if tied:
        gaps = [f"{row.model} ({_gap(row, score)} behind)" for row in tied]
        said.append(f"{best.seeds} seeds do not tell it apart from {_listed(gaps)}: these are within the error.")
        fastest = best if best.seeds < 3 else min([best, *tied], key=lambda row: row.latency_ms or float("inf"))
        if fastest is not best and best.latency_ms and fastest.latency_ms:
            times = best.latency_ms / fastest.latency_ms
            said.append(f"The fastest of these is {fastest.model}, {times:.1f} times as fast as {best.model}.")
    if val_images and as_percent(score):
        said.append(f"One validation image is worth {100 / val_images:.2g} points.")
    return said


def _gap(row: Row, score: str) -> str:
    return points(row.behind.mean, score) if row.behind else "no seed in common"


def points(value: float, score: str) -> str:
    """A difference of scores with its unit: points of a percentage, or the score's own."""
    return f"{gap(value, score)} {'points' if as_percent(score) else score.upper()}"


def gap(value: float, score: str) -> str:
    """A difference of scores as a number, in points where the score is shown as percent."""
    return (f"{100 * value:.1f}" if as_percent(score) else f"{value:.2f}").replace("-", "−")


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def strips(comparison: Comparison, colour: Mapping[str, str]) -> dict[str, Markup]:
    """For each model its validation scores on one scale: a dot per seed, mean and spread."""
    values: dict[str, list[float]] = {}
    for row in comparison.query("SELECT model, val FROM scores ORDER BY seed"):
        values.setdefault(row["model"], []).append(row["val"])
    low, high = min(map(min, values.values())), max(map(max, values.values()))
    return {model: Markup(strip_svg(v, low, high, colour[model])) for model, v in values.items()}


def curves(comparison: Comparison, score: str, colour: Mapping[str, str]) -> Markup:
    """Learning curves of all trials that were not lost: over seconds where time is the budget, else over steps."""
    place = "step" if comparison.settings.epochs else "seconds"
    loss = _series(comparison, "train", "loss", place)
    loss = {model: [smooth(curve) for curve in seeds] for model, seeds in loss.items()}
    words = {"step": "steps", "seconds": "seconds of training"}
    return Markup(curves_svg(_series(comparison, "val", score, place), loss, colour, score, words[place]))


def _series(comparison: Comparison, split: str, name: str, place: str) -> dict[str, list[Curve]]:
    rows = comparison.query(
        f"SELECT c.model, c.seed, list(c.{place} ORDER BY step) AS t, list(value ORDER BY step) AS v FROM curves c "
        f"JOIN scores s USING (model, seed) WHERE split = '{split}' AND name = '{name}' AND isfinite(value) "
        "GROUP BY c.model, c.seed ORDER BY c.model, c.seed"
    )
    series: dict[str, list[Curve]] = {}
    for row in rows:
        series.setdefault(row["model"], []).append((np.array(row["t"]), np.array(row["v"])))
    return series


def showcase(model: torch.nn.Module, data: Data) -> Showcase | None:
    """Confusions and samples on the test split; None for tasks without classes per image."""
    if data.task != "classify" or data.size is None:
        return None
    split = "test" if "test" in data.splits else "val"
    found: Answers = answers(model, data.test)
    confusion = found.confusion(len(data.classes))
    return Showcase(
        split, len(found.targets), found.accuracy, Markup(confusion_svg(confusion.numpy(), data.classes)),
        confused_pairs(confusion, data.classes),
        explained_samples(model, data.test, found, choose(found), data.classes),
    )  # fmt: skip


def command(comparison: Comparison, jobs: int) -> str:
    """The command line that repeats the comparison; in Python where it has no option for what was asked."""
    s = comparison.settings
    if not set(s.data_options) <= {"size", "crop", "limit", "degrade"}:
        length = f"epochs={s.epochs}" if s.epochs else f"budget={s.budget:g}"
        return (
            f"opsin.compare({s.data!r}, {list(s.models)}, recipe={list(s.recipe)}, {length}, seeds={list(s.seeds)}, "
            f"out={str(comparison.folder)!r}, data_options={s.data_options})"
        )
    words = ["opsin", "compare", s.data, "--models", ",".join(s.models)]
    words += [w for recipe in s.recipe for w in ("--recipe", recipe)]
    words += ["--epochs", str(s.epochs)] if s.epochs else ["--budget", f"{s.budget:g}s"]
    words += ["--seeds", str(len(s.seeds))]
    words += [w for name, value in s.data_options.items() for w in (f"--{name}", str(value))]
    words += ["--jobs", str(jobs)] if jobs > 1 else []
    return shlex.join([*words, "--out", str(comparison.folder)])


def onnx_snippet(winner: Winner, run: Run) -> str:
    """Python that runs the exported file without Opsin."""
    data = run.config["data"]
    if winner.reason or not data["size"]:
        return ""
    height, width = data["size"]
    mode = "L" if data["channels"] == 1 else "RGB"
    tail = [
        f'session = onnxruntime.InferenceSession("{WINNER}")',
        'logits = session.run(None, {"image": pixels})[0][0]',
    ]
    if run.config["request"]["task"] == "classify":
        tail += [
            'classes = json.loads(session.get_modelmeta().custom_metadata_map["opsin"])["classes"]',
            "print(classes[int(logits.argmax())])",
        ]
    axes = "[None, None]" if mode == "L" else ".transpose(2, 0, 1)[None]"
    return "\n".join([
        "import json", "import numpy, onnxruntime", "from PIL import Image, ImageOps", "",
        f'image = ImageOps.fit(Image.open("image.png").convert("{mode}"), ({width}, {height}), Image.BICUBIC)',
        f"pixels = (numpy.asarray(image, numpy.float32) / 255){axes}", *tail,
    ])  # fmt: skip


def si(value: float | None) -> str:
    """1234567 as 1.23 M."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def mebibytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.3g} MiB"


def milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def breakable(name: str) -> Markup:
    """A model's name that may be broken after its signs."""
    return Markup(re.sub(r"([(,=_])", r"\1<wbr>", str(escape(name))))


FILTERS = {"breakable": breakable, "si": si, "mib": mebibytes, "ms": milliseconds, "duration": duration}
