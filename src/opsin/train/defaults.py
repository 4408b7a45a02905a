"""What `fit` does where it is not told: per task, from the size of the data and of the network."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from opsin.errors import BadInput

CHECKPOINT_SECONDS = 15.0  # between two checkpoints, besides those at validations
VALIDATIONS = 50  # at most, in one run
BUDGET_FOR_VALIDATION = 0.15  # at most, of a time budget
GUARD = 1.3  # times the budget: training stops whatever was planned
CLIP = 1.0  # norm of the gradient
SMALL = 200_000  # parameters


@dataclass(frozen=True)
class TaskDefaults:
    """Starting points that were found sound on small data; each can be given to `fit`.

    lr: of AdamW, for a batch of `batch_size` and networks of up to `SMALL` parameters.
    batch_size: the largest that is chosen.
    steps: how many a run without epochs or budget takes, roughly.
    """

    lr: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    batch_size: int
    steps: int


DEFAULTS = {
    "classify": TaskDefaults(lr=5e-3, weight_decay=0.05, warmup=0.05, label_smoothing=0.1, batch_size=128, steps=2000),
    "segment": TaskDefaults(lr=2e-3, weight_decay=0.01, warmup=0.05, label_smoothing=0.0, batch_size=8, steps=3000),
    "detect": TaskDefaults(lr=4e-3, weight_decay=0.01, warmup=0.1, label_smoothing=0.0, batch_size=8, steps=3000),
    "pretrain": TaskDefaults(lr=2e-3, weight_decay=0.05, warmup=0.1, label_smoothing=0.0, batch_size=128, steps=4000),
    "restore": TaskDefaults(lr=1e-3, weight_decay=0.0, warmup=0.02, label_smoothing=0.0, batch_size=16, steps=4000),
}


@dataclass(frozen=True)
class Plan:
    """Everything that training needs to know, in numbers. Fixed once, when a run starts.

    steps: in all; validate_every, log_every, warmup_steps: in steps.
    limit_seconds: the guard of a time budget; None without one.
    calibration_seconds: spent on measuring the step time, which counts in the budget.
    """

    steps: int
    steps_per_epoch: int
    validate_every: int
    log_every: int
    batch_size: int
    eval_batch_size: int
    lr: float
    weight_decay: float
    warmup_steps: int
    ema_decay: float | None
    clip: float = CLIP
    limit_seconds: float | None = None
    calibration_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_batch_size(task: str, samples: int, devices: int = 1) -> int:
    """A power of two near a twentieth of the samples, between 8 and the task's largest, that the devices share."""
    near = 2 ** int(math.log2(max(samples / 20, 1)))
    batch = min(max(near, 8), DEFAULTS[task].batch_size, samples)
    return max(batch // devices * devices, devices)


def choose_lr(task: str, parameters: int, batch_size: int) -> float:
    """Falls with the square root of the parameters beyond `SMALL`, and of the batch."""
    size = min(1.0, SMALL / max(parameters, 1)) ** 0.5
    batch = min(1.0, batch_size / DEFAULTS[task].batch_size) ** 0.5
    return float(f"{DEFAULTS[task].lr * size * batch:.2g}")


def draft(
    task: str, *, samples: int, parameters: int, devices: int, epochs: int | None, batch_size: int | None,
    lr: float | None, weight_decay: float | None, warmup: float, ema: bool, uneven: bool,
) -> Plan:  # fmt: skip
    """The plan for a number of epochs, or the task's usual number of steps. Raises BadInput: the batch size.

    uneven: validation images may differ in size, so that they are read one by one.
    """
    defaults = DEFAULTS[task]
    batch = batch_size or choose_batch_size(task, samples, devices)
    check_batch(batch, samples, devices)
    per_epoch = samples // batch
    epochs = epochs or min(max(math.ceil(defaults.steps / per_epoch), 5), 200)
    plan = Plan(
        steps=0, steps_per_epoch=per_epoch, validate_every=math.ceil(epochs / VALIDATIONS) * per_epoch, log_every=1,
        batch_size=batch, eval_batch_size=1 if uneven else 2 * batch, lr=lr or choose_lr(task, parameters, batch),
        weight_decay=defaults.weight_decay if weight_decay is None else weight_decay,
        warmup_steps=0, ema_decay=0.0 if ema else None,
    )  # fmt: skip
    return stretch(plan, epochs * per_epoch, warmup)


def stretch(plan: Plan, steps: int, warmup: float) -> Plan:
    """The same plan over another number of steps: what is relative to the length follows it."""
    decay = None if plan.ema_decay is None else min(max(1 - 20 / steps, 0.9), 0.9998)
    return replace(
        plan, steps=steps, log_every=max(1, steps // 200), warmup_steps=round(warmup * steps), ema_decay=decay
    )


def check_batch(batch: int, samples: int, devices: int) -> None:
    """Raises BadInput where the data has fewer samples than a batch, or the devices cannot share it."""
    if batch < 1 or batch > samples:
        raise BadInput(f"a batch size of {batch} does not go with {samples} training images; use 1 to {samples}")
    if batch % devices:
        raise BadInput(f"a batch size of {batch} cannot be shared by {devices} devices; use a multiple of {devices}")
