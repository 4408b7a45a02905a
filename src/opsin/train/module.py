"""The Lightning module: one step of training, one of validation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MeanMetric, Metric

from opsin.errors import TrainingFailed
from opsin.tasks import Losses, Task, TaskModel
from opsin.train.defaults import Plan
from opsin.train.optimizer import WarmupCosine, adamw, averaged
from opsin.train.sampler import mix, seed_generators

Transform = Callable[[Tensor, Any], tuple[Tensor, Any]]


def total(losses: Losses) -> Tensor:
    """What is minimised: the sum of a task model's losses."""
    return torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))


def numbers(values: Any, score: str) -> dict[str, float]:
    """What a metric computed, by name; a metric that gives one number gives the task's score."""
    named = values if isinstance(values, dict) else {score: values}
    return {name: float(value) for name, value in named.items() if torch.as_tensor(value).numel() == 1}


class Diverged(TrainingFailed):
    """The loss, or its gradient, is not a number."""


class Training(LightningModule):
    """A task model in training.

    Every consumer of random numbers (hooks, augmentation, each recipe, the network) has a stream of its own, which is
    a function of the seed, the step and the process: a recipe that draws but does nothing changes nothing.

    Args:
        model, task, metric: what is trained, and how it is scored.
        recipes: their `transform` is called on every batch, after `augment`.
    """

    def __init__(
        self, model: TaskModel, task: Task, metric: Metric, plan: Plan, *, num_classes: int, seed: int,
        recipes: Sequence[Any] = (), augment: Transform | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model, self.task, self.metric, self.plan = model, task, metric, plan
        self.num_classes, self.seed, self.augment = num_classes, seed, augment
        self.transforms = [recipe.transform for recipe in recipes if hasattr(recipe, "transform")]
        self.average: AveragedModel | None = None if plan.ema_decay is None else averaged(model, plan.ema_decay)
        self.validation_loss = MeanMetric()
        self.scores: dict[str, float] = {}  # of the last validation
        self.finite = torch.tensor(True)

    @property
    def evaluated(self) -> nn.Module:
        """What is validated and kept: the averaged weights if there are any."""
        return self.model if self.average is None else self.average.module

    def draw_from(self, stream: str) -> None:
        """Starts the random numbers of one consumer at this step."""
        seed_generators(mix(self.seed, stream, self.trainer.global_step, self.trainer.global_rank), self.device)

    def training_step(self, batch: tuple[Tensor, Any], batch_idx: int) -> dict[str, Tensor]:
        images, targets = batch
        if self.augment is not None:
            self.draw_from("augment")
            images, targets = self.augment(images, targets)
        for i, transform in enumerate(self.transforms):
            self.draw_from(f"recipe {i}")
            images, targets = transform(images, targets, self.num_classes)
        self.draw_from("network")
        losses = self.model(images, targets)
        loss = total(losses)
        parts = {name: part.detach() for name, part in losses.items()} if len(losses) > 1 else {}
        return {**parts, "loss": loss}

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clips the norm, and sees to it that no step is taken on a gradient that is not a number."""
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, self.plan.clip)
        self.finite = self.finite.to(norm.device) & torch.isfinite(norm)
        if self.device.type == "cpu" or self.trainer.global_step % self.plan.log_every == 0:
            self.check_finite()

    def check_finite(self) -> None:
        """Raises Diverged where a gradient, and so the loss, was not a number since the last look."""
        if not self.finite:
            step = self.trainer.global_step + 1
            raise Diverged(
                f"the loss is not a number at step {step} (or its gradient is not); the last good checkpoint is kept; "
                f"try a smaller lr than {self.plan.lr:g}, or a longer warm-up"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self.model, self.plan)
        schedule = LambdaLR(optimizer, WarmupCosine(self.plan))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        """Whatever a model draws in validation (masks, noise) is the same each time."""
        seed_generators(mix(self.seed, "validation", self.trainer.global_rank), self.device)

    def validation_step(self, batch: tuple[Tensor, Any], batch_idx: int) -> None:
        images, targets = batch
        predictions = self.evaluated(images)
        self.task.update_metric(self.metric, predictions, targets)
        losses = getattr(self.evaluated, "losses", None)
        if losses is not None:
            self.validation_loss.update(total(losses(predictions, targets)), len(images))

    def on_validation_epoch_end(self) -> None:
        self.scores = numbers(self.metric.compute(), self.task.score)
        if hasattr(self.evaluated, "losses"):
            self.scores["loss"] = float(self.validation_loss.compute())
        self.metric.reset()
        self.validation_loss.reset()
        self.log_dict({f"val/{name}": value for name, value in self.scores.items()}, logger=False)
