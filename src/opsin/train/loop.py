"""What happens around the steps: random streams, the clock, the records, the bar."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from opsin.train.defaults import Plan
from opsin.train.module import Training
from opsin.train.records import Row, save_rows, save_weights


class Streams(Callback):
    """Gives the hooks of callbacks, recipes for one, random numbers that are a function of seed and step."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Training)
        pl_module.draw_from("epoch")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Training)
        pl_module.draw_from("hooks")


class Clock(Callback):
    """Counts the seconds of a run over all interruptions; ends it at its last step, or at its budget's guard."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.before, self.started = plan.calibration_seconds, time.monotonic()
        self.struck = False

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step >= self.plan.steps:
            trainer.should_stop = True
        elif self.plan.limit_seconds is not None:
            over = self.seconds > self.plan.limit_seconds
            self.struck = trainer.strategy.reduce_boolean_decision(over, all=False) if trainer.world_size > 1 else over
            trainer.should_stop = self.struck

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "struck": self.struck}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.struck = state_dict["seconds"], state_dict["struck"]


class Recorder(Callback):
    """Keeps the numbers of a run, and the weights of its best validation.

    Rows and the best score travel in the checkpoint, so that after a kill the records go on from where the weights do.
    """

    def __init__(self, folder: Path, plan: Plan, clock: Clock):
        self.folder, self.plan, self.clock = folder, plan, clock
        self.rows: list[Row] = []
        self.best, self.best_step = float("-inf"), 0
        self.window: dict[str, Tensor] = {}
        self.count = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, value in outputs.items():
            self.window[name] = self.window[name] + value.detach() if name in self.window else value.detach()
        self.count += 1
        if trainer.global_step % self.plan.log_every == 0:
            self._flush(trainer)

    def _flush(self, trainer: Trainer) -> None:
        """Records the means since the last record."""
        means = {name: value / self.count for name, value in self.window.items()}
        if trainer.world_size > 1:
            means = {name: trainer.strategy.reduce(value.clone(), reduce_op="mean") for name, value in means.items()}
        values = {name: float(value) for name, value in means.items()}
        self._add(trainer, "train", {**values, "lr": trainer.optimizers[0].param_groups[0]["lr"]})
        self.window, self.count = {}, 0

    def _add(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
        step, seconds = trainer.global_step, round(self.clock.seconds, 3)
        epoch = (step - 1) // self.plan.steps_per_epoch
        self.rows += [Row(step, epoch, split, name, value, seconds) for name, value in values.items()]
        for logger in trainer.loggers:
            logger.log_metrics({f"{split}/{name}": value for name, value in values.items()}, step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Training)
        pl_module.check_finite()
        self._add(trainer, "val", pl_module.scores)
        score = pl_module.scores[pl_module.task.score]
        score = score if math.isfinite(score) else float("-inf")
        if not trainer.is_global_zero:
            return
        if score >= self.best or self.best_step == 0:
            self.best, self.best_step = score, trainer.global_step
            save_weights(self.folder, pl_module.evaluated.state_dict())
        save_rows(self.folder, self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": json.dumps(self.rows), "best": self.best, "best_step": self.best_step,
            "window": self.window, "count": self.count,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [Row(*row) for row in json.loads(state_dict["rows"])]
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.window, self.count = state_dict["window"], state_dict["count"]


class Bar(Callback):
    """One bar over the whole run on the error stream, with the latest loss and score; nothing off a terminal."""

    def __init__(self, plan: Plan, title: str):
        self.plan, self.title, self.shown = plan, title, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
        )  # fmt: skip
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, disable=not (console.is_terminal and trainer.is_global_zero))
        self.line = self.bar.add_task(self.title, total=self.plan.steps, completed=trainer.global_step, news="")
        self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self.shown < 0.2 and trainer.global_step < self.plan.steps:
            return
        assert isinstance(pl_module, Training)
        scores = "".join(f"  {name} {value:.4g}" for name, value in pl_module.scores.items() if name != "loss")
        news = f"loss {float(torch.as_tensor(outputs['loss'])):.4g}{scores}"
        self.bar.update(self.line, completed=trainer.global_step, news=news)
        self.shown = now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()
