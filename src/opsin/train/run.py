"""A run: one training, as a folder.

| file                  | what                                                                                       |
| --------------------- | ------------------------------------------------------------------------------------------ |
| config.json           | `request` (what was asked for), `data`, `plan` (steps, rates, ...), `params`, `machine`    |
| metrics.parquet       | long form: step, epoch, split, name, value, seconds                                        |
| weights.safetensors   | of the best validation (the averaged ones with EMA)                                        |
| result.json           | status, val_score, test_score, score_name, best_step, steps, seconds, params, message      |
| curves.png            | losses and validation score over the steps                                                 |
| checkpoints/          | the last two, to go on from                                                                |
| tensorboard/          | the same numbers for TensorBoard                                                           |
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import nn

from opsin.data import Data
from opsin.errors import BadInput
from opsin.tasks import Task, TaskModel
from opsin.tasks.registry import task_by_name
from opsin.train.build import build_task_model, data_from
from opsin.train.evaluate import Predictions, predict
from opsin.train.records import CHECKPOINTS, CONFIG, FILES, METRICS, RESULT, TENSORBOARD, WEIGHTS

FINISHED = "finished"  # the planned steps were taken
OUT_OF_TIME = "out of time"  # the guard of the budget struck; the best weights so far are there
DIVERGED = "diverged"  # the loss was not a number
DISK_FULL = "disk full"
DONE = (FINISHED, OUT_OF_TIME)


@dataclass
class Run:
    """A finished training. `config` and `result` are the contents of the two JSON files."""

    path: Path
    config: dict[str, Any]
    result: dict[str, Any]

    @classmethod
    def load(cls, path: Path | str) -> "Run":
        """A run from its folder. Raises BadInput where it is none, or not finished."""
        path = Path(path)
        config, result = read_json(path / CONFIG), read_json(path / RESULT)
        if config is None:
            raise BadInput(f"'{path}' is not the folder of a run: it has no {CONFIG}")
        if result is None:
            raise BadInput(f"the run '{path}' is not finished; the command that started it goes on where it stopped")
        return cls(path, config, result)

    @property
    def status(self) -> str:
        return self.result["status"]

    @property
    def val_score(self) -> float:
        """The best validation score; `result["score_name"]` says of what."""
        return self.result["val_score"]

    @property
    def test_score(self) -> float | None:
        """The score of the same weights on the test split; None where the data has none."""
        return self.result["test_score"]

    @property
    def task(self) -> Task:
        request = self.config["request"]
        return task_by_name(request["task"], self.config["label_smoothing"])

    def model(self, network: nn.Module | None = None) -> TaskModel:
        """The task model with the best weights, in eval mode.

        network: where the run was started with a module instead of a name, one of the same structure; it is changed.
        Raises BadInput: no module given for such a run, or one that does not fit.
        """
        if network is None and not self.config["named"]:
            raise BadInput(f"the run '{self.path}' was trained from a Python module; pass one like it to model()")
        data = data_from(self.config["data"])
        model = build_task_model(network or self.config["request"]["model"], self.task, data)
        return load_best(self.path, model).eval()

    def metrics(self) -> Any:
        """The numbers of the run, as a pyarrow table."""
        import pyarrow.parquet as pq

        return pq.read_table(self.path / METRICS)

    def predictions(
        self, split: str = "test", data: Data | None = None, network: nn.Module | None = None
    ) -> Predictions:
        """(logits, targets) of a split in its order, by the best weights.

        data: needed where the run was started with a `Data` object. Raises BadInput: no such split, no logits.
        """
        facts = self.config["data"]
        if data is None:
            if facts["source"] is None:
                raise BadInput(f"the run '{self.path}' was trained on a Data object; pass it as data=")
            data = open_data(facts["source"], facts["options"])
        return predict(self.model(network), data, split, self.config["plan"]["eval_batch_size"])


def open_data(source: str, options: dict[str, Any]) -> Data:
    """Opens the data of a run; JSON has turned pairs into lists."""
    import opsin.data

    return opsin.data.open(source, **{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def load_best(path: Path, model: TaskModel) -> TaskModel:
    """Puts the best weights of a run into a task model. Raises BadInput where they are missing or do not fit."""
    from safetensors.torch import load_file

    if not (path / WEIGHTS).is_file():
        raise BadInput(f"the run '{path}' has no {WEIGHTS}: it stopped before its first validation")
    try:
        model.load_state_dict(load_file(path / WEIGHTS))
    except RuntimeError as error:
        raise BadInput(
            f"the weights of the run '{path}' do not fit the module: {str(error).splitlines()[-1]}"
        ) from error
    return model


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file; None where there is none. Raises BadInput where it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"the file '{path}' is not valid JSON: {error}; use --force to start the run anew") from error


def clear(path: Path) -> None:
    """Removes the files of a run from its folder, and nothing else."""
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, TENSORBOARD):
        shutil.rmtree(path / name, ignore_errors=True)


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Holds the folder for this process. Raises BadInput where another one trains in it."""
    path.mkdir(parents=True, exist_ok=True)
    lock = path / ".lock"
    with lock.open("w") as file:
        _hold(file, path)
        try:
            yield
        finally:
            if list(path.iterdir()) == [lock]:  # nothing came of it
                lock.unlink()
                path.rmdir()


def _hold(file: IO[str], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # a system without such locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise BadInput(f"another process is training in '{path}'; wait for it, or choose another --out") from error
