"""A run that was killed and started again ends where an uninterrupted one does, bit for bit."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsin.errors import BadInput
from opsin.recipes.mixup import Mixup
from opsin.train import checkpoint as files
from opsin.train import job
from opsin.train.checkpoint import read_checkpoint
from opsin.train.fit import fit
from opsin.train.loop import Streams
from opsin.train.run import Run

STEPS = 15
OPTIONS = dict(epochs=3, batch_size=10, ema=True, seed=3, logger=False, progress=False)  # 5 steps in an epoch


class Killed(BaseException):
    """Leaves the training where it stands."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Axe(Streams):
        def on_train_batch_start(self, trainer, pl_module, *rest):
            if trainer.global_step == step:
                raise Killed
            super().on_train_batch_start(trainer, pl_module, *rest)

    monkeypatch.setattr(job, "Streams", Axe)


def state(run: Run) -> tuple[dict, list, dict]:
    """All that must agree: last weights and moments and best weights; records and result but for their times."""
    checkpoint = read_checkpoint(run.path / "checkpoints")
    assert checkpoint is not None
    tensors = {
        "last": checkpoint["state_dict"], "moments": checkpoint["optimizer_states"][0]["state"],
        "best": load_file(run.path / "weights.safetensors"),
    }  # fmt: skip
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics().to_pylist()]
    result = {k: v for k, v in run.result.items() if k != "seconds"}
    return tensors, rows, result


def assert_same(one: Run, other: Run) -> None:
    (tensors, rows, result), (tensors2, rows2, result2) = state(one), state(other)
    torch.testing.assert_close(tensors, tensors2, rtol=0, atol=0)
    assert rows == rows2
    assert result == result2


@pytest.fixture
def train(data, net):
    """The same training into any folder."""
    return lambda out, **more: fit(net(), data, recipe=[Mixup(prob=0.7)], out=out, **OPTIONS | more)


@pytest.fixture
def straight(train, tmp_path):
    return train(tmp_path / "straight")


@pytest.mark.usefixtures("often")
def test_killed_once(train, straight, tmp_path, monkeypatch):
    for step in (2, 5, 8, 14):
        out = tmp_path / f"killed-{step}"
        with monkeypatch.context() as patch:
            kill_at(step, patch)
            with pytest.raises(Killed):
                train(out)
        assert_same(train(out), straight)


@pytest.mark.usefixtures("often")
def test_killed_at_every_step_of_plans_whose_validations_fall_anywhere(train, out, tmp_path, monkeypatch):
    draft = job.draft
    monkeypatch.setattr(job, "draft", lambda *a, **k: replace(draft(*a, **k), steps=13, validate_every=4, log_every=3))
    straight = train(tmp_path / "straight")
    assert straight.result["steps"] == 13
    assert [r["step"] for r in straight.metrics().to_pylist() if r["name"] == "accuracy"] == [4, 8, 12, 13]
    for step in range(1, 13):
        with monkeypatch.context() as patch:
            kill_at(step, patch)
            with pytest.raises(Killed):
                train(out)
    assert_same(train(out), straight)
    (out / "result.json").unlink()
    assert_same(train(out), straight)


def test_another_seed_is_another_training(train, straight, tmp_path):
    with pytest.raises(AssertionError):
        assert_same(train(tmp_path / "other", seed=4), straight)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from conftest import network, stripes
import torch
from opsin.recipes.mixup import Mixup
from opsin.train import defaults, job
from opsin.train.fit import fit
from opsin.train.loop import Streams

class Axe(Streams):
    def on_train_batch_start(self, trainer, *rest):
        if trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_train_batch_start(trainer, *rest)

job.Streams = Axe
defaults.CHECKPOINT_SECONDS = 0.0
torch.set_num_threads(int(sys.argv[3]))
torch.manual_seed(5)
fit(network(), stripes(), recipe=[Mixup(prob=0.7)], out=sys.argv[1], epochs=3, batch_size=10, ema=True, seed=3,
    logger=False, progress=False)
"""


def test_sigkill(train, straight, out):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", SCRIPT, str(out), here, str(torch.get_num_threads())]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    assert read_checkpoint(out / "checkpoints")["global_step"] == 8
    with pytest.raises(BadInput, match="not finished"):
        Run.load(out)
    assert_same(train(out), straight)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("moment", ["before", "between"])
def test_killed_while_writing_a_checkpoint(train, straight, out, monkeypatch, moment):
    saves = []

    def write(path: Path, content: bytes) -> None:
        saves.append(path)
        if len(saves) == 7 and path.suffix == ".new":
            if moment == "between":  # the last has become the previous, and the new one is not yet in its place
                path.with_name(files.LAST).replace(path.with_name(files.PREVIOUS))
            path.write_bytes(content[: len(content) // 2])
            raise Killed
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", write)
        with pytest.raises(Killed):
            train(out)
    assert_same(train(out), straight)


@pytest.mark.usefixtures("often")
def test_a_damaged_checkpoint_gives_way_to_the_one_before(train, straight, out, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(9, patch)
        with pytest.raises(Killed):
            train(out)
    last, previous = (out / "checkpoints" / name for name in (files.LAST, files.PREVIOUS))
    last.write_bytes(last.read_bytes()[:1000])
    assert read_checkpoint(last.parent)["global_step"] == 8
    assert_same(train(out), straight)
    (out / "result.json").unlink()
    for file in (last, previous):
        file.write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"no checkpoint of the run can be read.*--force"):
        train(out)


@pytest.mark.usefixtures("often")
def test_killed_before_the_result_was_written(train, straight, out):
    run = train(out)
    (out / "result.json").unlink()
    assert_same(train(out), run)
    assert_same(run, straight)
