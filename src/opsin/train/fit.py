"""`fit`: trains one model on one data set, into a folder that says everything about it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from opsin._verbs import make_callable
from opsin.data import Data
from opsin.errors import BadInput, TrainingFailed
from opsin.measure import parse_duration
from opsin.train.build import describe
from opsin.train.checkpoint import sweep
from opsin.train.job import Execution, Job, Request
from opsin.train.quiet import quiet
from opsin.train.records import CHECKPOINTS, CONFIG, FILES, RESULT
from opsin.train.run import DISK_FULL, DONE, Run, clear, only_one, open_data, read_json


def fit(
    model: nn.Module | str, data: Data | str | Path, task: str | None = None, *, recipe: Sequence[Callback | str] = (),
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
        task: "classify", "segment", "detect" or "restore"; by default the data's.
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
    source = None if isinstance(data, Data) else str(data)
    options = dict(data_options or {})
    request = Request(
        model=describe(model), data=data.name if isinstance(data, Data) else str(data), data_options=options, task=task,
        recipe=[describe(r) for r in recipe], epochs=epochs, budget=None if budget is None else parse_duration(budget),
        seed=seed, batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup=warmup,
        label_smoothing=label_smoothing, ema=ema, augment=augment, precision=precision,
    )  # fmt: skip
    request.check()
    folder = Path(out) if out is not None else default_folder(model, request.data, seed)
    with only_one(folder), torch.random.fork_rng(devices=range(torch.cuda.device_count())), quiet():
        config = earlier(folder, request, force)
        result = read_json(folder / RESULT)
        if config is not None and result is not None and result["status"] != DISK_FULL:
            return _finished(Run(folder, config, result), model)
        opened = data if isinstance(data, Data) else open_data(str(data), options)
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
    sweep(folder, FILES)
    others = [path.name for path in folder.iterdir() if path.name != ".lock"]
    if force:
        clear(folder)
        return None
    config = read_json(folder / CONFIG)
    if config is None and others:
        raise BadInput(f"the folder '{folder}' is not empty and not a run; choose another --out, or use --force")
    if config is None:
        return None
    asked = json.loads(json.dumps(asdict(request))) | {"task": request.task or config["request"]["task"]}
    changed = [name for name, value in asked.items() if config["request"].get(name) != value]
    if changed and not (folder / RESULT).exists() and not any((folder / CHECKPOINTS).glob("*.ckpt")):
        clear(folder)  # it had not got as far as to save anything
        return None
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


make_callable(__name__)
