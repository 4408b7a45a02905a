"""One training from its request to its result: plan, train, score."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import opsin
from opsin.data import Data
from opsin.data.splits import Crops
from opsin.data.transforms import default_augment
from opsin.errors import BadInput, TrainingFailed
from opsin.measure.evidence import machine
from opsin.tasks import Task, TaskModel
from opsin.tasks.registry import task_by_name
from opsin.train import defaults
from opsin.train.budget import fill, measure_timing
from opsin.train.build import build_recipes, build_task_model, facts_of
from opsin.train.checkpoint import LAST, PREVIOUS, Keeper, read_checkpoint
from opsin.train.defaults import DEFAULTS, GUARD, Plan, draft
from opsin.train.engine import (
    PRECISIONS,
    DiskFull,
    check_devices,
    make_trainer,
    peek,
    shared_by_name,
    tensorboard,
    user_errors,
)  # fmt: skip
from opsin.train.evaluate import evaluate
from opsin.train.loop import Bar, Clock, Recorder, Streams
from opsin.train.module import Diverged, Training
from opsin.train.records import CHECKPOINTS, CONFIG, RESULT, TENSORBOARD, save_curves, save_json
from opsin.train.run import DISK_FULL, DIVERGED, FINISHED, OUT_OF_TIME, Run, load_best
from opsin.train.sampler import EvalBatches, TrainBatches, loader, mix, seed_generators


@dataclass(frozen=True)
class Request:
    """What was asked for, as written to config.json. Two calls with equal requests are the same run."""

    model: str
    data: str
    data_options: dict[str, Any]
    task: str | None
    recipe: list[str]
    epochs: int | None
    budget: float | None
    seed: int
    batch_size: int | None
    lr: float | None
    weight_decay: float | None
    warmup: float | None
    label_smoothing: float | None
    ema: bool
    augment: bool
    precision: str

    def check(self) -> None:
        """Raises BadInput for options that cannot be."""
        if self.epochs is not None and self.budget is not None:
            raise BadInput("give epochs or a budget, not both")
        if self.epochs is not None and self.epochs < 1:
            raise BadInput(f"epochs={self.epochs}: a training needs at least one")
        if self.lr is not None and self.lr <= 0:
            raise BadInput(f"lr={self.lr}: the learning rate must be above zero")
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise BadInput(f"label_smoothing={self.label_smoothing}: it must be at least 0 and below 1")
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise BadInput(f"warmup={self.warmup}: it is a share of the training, at least 0 and below 1")
        if self.precision not in PRECISIONS:
            raise BadInput(f"precision='{self.precision}': choose one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Execution:
    """How a run is carried out, which may change from call to call."""

    devices: int
    logger: bool
    progress: bool


class Job:
    """One call of `fit` that has work to do."""

    def __init__(self, folder: Path, request: Request, data: Data, source: str | None, execution: Execution):
        self.folder, self.request, self.data, self.execution = folder, request, data, execution
        check_devices(execution.devices)
        name = request.task or data.task
        self.facts = facts_of(data, source, request.data_options)
        if request.task is None and name not in DEFAULTS:
            raise BadInput(
                f"'{data.name}' is data for the task '{name}', which fit does not train; name another with --task, or "
                "make pairs of clean images with --degrade"
            )
        smoothing = request.label_smoothing
        self.smoothing = DEFAULTS[name].label_smoothing if smoothing is None and name in DEFAULTS else smoothing or 0.0
        self.task: Task = task_by_name(name, self.smoothing)
        check_data(data, self.task)

    def run(self, model: nn.Module | str, recipe: Sequence[Callback | str], config: dict[str, Any] | None) -> Run:
        """Plans (or takes the plan of the run's first call), trains, and writes the result."""
        started = time.monotonic()
        seed_generators(mix(self.request.seed, "build"), torch.device("cpu"))
        recipes = build_recipes(recipe)
        task_model = build_task_model(model, self.task, self.data).train()
        parameters = sum(p.numel() for p in task_model.parameters())
        if config is not None and config["data"]["counts"] != self.facts["counts"]:
            raise BadInput(
                f"'{self.data.name}' has changed since the run '{self.folder}' began (then {config['data']['counts']} "
                f"images, now {self.facts['counts']}); choose another --out, or use --force to start anew"
            )
        try:
            with user_errors(self.folder):
                if config is None:
                    plan = self.plan(task_model, recipes, parameters, started)
                    config = self.write_config(plan, isinstance(model, str), parameters)
                plan = Plan(**config["plan"])
                module = self.module(task_model, plan, recipes)
                self.train(module, plan, recipes)
                return self.finish(module, config)
        except (Diverged, DiskFull) as error:
            self.write_failure(error, parameters)
            raise

    def module(self, task_model: TaskModel, plan: Plan, recipes: Sequence[Callback]) -> Training:
        """The Lightning module of a plan."""
        data = self.data
        kind = "images" if self.task.name == "pretrain" else self.task.name
        augment = default_augment(kind, data.size, data.classes) if self.request.augment else None
        return Training(
            task_model, self.task, self.task.metric(data), plan, num_classes=len(data.classes), recipes=recipes,
            seed=self.request.seed, augment=augment,
        )  # fmt: skip

    def plan(self, task_model: TaskModel, recipes: Sequence[Callback], parameters: int, started: float) -> Plan:
        """Everything in numbers; with a budget, after measuring copies."""
        r = self.request
        warmup = DEFAULTS[self.task.name].warmup if r.warmup is None else r.warmup
        plan = draft(
            self.task.name, samples=len(self.data.train), parameters=parameters, devices=self.execution.devices,
            epochs=r.epochs, batch_size=r.batch_size, lr=r.lr, weight_decay=r.weight_decay, warmup=warmup, ema=r.ema,
            uneven=isinstance(self.data.train, Crops) or self.data.size is None,
        )  # fmt: skip
        if r.budget is None:
            return plan
        timing = measure_timing(
            self.module(task_model, plan, recipes), recipes, *self.loaders(plan, self.execution.devices),
            budget=r.budget, precision=r.precision,
        )  # fmt: skip
        return fill(plan, r.budget, time.monotonic() - started, timing, warmup)

    def loaders(self, plan: Plan, share: int = 1, step: int = 0) -> tuple[Any, Any]:
        """Training data from a step on, and validation data."""
        batches = TrainBatches(len(self.data.train), plan.batch_size // share, self.request.seed)
        batches.resume(step)
        evaluation = EvalBatches(len(self.data.val), plan.eval_batch_size)
        task = self.data.task
        return loader(self.data.train, task, batches), loader(self.data.val, task, evaluation)

    def write_config(self, plan: Plan, named: bool, parameters: int) -> dict[str, Any]:
        request = asdict(self.request) | {"task": self.task.name}
        config = {
            "opsin": opsin.__version__, "request": request, "named": named, "label_smoothing": self.smoothing,
            "data": self.facts, "plan": plan.as_dict(), "params": parameters, "machine": machine(),
        }  # fmt: skip
        save_json(self.folder / CONFIG, config)
        return config

    def train(self, module: Training, plan: Plan, recipes: Sequence[Callback]) -> None:
        """Takes the steps that are still to be taken."""
        checkpoints = self.folder / CHECKPOINTS
        checkpoint = read_checkpoint(checkpoints)
        step = 0
        if checkpoint is not None:
            step, clock_state, _ = peek(checkpoint)
            if step >= plan.steps or clock_state["struck"]:
                return
        clock = Clock(plan)
        keeper = Keeper(checkpoints, plan, defaults.CHECKPOINT_SECONDS)
        callbacks = [Streams(), clock, Recorder(self.folder, plan, clock), *recipes, keeper]
        if self.execution.progress:
            callbacks.append(Bar(plan, f"{self.request.model[:40]} on {self.data.name}"))
        logger = tensorboard(self.folder / TENSORBOARD, step) if self.execution.logger else False
        trainer = make_trainer(
            plan, callbacks, precision=self.request.precision, devices=self.execution.devices, logger=logger,
            root=self.folder,
        )  # fmt: skip
        seed_generators(mix(self.request.seed, "start"), trainer.strategy.root_device)
        with shared_by_name():
            trainer.fit(
                module, *self.loaders(plan, step=step), ckpt_path=None if checkpoint is None else checkpoints / LAST
            )

    def finish(self, module: Training, config: dict[str, Any]) -> Run:
        """Scores the best weights on the test split and closes the folder."""
        model = load_best(self.folder, module.model)
        test: dict[str, float] = {}
        if "test" in self.data.splits and "val" in self.data.splits:
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            test = evaluate(model, self.task, self.data, "test", config["plan"]["eval_batch_size"])
            model.cpu()
        result = self.result(config["params"]) | {"test_score": test.get(self.task.score), "test": test}
        run = Run(self.folder, config, result)
        save_curves(self.folder, run.metrics(), self.task.score)
        save_json(self.folder / RESULT, result)
        (self.folder / CHECKPOINTS / PREVIOUS).unlink(missing_ok=True)
        return run

    def result(self, parameters: int) -> dict[str, Any]:
        """What the last checkpoint says of the run, and where it stopped."""
        checkpoint = read_checkpoint(self.folder / CHECKPOINTS)
        step, clock, record = peek(checkpoint) if checkpoint else (0, {"seconds": 0.0, "struck": False}, {})
        struck = clock["struck"]
        message = f"stopped at step {step}, after {GUARD:g} times the budget" if struck else ""
        return {
            "status": OUT_OF_TIME if struck else FINISHED, "score_name": self.task.score,
            "val_score": finite(record.get("best", -math.inf)), "test_score": None, "test": {},
            "best_step": record.get("best_step", 0), "steps": step, "seconds": round(clock["seconds"], 2),
            "params": parameters, "message": message,
        }  # fmt: skip

    def write_failure(self, error: TrainingFailed, parameters: int) -> None:
        """result.json of a run that stopped. Where even that does not fit on the disk, the error alone must do."""
        status = DISK_FULL if isinstance(error, DiskFull) else DIVERGED
        with suppress(OSError):
            save_json(self.folder / RESULT, self.result(parameters) | {"status": status, "message": str(error)})


def check_data(data: Data, task: Task) -> None:
    """Raises BadInput where there is nothing to train on, or images to classify differ in size."""
    if "train" not in data.splits or len(data.train) == 0:
        raise BadInput(f"'{data.name}' has no training images")
    if task.name == "classify" and data.size is None:
        raise BadInput(f"the images of '{data.name}' differ in size; bring them to one size, for example with size=64")


def finite(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if math.isfinite(value) else None
