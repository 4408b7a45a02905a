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

WARM_UP_STEPS = 3
SHARE = 0.04  # of the budget, for measuring steps
Loader = DataLoader[tuple[Tensor, Any]]


@dataclass(frozen=True)
class Timing:
    """Seconds of one step with its data, and of one validation with its checkpoint."""

    step: float
    validation: float


class Stopwatch(Callback):
    """Times steps after the first few, until `seconds` are over."""

    def __init__(self, seconds: float):
        self.seconds, self.steps = seconds, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = self.warm = self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.last = time.perf_counter()
        self.steps += 1
        if self.steps == WARM_UP_STEPS:
            self.warm = self.last
        if self.last - self.started > self.seconds and self.steps != WARM_UP_STEPS:
            trainer.should_stop = True

    @property
    def per_step(self) -> float:
        """The mean; with no step beyond the warm-up, of the warm-up."""
        if self.steps > WARM_UP_STEPS:
            return (self.last - self.warm) / (self.steps - WARM_UP_STEPS)
        return (self.last - self.started) / self.steps


def measure_timing(
    module: Training, recipes: Sequence[Callback], train: Loader, val: Loader, *, seconds: float, precision: str
) -> Timing:
    """Trains and validates copies of module and recipes for about `seconds` each, at most."""
    module, recipes = copy.deepcopy((module, list(recipes)))
    watch = Stopwatch(seconds)
    plan = replace(module.plan, steps=10**9)
    trainer = make_trainer(plan, [Streams(), watch, *recipes], precision=precision, validate=False)
    trainer.fit(module, train)
    return Timing(watch.per_step, _validation_seconds(module.to(trainer.strategy.root_device), val, seconds))


@torch.inference_mode()
def _validation_seconds(module: Training, val: Loader, seconds: float) -> float:
    module.eval()
    started, batches = time.perf_counter(), 0
    for images, targets in val:
        images = images.to(module.device)
        targets = targets.to(module.device) if isinstance(targets, Tensor) else targets
        module.task.update_metric(module.metric, module.evaluated(images), targets)
        batches += 1
        if time.perf_counter() - started > seconds:
            break
    reading = (time.perf_counter() - started) / batches * len(val)
    started = time.perf_counter()
    torch.save(module.state_dict(), io.BytesIO())
    return reading + 4 * (time.perf_counter() - started)  # weights, two moments of the optimizer, the best weights


def fill(plan: Plan, budget: float, spent: float, timing: Timing, warmup: float) -> Plan:
    """The longest plan that fits into what is left of the budget, with validations taking at most their share."""
    left = max(budget - spent, 0.1 * budget)
    validations = int(BUDGET_FOR_VALIDATION * left / timing.validation)
    steps = (left - min(max(validations, 1), VALIDATIONS) * timing.validation) / timing.step
    validations = max(min(validations, VALIDATIONS, int(steps)), 1)
    every = max(int(steps / validations), 1)
    plan = replace(plan, validate_every=every, limit_seconds=GUARD * budget, calibration_seconds=round(spent, 3))
    return stretch(plan, every * validations, warmup)
