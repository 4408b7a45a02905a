"""Telling people how far a comparison is."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from opsin.train.trial import Trial


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"
    minutes = round(seconds / 60, 1) if seconds < 600 and seconds % 60 else round(seconds / 60)
    if minutes < 90:
        return f"{minutes:g} min"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def plural(count: int, word: str) -> str:
    """1 seed, 3 seeds."""
    return f"{count} {word}{'s' * (count != 1)}"


class Watcher:
    """A bar over all trials, and a line for each that ends. With a time budget the bar also moves within trials.

    show: False prints nothing.
    """

    def __init__(self, trials: Sequence[Trial], budget: float | None, length: str, jobs: int, show: bool):
        self.trials, self.budget, self.length, self.jobs = trials, budget, length, jobs
        self.console = Console(stderr=True, highlight=False, quiet=not show)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, transient=True, disable=not show,
        )  # fmt: skip
        self.done = sum(trial.finished for trial in trials)
        self.since, self.stopped = time.monotonic(), threading.Event()

    def __enter__(self) -> "Watcher":
        self._announce()
        self.bar.start()
        self.line = self.bar.add_task("measuring costs", total=len(self.trials), completed=self.done)
        self.clock = threading.Thread(target=self._tick, daemon=True)
        self.clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        self.clock.join()
        self.bar.stop()
        if kind is not None and issubclass(kind, SystemExit):  # Lightning's answer to SIGTERM
            self.console.print("stopped; the same command goes on from here")

    def _announce(self) -> None:
        models, seeds = len({t.model for t in self.trials}), len({t.seed for t in self.trials})
        left = len(self.trials) - self.done
        text = f"{plural(len(self.trials), 'trial')}: {plural(models, 'model')} × {plural(seeds, 'seed')}"
        text += f", {self.length} each"
        text += f", {self.jobs} at a time" * (self.jobs > 1)
        text += f"; {self.done} are finished already" * bool(self.done)
        if self.budget and left:
            text += f"; about {duration(self.budget * -(-left // self.jobs))} in all"
        self.console.print(escape(text))

    def _tick(self) -> None:
        """Moves the bar inside trials, by the clock."""
        while not self.stopped.wait(0.5):
            if self.budget and self.bar.tasks[self.line].description.startswith("training"):
                share = min((time.monotonic() - self.since) / self.budget, 0.99)
                running = min(self.jobs, len(self.trials) - self.done)
                self.bar.update(self.line, completed=self.done + round(share * running, 2))

    def say(self, what: str) -> None:
        """What is being done now."""
        self.since = time.monotonic()
        self.bar.update(self.line, description=escape(what))

    def ended(self, trial: Trial, row: dict[str, Any], shown: str) -> None:
        """A trial is over; `shown` is its score for people."""
        self.done, self.since = self.done + 1, time.monotonic()
        self.bar.update(self.line, completed=self.done)
        if row["status"] == "done":
            text = f"{trial.name}: {shown} ({row['steps']} steps in {duration(row['seconds'])})"
        else:
            text = f"{trial.name}: failed: {row['reason']}"
        self.console.print(escape(text), soft_wrap=True)
