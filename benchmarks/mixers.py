"""Which mixer is best, with everything else fixed? One small MetaNet for every mixer of the catalogue on CIFAR-10.

    python benchmarks/mixers.py [--folder runs/mixers] [--jobs 2]

The same as `opsin compare cifar10 --models "metanet_xt(mixer=*)" --limit 10000 --epochs 6 --seeds 3`, which goes on
where it was interrupted, followed by the table and the plot for the documentation.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr, studentized_range

import opsin
from opsin.train.comparison import Comparison
from opsin.train.plots import short_names
from opsin.train.table import Row, frontier

HOUSE = Path(__file__).parent.parent
RESULTS = HOUSE / "benchmarks" / "results" / "mixers.json"
PLOT = HOUSE / "docs" / "assets" / "mixers.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/mixers"))
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    comparison = opsin.compare(
        "cifar10", "metanet_xt(mixer=*)", epochs=6, seeds=3, data_options={"limit": 10000}, out=options.folder,
        jobs=options.jobs,
    )  # fmt: skip
    found = record(comparison)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    least = found["smallest_difference"]
    RESULTS.with_suffix(".md").write_text(table(comparison.ranking, least))
    RESULTS.with_suffix(".circumstances.md").write_text(
        f"Measured {found['date']} on {found['circumstances']['machine']}, in {found['seconds_of_training'] / 60:.0f} "
        f"minutes of training. Mean validation accuracies within {100 * least:.1f} points are not told apart.\n"
    )
    shutil.copy(comparison.folder / "pareto.svg", PLOT)


def record(comparison: Comparison) -> dict[str, Any]:
    """Settings, circumstances and the ranking, as plain data."""
    rows = [{**vars(row), "behind": row.behind and vars(row.behind)} for row in comparison.ranking]
    seconds = comparison.query("SELECT sum(seconds) AS s FROM trials")[0]["s"]
    scores = comparison.query("SELECT model, seed, val, test, steps, seconds FROM scores ORDER BY model, seed")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "circumstances": comparison.circumstances,
        "settings": comparison.settings.fixed, "seeds": comparison.settings.seeds,
        "seconds_of_training": round(seconds), "frontier": [row.model for row in frontier(comparison.ranking)],
        "scores": scores, "ranking": rows,
        **uncertainty(scores, comparison.settings.seeds), **rank_correlations(rows),
    }  # fmt: skip


def uncertainty(scores: Sequence[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """What it takes to tell two apart, with and without the model that seeds move most, and the share of each."""
    table = np.asarray([score["val"] for score in scores]).reshape(-1, len(seeds))
    squares = (unexplained(table) ** 2).sum(1)
    shares = {score["model"]: round(float(s / squares.sum()), 3) for score, s in zip(scores[:: len(seeds)], squares)}
    return {
        "smallest_difference": smallest_difference(table), "shares_of_unexplained": shares,
        "smallest_difference_without_largest_share": smallest_difference(np.delete(table, squares.argmax(), 0)),
    }  # fmt: skip


def unexplained(table: np.ndarray) -> np.ndarray:
    """What neither its model nor its seed explains of every score."""
    return table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()


def smallest_difference(table: np.ndarray) -> float:
    """Tukey's honestly significant difference between two means, seeds as blocks: 95 % for all pairs together.

    One interval per pair, as `compare` prints them, would be wrong for about one in twenty of so many pairs. It takes
    the models for equally sensitive to seeds.
    """
    models, blocks = table.shape
    freedom = (models - 1) * (blocks - 1)
    error = np.sqrt((unexplained(table) ** 2).sum() / freedom / blocks)
    return float(studentized_range.ppf(0.95, models, freedom) * error)


def rank_correlations(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Spearman's, of validation accuracy with parameters and with MACs."""
    ranked = [row for row in rows if row["val"] is not None]
    accuracies = [row["val"] for row in ranked]
    return {
        f"rank_correlation_with_{cost}": round(float(spearmanr(accuracies, [row[cost] for row in ranked])[0]), 3)
        for cost in ("params", "macs")
    }


def table(rows: list[Row], smallest: float) -> str:
    """The ranking as Markdown; = marks what is not told apart from the best."""
    lines = [
        "| mixer | val. accuracy, % | test, % | behind the best, points | parameters | MACs, M | ms | MiB |",
        "|" + " --- |" * 8,
    ]
    best = rows[0].val or 0.0
    for name, row in zip(short_names([row.model for row in rows]), rows, strict=True):
        if row.val is None or row.test is None:
            lines.append(f"| {name} | failed" + " |" * 7)
            continue
        gap = best - row.val
        cells = [
            f"`{name}`", f"{100 * row.val:.1f} ± {100 * (row.val_sd or 0):.1f}",
            f"{100 * row.test:.1f} ± {100 * (row.test_sd or 0):.1f}", f"{100 * gap:.1f}" + " =" * (gap < smallest),
            f"{(row.params or 0) / 1e3:.0f} k", f"{(row.macs or 0) / 1e6:.1f}", f"{row.latency_ms or 0:.1f}",
            f"{(row.memory or 0) / 2**20:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
