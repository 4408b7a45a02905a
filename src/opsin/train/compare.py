"""`compare`: which of these networks is best for my data, under the same budget, and by how much more than chance?

Every model is trained with every seed under the same budget. A trial is a run's folder of its own, so whatever is
finished stays finished: the same command goes on after a kill, and more models or seeds can be added later.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import opsin
from opsin._verbs import make_callable
from opsin.data import Data
from opsin.data import open as open_data
from opsin.errors import BadInput, TrainingFailed
from opsin.measure.duration import parse_duration
from opsin.measure.evidence import commit, machine
from opsin.tasks.registry import task_by_name
from opsin.train import table
from opsin.train.comparison import SETTINGS, Comparison, Settings
from opsin.train.costs import curves, measure_costs, rehearse
from opsin.train.names import check_models
from opsin.train.progress import Watcher
from opsin.train.report import write_report
from opsin.train.run import only_one
from opsin.train.trial import Processes, Trial, one_after_another, outcome, run_trial

DEFAULT_BUDGET = "3m"
UNFINISHED = f".{SETTINGS}"  # what a kill may leave of them
Map = Callable[[Callable[[Trial], dict], Sequence[Trial]], Iterator[tuple[Trial, dict]]]


def compare(
    data: str | Data, models: str | Sequence[str], *, task: str | None = None, recipe: str | Sequence[str] = (),
    budget: str | float | None = None, epochs: int | None = None, seeds: int | Sequence[int] = 3, jobs: int = 1,
    out: str | Path | None = None, cluster: bool = False, force: bool = False, progress: bool = True,
    data_options: Mapping[str, Any] | None = None,
) -> Comparison:  # fmt: skip
    """Trains every model with every seed under the same budget, measures, ranks, reports, exports the winner.

    data: a source that `opsin.data.open` takes (with `data_options`), or opened data.
    models: names or specs, as a list or as text: "convnext_tiny, metanet_n(mixer=tvconv)".
    recipe: names of recipes, or one name, used in every trial.
    budget: training time of each trial ("3m" unless `epochs` is given instead), so the whole takes about
        models x seeds x budget / jobs, which is printed first.
    seeds: how many (0, 1, ...), or which; the same for every model.
    jobs: trials at a time, which share the threads of this machine (with `cluster`: on each machine of it).
    out: the folder; by default one below runs/ that follows from the other arguments.
    cluster: send the trials to Ray.
    force: start anew in a folder that holds another comparison; its trials are deleted.
    Raises BadInput, UnknownName before anything trains; TrainingFailed where every trial failed.
    """
    options = dict(data_options or {})
    names = check_models(models)
    if jobs < 1:
        raise BadInput(f"--jobs is {jobs}; it must be at least 1")
    opened = open_data(data, **options) if isinstance(data, str) else data
    source = data if isinstance(data, str) else data.name
    recipe = [recipe] if isinstance(recipe, str) else recipe
    settings = _settings(source, options, opened, names, task, recipe, budget, epochs, seeds)
    rehearse(names, settings.recipe, settings.task, opened)
    comparison = Comparison(Path(out) if out else default_folder(settings), settings)
    _check_folder(comparison, force)
    with only_one(comparison.folder):
        _prepare_folder(comparison, force)
        trials = _trials(comparison, data)
        with Watcher(trials, settings.budget, settings.length, jobs, show=progress) as watcher:
            measuring = partial(_say_measuring, watcher)
            measure_costs(comparison.folder, names, settings.task, opened, measuring)
            _train(comparison, trials, _mapper(comparison, jobs, cluster), watcher)
            _write_tables(comparison, trials)
            watcher.say("writing the report")
            write_report(comparison, opened, jobs)
    return comparison


def _say_measuring(watcher: Watcher, model: str) -> None:
    watcher.say(f"measuring {model}")


def _trials(comparison: Comparison, data: str | Data) -> list[Trial]:
    """Seed by seed, so that an early look at a comparison sees every model. Paths hold on any machine that has them."""
    s = comparison.settings
    if isinstance(data, str) and data != "digits" and Path(data).expanduser().exists():
        data = str(Path(data).expanduser().resolve())
    return [
        Trial(
            model, seed, comparison.trial_folder(model, seed).resolve(), data, s.data_options, s.task, s.recipe,
            s.budget, s.epochs,
        )
        for seed in s.seeds for model in s.models
    ]  # fmt: skip


def _mapper(comparison: Comparison, jobs: int, cluster: bool) -> Map:
    if cluster:
        from opsin.deploy.cluster import Cluster

        return Cluster(per_machine=jobs, shared=comparison.folder)
    return Processes(jobs) if jobs > 1 else one_after_another


def _train(comparison: Comparison, trials: Sequence[Trial], mapped: Map, watcher: Watcher) -> None:
    """Runs what is not finished. Raises TrainingFailed where nothing came of any trial."""
    from opsin.train.plots import show

    score = task_by_name(comparison.settings.task).score
    waiting = [trial for trial in trials if not trial.finished]
    if waiting:
        watcher.say("training")
    for trial, row in mapped(run_trial, waiting):
        watcher.ended(trial, row, f"{score} {show(row['val'], score, 2)}" if row["status"] == "done" else "")
    rows = [outcome(trial) for trial in trials]
    if all(row["status"] == "failed" for row in rows):
        raise TrainingFailed(f"every trial of '{comparison.folder}' failed; the first: {rows[0]['reason']}")


def _write_tables(comparison: Comparison, trials: Sequence[Trial]) -> None:
    table.write_table(comparison.folder, "trials", [outcome(trial) for trial in trials])
    runs = [(trial.model, trial.seed, trial.folder) for trial in trials]
    table.write_table(comparison.folder, "curves", curves(runs))


def _settings(
    source: str, options: dict[str, Any], data: Data, models: tuple[str, ...], task: str | None, recipe: Sequence[str],
    budget: str | float | None, epochs: int | None, seeds: int | Sequence[int],
) -> Settings:  # fmt: skip
    if budget is not None and epochs is not None:
        raise BadInput("--budget and --epochs exclude each other; give one of them")
    if epochs is not None and epochs < 1:
        raise BadInput(f"--epochs is {epochs}; it must be at least 1")
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not numbers or len(set(numbers)) < len(numbers):
        raise BadInput(f"--seeds is {seeds}; there must be at least one, each once")
    chosen = task or data.task
    if chosen == "classify" and len(data.classes) < 2:
        held = f"only the class '{data.classes[0]}'" if data.classes else "no classes"
        raise BadInput(f"'{source}' has {held}; a comparison of classifiers needs two or more, each in a folder")
    seconds = None if epochs is not None else parse_duration(budget or DEFAULT_BUDGET)
    samples = {name: len(split) for name, split in data.splits.items()}
    return Settings(
        source, options, samples, tuple(data.classes), chosen, tuple(recipe), seconds, epochs, models, numbers
    )


def default_folder(settings: Settings) -> Path:
    """The same settings lead to the same folder, so that the same command goes on."""
    digest = sha256(json.dumps([settings.fixed, settings.models], sort_keys=True).encode()).hexdigest()[:6]
    name = re.sub(r"[^\w.]+", "-", Path(settings.data).name).strip("-") or "data"
    return Path("runs") / f"compare-{name}-{settings.length.replace(' ', '')}-{digest}"


def _check_folder(comparison: Comparison, force: bool) -> None:
    """Raises BadInput where the folder holds something else than this comparison."""
    folder, settings = comparison.folder, comparison.settings
    if (folder / SETTINGS).is_file():
        there = Comparison.load(folder).settings.fixed
        changed = [name for name, value in settings.fixed.items() if there[name] != value]
        if changed and not force:
            raise BadInput(
                f"'{folder}' holds a comparison with another {' and '.join(changed)}; choose another --out, or --force "
                "to delete its trials and start anew"
            )
    elif folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {".lock", UNFINISHED}):
        raise BadInput(f"'{folder}' exists and holds no comparison; choose another --out")


def _prepare_folder(comparison: Comparison, force: bool) -> None:
    """Writes the settings; with force, deletes what an earlier comparison measured and trained."""
    folder = comparison.folder
    if force:
        shutil.rmtree(folder / "trials", ignore_errors=True)
        for name in ("costs.parquet", "trials.parquet", "curves.parquet"):
            (folder / name).unlink(missing_ok=True)
    save_settings(
        comparison,
        {"opsin": opsin.__version__, "commit": commit(), "machine": machine(), "threads": torch.get_num_threads()},
    )
    (folder / "trials").mkdir(exist_ok=True)


def save_settings(comparison: Comparison, circumstances: Mapping[str, Any]) -> None:
    """Writes comparison.json: the settings, and under what circumstances they were run."""
    path = comparison.folder / SETTINGS
    content = {"settings": asdict(comparison.settings), "circumstances": dict(circumstances)}
    unfinished = path.with_name(UNFINISHED)
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


make_callable(__name__)
