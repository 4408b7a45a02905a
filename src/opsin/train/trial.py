"""One trial: one model trained with one seed, in a folder of its own.

A trial is idempotent. Its folder says whether it is finished, and `fit` goes on in a folder that is not; so a killed
comparison is started again by the same command. What goes wrong inside a trial is an outcome, not an error: what
follows from the trial itself (it diverged, the network does not take such images) stays; anything else (memory, a
crash) is tried again by the next command.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsin.data import Data
from opsin.errors import OpsinError, TrainingFailed
from opsin.train.checkpoint import sweep
from opsin.train.records import RESULT
from opsin.train.run import DIVERGED, DONE

FAILURE = "failure.json"


@dataclass(frozen=True)
class Trial:
    """What `fit` is called with. data: a source, or opened data."""

    model: str
    seed: int
    folder: Path
    data: str | Data
    data_options: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    recipe: tuple[str, ...] = ()
    budget: float | None = None
    epochs: int | None = None

    @property
    def name(self) -> str:
        return f"{self.model} seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether the trial is over, well or not, and would end the same way again."""
        result, failure = _read(self.folder / RESULT), _read(self.folder / FAILURE)
        return result.get("status") in (*DONE, DIVERGED) or bool(failure.get("final"))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def run_trial(trial: Trial) -> dict[str, Any]:
    """Trains, unless the trial is finished; returns its row of the table.

    Raises OSError (a full disk stops every trial alike).
    """
    if not trial.finished:
        from opsin.train.fit import fit

        (trial.folder / FAILURE).unlink(missing_ok=True)
        sweep(trial.folder, [FAILURE])
        try:
            fit(
                trial.model, trial.data, trial.task, recipe=trial.recipe, budget=trial.budget, epochs=trial.epochs,
                seed=trial.seed, out=trial.folder, data_options=trial.data_options, progress=False,
            )  # fmt: skip
        except OSError:
            raise
        except Exception as error:
            _write_failure(trial.folder, error)
    return outcome(trial)


def _write_failure(folder: Path, error: Exception) -> None:
    """Keeps the reason, except where `fit` itself left a result that says it."""
    if (folder / RESULT).is_file():
        return
    text = str(error).strip() or type(error).__name__
    final = isinstance(error, OpsinError)
    reason = text if final else f"{type(error).__name__}: {text.splitlines()[0]}"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FAILURE}"
    partial.write_text(json.dumps({"reason": reason, "final": final}, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / FAILURE)


def outcome(trial: Trial) -> dict[str, Any]:
    """The row of a trial that was run."""
    row: dict[str, Any] = {"model": trial.model, "seed": trial.seed, "folder": trial.folder.name}
    result, failure = _read(trial.folder / RESULT), _read(trial.folder / FAILURE)
    numbers = {"steps": result.get("steps"), "seconds": result.get("seconds")}
    if failure or result.get("status") not in DONE:
        reason = failure.get("reason") or result.get("message") or "it was not run to its end"
        return row | numbers | {"status": "failed", "reason": reason}
    scores = {"val": result["val_score"], "test": result["test_score"]}
    return row | numbers | scores | {"status": "done", "reason": ""}


def one_after_another(run: Callable[[Trial], dict], trials: Iterable[Trial]) -> Iterator[tuple[Trial, dict]]:
    """Trials in this process."""
    for trial in trials:
        yield trial, run(trial)


class Processes:
    """Trials in `jobs` processes that share this machine's threads equally."""

    def __init__(self, jobs: int):
        self.jobs = jobs

    def __call__(self, run: Callable[[Trial], dict], trials: Iterable[Trial]) -> Iterator[tuple[Trial, dict]]:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.jobs, spawn, _prepare, (threads_each(self.jobs),)) as pool:
            futures = {pool.submit(run, trial): trial for trial in trials}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise TrainingFailed(
                    "a process that trained a trial was killed, most likely for want of memory; "
                    "the same command with fewer --jobs goes on where it stopped"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise


def threads_each(jobs: int) -> int:
    """Threads of each of so many processes."""
    import torch

    return max(1, torch.get_num_threads() // jobs)


def _prepare(threads: int) -> None:
    """In a fresh process: its share of threads, and an end when the parent ends, however that may be."""
    import torch

    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
