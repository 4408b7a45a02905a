"""From a time budget to a number of steps: measure a throw-away copy, then fix the plan once and for all.

A run of fixed length is exact to resume and has a schedule that ends; a clock alone would give neither.
"""

import copy
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from opsin.train.defaults import BUDGET_FOR_VALIDATION, GUARD, VALIDATIONS, Plan, stretch
from opsin.train.engine import make_trainer
from opsin.train.loop import Streams
from opsin.train.module import Training

WARM_UP_STEPS = 3  # in which libraries load and memory is found
LIMIT = 0.25  # of the budget, for measuring slow steps
Loader = DataLoader[tuple[Tensor, Any]]


@dataclass(frozen=True)
class Timing:
    """Seconds of one step with its data, and of one validation with its checkpoint."""

    step: float
    validation: float


class Stopwatch(Callback):
    """Times the steps after the warm-up for about `seconds`; stops early after `limit` seconds in all."""

    def __init__(self, seconds: float, limit: float):
        self.seconds, self.limit = seconds, limit
        self.ends: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends = [time.perf_counter()]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) > WARM_UP_STEPS + 1 and self.ends[-1] - self.ends[WARM_UP_STEPS] > self.seconds:
            trainer.should_stop = True
        if self.ends[-1] - self.ends[0] > self.limit:
            trainer.should_stop = True

    @property
    def per_step(self) -> float:
        """The mean after the warm-up; where there was no time for more, of the steps after the first."""
        steps = len(self.ends) - 1
        measured = self.ends[WARM_UP_STEPS if steps > WARM_UP_STEPS else min(1, steps - 1) :]
        return (measured[-1] - measured[0]) / (len(measured) - 1)


def measure_timing(
    module: Training, recipes: Sequence[Callback], train: Loader, val: Loader, *, budget: float, precision: str
) -> Timing:
    """Trains and validates copies of module and recipes, for a few per cent of the budget."""
    seconds = min(max(0.04 * budget, 0.5), 10)
    module, recipes = copy.deepcopy((module, list(recipes)))
    watch = Stopwatch(seconds, LIMIT * budget)
    plan = replace(module.plan, steps=10**9)
    trainer = make_trainer(plan, [Streams(), watch, *recipes], precision=precision, validate=False)
    trainer.fit(module, train)
    return Timing(watch.per_step, _validation_seconds(module.to(trainer.strategy.root_device), val, seconds))


@torch.inference_mode()
def _validation_seconds(module: Training, val: Loader, seconds: float) -> float:
    module.eval()
    _validate(module, next(iter(val)))
    started, batches = time.perf_counter(), 0
    for batch in val:
        _validate(module, batch)
        batches += 1
        if time.perf_counter() - started > seconds:
            break
    reading = (time.perf_counter() - started) / batches * len(val)
    started = time.perf_counter()
    torch.save(module.state_dict(), io.BytesIO())
    return reading + 4 * (time.perf_counter() - started)  # weights, two moments of the optimizer, the best weights


def _validate(module: Training, batch: tuple[Tensor, Any]) -> None:
    images, targets = (x.to(module.device) if isinstance(x, Tensor) else x for x in batch)
    module.task.update_metric(module.metric, module.evaluated(images), targets)


def fill(plan: Plan, budget: float, spent: float, timing: Timing, warmup: float) -> Plan:
    """The longest plan that fits into what is left of the budget, with validations taking at most their share."""
    left = max(budget - spent, 0.1 * budget)
    validations = int(BUDGET_FOR_VALIDATION * left / timing.validation)
    steps = (left - min(max(validations, 1), VALIDATIONS) * timing.validation) / timing.step
    validations = max(min(validations, VALIDATIONS, int(steps)), 1)
    every = max(int(steps / validations), 1)
    plan = replace(plan, validate_every=every, limit_seconds=GUARD * budget, calibration_seconds=round(spent, 3))
    return stretch(plan, every * validations, warmup)
