"""Files that a kill cannot spoil: written beside, then moved into place; of checkpoints the one before is kept too."""

import contextlib
import io
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from opsin.errors import BadInput
from opsin.train.defaults import Plan

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all. Raises OSError, for one where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def sweep(folder: Path, names: Iterable[str]) -> None:
    """Deletes what kills left of files of these names, half written. No other process may be writing there."""
    for name in names:
        for path in folder.glob(f".{name}*"):
            if re.fullmatch(r"(\.\d+)?", path.name.removeprefix(f".{name}")):
                path.unlink()


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint of a run; None where there is none. Raises BadInput where all are broken."""
    found = [folder / name for name in (LAST, PREVIOUS) if (folder / name).is_file()]
    reasons = []
    for path in found:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reasons.append(f"{path}: {type(error).__name__}")
    if not found:
        return None
    raise BadInput(f"no checkpoint of the run can be read ({'; '.join(reasons)}); use --force to start it anew")


class RunCheckpoints(CheckpointIO):
    """Lightning's door to checkpoint files: atomic writes, and the last one becomes the previous one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        fresh = path.with_name(f"{path.name}.new")
        write_atomic(fresh, buffer.getvalue())
        if path.name == LAST and path.exists():
            path.replace(path.with_name(PREVIOUS))
        fresh.replace(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = read_checkpoint(Path(path).parent) if Path(path).name == LAST else torch.load(path)
        if checkpoint is None:
            raise BadInput(f"there is no checkpoint {path}")
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Keeper(Checkpoint):
    """Saves after every validation, and between validations every few seconds.

    Args:
        folder: where the checkpoints go.
        plan: no checkpoint falls between a step and the validation or the end of an epoch that belongs to it.
        seconds: between two checkpoints; longer where one takes more than half a second to write, so that writing
            never takes more than a few per cent of the time.
    """

    def __init__(self, folder: Path, plan: Plan, seconds: float):
        self.path, self.plan, self.seconds = folder / LAST, plan, seconds
        self.saved, self.took = time.monotonic(), 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if trainer.should_stop or step % self.plan.validate_every == 0 or step % self.plan.steps_per_epoch == 0:
            return
        due = time.monotonic() - self.saved >= self.seconds * max(1.0, 2 * self.took)
        if trainer.strategy.reduce_boolean_decision(due, all=False) if trainer.world_size > 1 else due:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        started = time.monotonic()
        trainer.save_checkpoint(self.path)
        self.saved = time.monotonic()
        self.took = self.saved - started
