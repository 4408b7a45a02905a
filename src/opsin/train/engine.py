"""The Lightning trainer as `fit` uses it, and what can go wrong in it, in plain words."""

import errno
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing
from torch.multiprocessing import ProcessRaisedException

from opsin.errors import BadInput, TrainingFailed
from opsin.train.allocator import keep_freed_memory
from opsin.train.checkpoint import RunCheckpoints
from opsin.train.defaults import Plan
from opsin.train.module import Diverged
from opsin.train.quiet import silence

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}
FULL = (errno.ENOSPC, errno.EDQUOT)


class SpawnedProcesses(DDPStrategy):
    """DDP in processes that hold their tongues as the first one does."""

    def setup_environment(self) -> None:
        silence()
        super().setup_environment()


def make_trainer(
    plan: Plan, callbacks: Sequence[Callback], *, precision: str, devices: int = 1, validate: bool = True,
    logger: TensorBoardLogger | bool = False, root: Path | None = None,
) -> Trainer:  # fmt: skip
    """A trainer without ornaments. Several devices are processes of their own, joined by DDP."""
    if not torch.accelerator.is_available():
        keep_freed_memory()
    return Trainer(
        accelerator="auto", devices=devices, strategy=SpawnedProcesses(start_method="spawn") if devices > 1 else "auto",
        precision=PRECISIONS[precision], max_epochs=math.ceil(plan.steps / plan.steps_per_epoch),  # type: ignore[arg-type]
        val_check_interval=plan.validate_every if validate else None, check_val_every_n_epoch=None,
        limit_val_batches=None if validate else 0, num_sanity_val_steps=0, log_every_n_steps=plan.log_every,
        callbacks=list(callbacks), logger=logger, plugins=[RunCheckpoints()], default_root_dir=root,
        enable_checkpointing=validate, use_distributed_sampler=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip


def check_devices(devices: int) -> None:
    """Raises BadInput where there are fewer GPUs than devices asked for (processors are never too few)."""
    if devices < 1:
        raise BadInput(f"devices={devices}: training needs at least one")
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise BadInput(f"devices={devices}: this machine has {torch.cuda.device_count()} GPUs")


def tensorboard(folder: Path, step: int) -> TensorBoardLogger:
    """The event file of a run; what an earlier process wrote beyond `step` is hidden."""
    return TensorBoardLogger(folder.parent, name=folder.name, version="", purge_step=step or None)


@contextmanager
def shared_by_name() -> Iterator[None]:
    """Lends tensors to other processes as files, not as descriptors: two tensors may then lie in one storage."""
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(before)


@contextmanager
def user_errors(folder: Path) -> Iterator[None]:
    """Turns what stops a training into one sentence, also where it happened in another process.

    Raises TrainingFailed, KeyboardInterrupt (Lightning would leave the program), or the error itself.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except torch.OutOfMemoryError as error:
        raise TrainingFailed(
            "the training does not fit into the memory of the device; use a smaller batch size"
        ) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFull(folder) from error
    except ProcessRaisedException as error:
        raise _from_process(str(error), folder) or error from None
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)


class DiskFull(TrainingFailed, OSError):
    """A file of the run could not be written."""

    def __init__(self, folder: Path):
        super().__init__(
            f"the disk of '{folder}' is full; the last good checkpoint is kept: free some space and run the same "
            "command again, which goes on from there"
        )


def _from_process(text: str, folder: Path) -> Exception | None:
    marker = f"{Diverged.__module__}.{Diverged.__qualname__}: "
    if marker in text:
        return Diverged(text.rpartition(marker)[2].strip())
    return DiskFull(folder) if "[Errno 28]" in text else None


def peek(checkpoint: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The step of a checkpoint, and what the clock and the recorder kept in it."""
    return checkpoint["global_step"], checkpoint["callbacks"]["Clock"], checkpoint["callbacks"]["Recorder"]
