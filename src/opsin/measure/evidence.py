"""Evidence: what a claim measured, with everything that is needed to judge and repeat it.

A claim builds an `Experiment`, adds checks and paired comparisons to it, and returns `experiment.evidence()`. The
verdict follows from them by one rule, the same for all systems; no claim words its own.
"""

import importlib.util
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel

from opsin.catalog import card_of
from opsin.catalog.cards import claim_file, evidence_file, house
from opsin.errors import BadInput
from opsin.measure.duration import parse_duration

Verdict = Literal["holds", "fails", "inconclusive"]
RELATIONS = {
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
}  # fmt: skip


class Criterion(BaseModel):
    """One line of a claim. `held` is None where the spread over seeds does not allow an answer."""

    name: str
    value: float
    relation: str
    threshold: float
    held: bool | None
    standard_error: float | None = None
    note: str = ""


class Evidence(BaseModel):
    """The record of one run of one claim."""

    key: str
    claim: str
    verdict: Verdict
    criteria: list[Criterion]
    numbers: dict[str, Any]  # every measured series, one value per seed where training is involved
    seeds: list[int]
    data: str
    baseline: str
    budget: str
    notes: str
    commit: str
    date: str
    machine: str
    seconds: float

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


@dataclass(frozen=True)
class ClaimBudget:
    """How much a claim may spend: seconds in all, and how many seeds. Claims scale their training to it."""

    seconds: float = 300.0
    seeds: int = 3


class Experiment:
    """Collects what a claim measures.

    Args: the system's key, the claim in one or two sentences, the data's and the baseline's names, the seeds.
    """

    def __init__(self, key: str, claim: str, *, data: str = "", baseline: str = "", seeds: Sequence[int] = ()):
        self.key, self.claim, self.data, self.baseline, self.seeds = key, claim, data, baseline, list(seeds)
        self.criteria: list[Criterion] = []
        self.numbers: dict[str, Any] = {}
        self.started = time.perf_counter()

    def record(self, name: str, values: Any) -> None:
        """Keeps a measured number, or a series of one per seed."""
        self.numbers[name] = _plain(values)

    def check(self, name: str, value: float, relation: str, threshold: float, note: str = "") -> bool:
        """A number that needs no error bar (an exact property, a count, a ratio of medians)."""
        held = bool(RELATIONS[relation](float(value), threshold))
        self.criteria.append(
            Criterion(name=name, value=float(value), relation=relation, threshold=threshold, held=held, note=note)
        )
        return held

    def compare(
        self, name: str, ours: Sequence[float], baseline: Sequence[float], margin: float, note: str = ""
    ) -> bool | None:
        """Whether ours - baseline, paired by seed, is at least `margin`.

        Yes where the mean less its standard error reaches the margin, no where the mean plus its standard error stays
        below it, undecided (None) in between. Swap the arguments where lower is better.
        """
        differences = [float(a) - float(b) for a, b in zip(ours, baseline, strict=True)]
        mean = statistics.fmean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
        held = True if mean - error >= margin else False if mean + error < margin else None
        self.numbers[name] = {"ours": _plain(ours), "baseline": _plain(baseline)}
        self.criteria.append(
            Criterion(
                name=name, value=mean, relation=">=", threshold=margin, held=held, note=note,
                standard_error=error if math.isfinite(error) else None,
            )
        )  # fmt: skip
        return held

    def evidence(self, budget: ClaimBudget | None = None, notes: str = "") -> Evidence:
        """The record. Fails if any criterion was refuted, inconclusive if any was undecided, else holds."""
        if not self.criteria:
            raise BadInput(f"the claim of '{self.key}' checked nothing")
        answers = [criterion.held for criterion in self.criteria]
        verdict: Verdict = "fails" if False in answers else "inconclusive" if None in answers else "holds"
        return Evidence(
            key=self.key, claim=self.claim, verdict=verdict, criteria=self.criteria, numbers=self.numbers,
            seeds=self.seeds, data=self.data, baseline=self.baseline, notes=notes,
            budget=f"{budget.seconds:.0f} s, {budget.seeds} seeds" if budget else "",
            commit=commit(), date=datetime.now(UTC).strftime("%Y-%m-%d"), machine=machine(),
            seconds=round(time.perf_counter() - self.started, 1),
        )  # fmt: skip


def claim(
    name: str, *, budget: str | float = "5m", seeds: int = 3, output: Path | None = None, force: bool = False
) -> Evidence:
    """Runs the claim of a system and writes its evidence. Raises BadInput: no claim, or evidence exists already."""
    card = card_of(name)
    path = claim_file(card)
    if not path.is_file():
        raise BadInput(f"'{card.key}' has no claim: there is no file {path}")
    target = output or evidence_file(card)
    if target.exists() and not force:
        raise BadInput(f"the evidence {target} exists; use --force to replace it, or -o to write another file")
    spec = importlib.util.spec_from_file_location(f"opsin_claim_{card.key}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: Evidence = module.run(ClaimBudget(parse_duration(budget), seeds))
    result.save(target)
    return result


def commit() -> str:
    """The checkout's commit, with a plus sign where files have changed since; empty outside a checkout."""
    try:
        git = ["git", "-C", str(house("claims"))]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def machine() -> str:
    """Processor, threads and the PyTorch version, in one line."""
    cuda = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{_processor()}, {count}{cuda}, PyTorch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [s for s in info.read_text().splitlines() if s.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _plain(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(name): _plain(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    if isinstance(values, torch.Tensor):
        return _plain(values.tolist())
    return round(float(values), 6) if isinstance(values, float) or hasattr(values, "__float__") else values
