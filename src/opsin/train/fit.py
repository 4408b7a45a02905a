"""`fit`: trains one model on one data set, into a folder that says everything about it."""

import math
import re
import time
from collections.abc import Mapping, Sequence
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
from opsin.errors import BadInput, TrainingFailed
from opsin.measure import parse_duration
from opsin.measure.evidence import machine
from opsin.tasks import Task
from opsin.tasks.registry import task_by_name
from opsin.train import defaults
from opsin.train.augment import default_augment
from opsin.train.budget import fill, measure_timing
from opsin.train.build import build_recipes, build_task_model, describe, facts_of
from opsin.train.checkpoint import LAST, Keeper, read_checkpoint
from opsin.train.defaults import DEFAULTS, Plan, draft
from opsin.train.engine import PRECISIONS, DiskFull, make_trainer, peek, tensorboard, user_errors
from opsin.train.evaluate import evaluate
from opsin.train.loop import Bar, Clock, Recorder, Streams
from opsin.train.module import Training
from opsin.train.quiet import quiet
from opsin.train.records import CHECKPOINTS, CONFIG, RESULT, TENSORBOARD, save_curves, save_json
from opsin.train.run import (
    DISK_FULL, DIVERGED, DONE, FINISHED, OUT_OF_TIME, Run, clear, load_best, only_one, open_data, read_json,
)  # fmt: skip
from opsin.train.sampler import EvalBatches, TrainBatches, loader, mix


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
        if self.precision not in PRECISIONS:
            raise BadInput(f"precision='{self.precision}': choose one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Execution:
    """How a run is carried out; none of it changes the result."""

    devices: int
    logger: bool
    progress: bool


def fit(
    model: nn.Module | str, data: Data | str, task: str | None = None, *, recipe: Sequence[Callback | str] = (),
    epochs: int | None = None, budget: str | float | None = None, seed: int = 0, out: Path | str | None = None,
    batch_size: int | None = None, lr: float | None = None, weight_decay: float | None = None,
    warmup: float | None = None, label_smoothing: float | None = None, ema: bool = False, augment: bool = True,
    precision: str = "32", devices: int = 1, logger: bool = True, force: bool = False, progress: bool = True,
    data_options: Mapping[str, Any] | None = None,
) -> Run:  # fmt: skip
    """Trains a model and returns its run.

    The same call on the same folder goes on where an earlier one was killed, with the same result (bit for bit on a
    CPU), and returns at once where it had finished.

    Args:
        model: a name or spec ("metanet_xt(mixer=tvconv)"), built to fit the data; or a module, which is trained in
            place and holds the best weights afterwards.
        data: a name or path for `opsin.data.open` (with `data_options`), or an opened `Data`.
        task: "classify", "segment" or "restore"; by default the data's.
        recipe: recipes or their names; their transforms run in this order, after augmentation.
        epochs, budget: passes over the data, or a duration such as "5m" that covers training and validation; by
            default a number of epochs that suits the task.
        out: the run's folder; by default runs/<model>-<data>-s<seed>.
        batch_size: in all, over all devices. warmup: share of the steps. ema: validate and keep averaged weights.
        precision: "32" or "bf16". devices: GPUs, or processes on a machine without; more than one needs the calling
            script to be guarded by `if __name__ == "__main__"`.
        force: starts anew in a folder that holds another run.
    Raises BadInput, UnknownName, MissingData; TrainingFailed where the loss is not a number or the disk is full.
    """
    source = data if isinstance(data, str) else None
    options = dict(data_options or {})
    request = Request(
        model=describe(model), data=source or data.name, data_options=options, task=task,  # type: ignore[union-attr]
        recipe=[describe(r) for r in recipe], epochs=epochs, budget=None if budget is None else parse_duration(budget),
        seed=seed, batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup=warmup,
        label_smoothing=label_smoothing, ema=ema, augment=augment, precision=precision,
    )  # fmt: skip
    request.check()
    folder = Path(out) if out is not None else default_folder(model, request.data, seed)
    with only_one(folder), torch.random.fork_rng(enabled=not torch.cuda.is_available(), devices=[]), quiet():
        config = earlier(folder, request, force)
        result = read_json(folder / RESULT)
        if config is not None and result is not None and result["status"] != DISK_FULL:
            return _finished(Run(folder, config, result), model)
        opened = data if isinstance(data, Data) else open_data(data, options)
        job = Job(folder, request, opened, source, Execution(devices, logger, progress))
        return job.run(model, recipe, config)


def default_folder(model: nn.Module | str, data: str, seed: int) -> Path:
    """runs/<model>-<data>-s<seed>, in letters that every file system takes."""
    name = model if isinstance(model, str) else type(model).__name__.lower()
    words = (re.sub(r"[^\w.=]+", "-", word).strip("-.") for word in (name, Path(data).name))
    return Path("runs") / f"{'-'.join(words)}-s{seed}"


def earlier(folder: Path, request: Request, force: bool) -> dict[str, Any] | None:
    """The config of the run that the folder holds, if it is this one. With force, another one is cleared away.

    Raises BadInput where the folder holds another run, or files that belong to none.
    """
    others = [path.name for path in folder.iterdir() if path.name != ".lock"]
    if force:
        clear(folder)
        return None
    config = read_json(folder / CONFIG)
    if config is None and others:
        raise BadInput(f"the folder '{folder}' is not empty and not a run; choose another --out, or use --force")
    if config is None:
        return None
    asked = asdict(request) | {"task": request.task or config["request"]["task"]}
    changed = [name for name, value in asked.items() if config["request"].get(name) != value]
    if changed:
        name = changed[0]
        raise BadInput(
            f"the folder '{folder}' holds a run with {name}={config['request'].get(name)!r}, not {asked[name]!r}; "
            "choose another --out, or use --force to start anew"
        )
    return config


def _finished(run: Run, model: nn.Module | str) -> Run:
    if run.status not in DONE:
        raise TrainingFailed(f"{run.result['message']} (use --force to start the run '{run.path}' anew)")
    if isinstance(model, nn.Module):
        run.model(model)
    return run


class Job:
    """One call of `fit` that has work to do."""

    def __init__(self, folder: Path, request: Request, data: Data, source: str | None, execution: Execution):
        self.folder, self.request, self.data, self.execution = folder, request, data, execution
        name = request.task or data.task
        self.facts = facts_of(data, source, request.data_options)
        usual = DEFAULTS.get(name)
        smoothing = request.label_smoothing
        self.smoothing = smoothing if smoothing is not None else usual.label_smoothing if usual else 0.0
        self.task: Task = task_by_name(name, self.smoothing)
        if self.data.train is None or len(self.data.train) == 0:
            raise BadInput(f"'{data.name}' has no training images")

    def run(self, model: nn.Module | str, recipe: Sequence[Callback | str], config: dict[str, Any] | None) -> Run:
        """Plans (or takes the plan of the run's first call), trains, and writes the result."""
        started = time.monotonic()
        torch.manual_seed(mix(self.request.seed, "build"))
        recipes = build_recipes(recipe)
        task_model = build_task_model(model, self.task, self.data)
        parameters = sum(p.numel() for p in task_model.parameters())
        if config is None:
            plan = self.plan(task_model, recipes, parameters, started)
            config = self.write_config(plan, isinstance(model, str), parameters)
        elif config["data"]["counts"] != self.facts["counts"]:
            raise BadInput(
                f"'{self.data.name}' has changed since the run '{self.folder}' began: {config['data']['counts']} images "
                f"then, {self.facts['counts']} now; choose another --out, or use --force to start anew"
            )
        plan = Plan(**config["plan"])
        module = self.module(task_model, plan, recipes)
        try:
            with user_errors(self.folder, plan.batch_size):
                self.train(module, plan, recipes)
                return self.finish(module, config)
        except TrainingFailed as error:
            self.write_failure(error, parameters)
            raise

    def module(self, task_model: Any, plan: Plan, recipes: Sequence[Callback]) -> Training:
        """The Lightning module of a plan."""
        return Training(
            task_model, self.task, self.task.metric(self.data), plan, num_classes=len(self.data.classes),
            seed=self.request.seed, recipes=recipes, augment=default_augment(self.data) if self.request.augment else None,
        )  # fmt: skip

    def plan(self, task_model: Any, recipes: Sequence[Callback], parameters: int, started: float) -> Plan:
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
            seconds=min(max(0.04 * r.budget, 0.5), 10), precision=r.precision,
        )  # fmt: skip
        return fill(plan, r.budget, time.monotonic() - started, timing, warmup)

    def loaders(self, plan: Plan, share: int = 1, step: int = 0) -> tuple[Any, Any]:
        """Training data from a step on, and validation data."""
        batches = TrainBatches(len(self.data.train), plan.batch_size // share, self.request.seed)
        batches.resume(step)
        evaluation = EvalBatches(len(self.data.val), plan.eval_batch_size)
        return loader(self.data.train, batches), loader(self.data.val, evaluation)

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
        torch.manual_seed(mix(self.request.seed, "start"))
        trainer.fit(
            module, *self.loaders(plan, step=step), ckpt_path=None if checkpoint is None else checkpoints / LAST
        )

    def finish(self, module: Training, config: dict[str, Any]) -> Run:
        """Scores the best weights on the test split and closes the folder."""
        checkpoint = read_checkpoint(self.folder / CHECKPOINTS)
        assert checkpoint is not None
        step, clock, record = peek(checkpoint)
        model = load_best(self.folder, module.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        batch_size = config["plan"]["eval_batch_size"]
        tested = "test" in self.data.splits and "val" in self.data.splits
        test = evaluate(model.to(device), self.task, self.data, "test", batch_size) if tested else {}
        model.cpu()
        guard = f"the run stopped at {config['plan']['limit_seconds']} s, before its {config['plan']['steps']} steps"
        result = {
            "status": OUT_OF_TIME if clock["struck"] else FINISHED, "score_name": self.task.score,
            "val_score": record["best"], "test_score": test.get(self.task.score), "test": test,
            "best_step": record["best_step"], "steps": step, "seconds": round(clock["seconds"], 2),
            "params": config["params"], "message": guard if clock["struck"] else "",
        }  # fmt: skip
        run = Run(self.folder, config, result)
        save_curves(self.folder, run.metrics(), self.task.score)
        save_json(self.folder / RESULT, result)
        return run

    def write_failure(self, error: TrainingFailed, parameters: int) -> None:
        """result.json of a run that stopped. Where even that does not fit on the disk, the error alone must do."""
        checkpoint = read_checkpoint(self.folder / CHECKPOINTS)
        step, clock, record = peek(checkpoint) if checkpoint else (0, {"seconds": 0.0}, {"best": -math.inf})
        best = record["best"] if math.isfinite(record["best"]) else None
        result = {
            "status": DISK_FULL if isinstance(error, DiskFull) else DIVERGED, "score_name": self.task.score,
            "val_score": best, "test_score": None, "test": {}, "best_step": record.get("best_step", 0), "steps": step,
            "seconds": round(clock["seconds"], 2), "params": parameters, "message": str(error),
        }  # fmt: skip
        with suppress(OSError):
            save_json(self.folder / RESULT, result)
