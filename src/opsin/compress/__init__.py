"""Compression: prune, quantise, distil. The room is also the verb `opsin.compress(...)`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from opsin._verbs import make_callable
from opsin.data import Data
from opsin.tasks.outputs import TensorOutput


@dataclass(frozen=True)
class Budget:
    """Upper bounds on the result; None where there is no bound.

    params: number of parameters. macs: multiply-accumulates of one image. bytes: of the stored weights.
    bits: average bits per weight. latency_ms: of one image on this machine.
    """

    params: int | None = None
    macs: int | None = None
    bytes: int | None = None
    bits: float | None = None
    latency_ms: float | None = None

    def met(self, measured: dict[str, float]) -> bool:
        """Whether every bound holds for what was measured (same names)."""
        bounds = {name: bound for name, bound in vars(self).items() if bound is not None}
        return all(measured[name] <= bound for name, bound in bounds.items())


@dataclass
class Report:
    """What compression did, as measured before and after.

    score: the task's score (accuracy as a fraction) on the validation split, where there was data to measure it.
    """

    before: dict[str, float]
    after: dict[str, float]
    budget: Budget
    score_before: float | None = None
    score_after: float | None = None
    details: dict[str, Any] = field(default_factory=dict)  # per layer choices, search history ...

    @property
    def met(self) -> bool:
        return self.budget.met(self.after)


@dataclass
class Compressed:
    """A smaller model and the account of it."""

    model: nn.Module
    report: Report
    example: torch.Tensor  # an input of the shape that the model takes

    def save(self, path: str | Path) -> Path:
        """Writes a `.pt2` program that `torch.export.load(path).module()` runs without Opsin's compressors."""
        program = torch.export.export(TensorOutput(self.model).eval(), (self.example,))
        torch.export.save(program, path)
        return Path(path)


@runtime_checkable
class Compressor(Protocol):
    """The contract of the room: the budget holds as measured on the result, not as promised."""

    def __call__(self, model: nn.Module, data: Data | None, budget: Budget) -> Compressed: ...


make_callable(__name__)
