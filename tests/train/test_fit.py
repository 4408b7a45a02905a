"""What a run leaves behind, what it refuses, and how it fails."""

import json
import signal
import time
from dataclasses import replace
from errno import ENOSPC

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput, TrainingFailed, UnknownName
from opsin.recipes import Recipe
from opsin.tasks.classify import Classify
from opsin.train import checkpoint as files
from opsin.train import job
from opsin.train.budget import Timing, fill
from opsin.train.checkpoint import read_checkpoint
from opsin.train.defaults import draft
from opsin.train.fit import default_folder, fit
from opsin.train.loop import Streams
from opsin.train.run import Run, only_one

QUICK = dict(epochs=2, batch_size=10, logger=False, progress=False)


def test_a_run_learns_and_its_folder_says_everything(data, net, out):
    run = fit(net(), data, epochs=30, batch_size=10, augment=False, out=out)
    assert run.result["status"] == "finished"
    assert run.val_score > 0.9 and run.test_score > 0.8
    assert run.result["score_name"] == "accuracy"
    assert run.result["steps"] == 150
    assert run.result["params"] == sum(p.numel() for p in net().parameters())
    files = {path.name for path in out.iterdir()} - {".lock"}
    assert files == {
        "config.json", "result.json", "metrics.parquet", "weights.safetensors", "curves.png", "checkpoints",
        "tensorboard",
    }  # fmt: skip
    assert any((out / "tensorboard").glob("events*"))
    assert Image.open(out / "curves.png").size[0] > 500
    rows = run.metrics().to_pylist()
    assert list(rows[0]) == ["step", "epoch", "split", "name", "value", "seconds"]
    val = [row for row in rows if (row["split"], row["name"]) == ("val", "accuracy")]
    assert [row["epoch"] for row in val] == list(range(30))
    assert max(row["value"] for row in val) == run.val_score
    assert [r["value"] for r in val if r["step"] == run.result["best_step"]] == [run.val_score]
    losses = [row["value"] for row in rows if (row["split"], row["name"]) == ("train", "loss")]
    assert len(losses) == 150 and np.mean(losses[-10:]) < np.mean(losses[:10])
    assert Run.load(out) == run


def test_the_module_is_trained_in_place_and_ends_with_the_best_weights(data, net, out):
    network = net()
    run = fit(network, data, out=out, **QUICK)
    best = load_file(out / "weights.safetensors")
    torch.testing.assert_close(network[0].weight, best["network.0.weight"], rtol=0, atol=0)
    images = torch.stack([data.test[i][0] for i in range(len(data.test))])
    logits, targets = run.predictions("test", data, net())
    assert targets.tolist() == [data.test[i][1] for i in range(len(data.test))]
    torch.testing.assert_close(run.model(net()).network(run.model(net()).normalize(images)), logits)
    assert (logits.argmax(1) == targets).float().mean().item() == pytest.approx(run.test_score)
    with pytest.raises(BadInput, match="was trained from a Python module"):
        run.model()
    with pytest.raises(BadInput, match="was trained on a Data object"):
        run.predictions("test", network=net())
    with pytest.raises(BadInput, match="has no split 'holdout'; it has train, val, test"):
        run.predictions("holdout", data, net())
    with pytest.raises(BadInput, match="do not fit"):
        run.model(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))


def test_a_run_by_names_rebuilds_its_model(out):
    run = fit("metanet_n(mixer=pooling)", "digits", data_options={"limit": 60}, out=out, **QUICK)
    logits, targets = run.predictions("test")
    assert logits.shape == (60, 10)
    assert (logits.argmax(1) == targets).float().mean().item() == pytest.approx(run.test_score)
    assert run.config["request"]["model"] == "metanet_n(mixer=pooling)"
    assert Run.load(out).model().network.feature_info[0].channels == 16


def test_a_finished_run_is_returned_at_once(data, net, out, monkeypatch):
    run = fit(net(), data, out=out, **QUICK)
    monkeypatch.setattr(job, "make_trainer", lambda *_, **__: pytest.fail("trained again"))
    network = net()
    assert fit(network, data, out=out, **QUICK).result == run.result
    torch.testing.assert_close(network[0].weight, load_file(out / "weights.safetensors")["network.0.weight"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(lr=0.5), "lr=None, not 0.5"), (dict(seed=1), "seed=0, not 1"), (dict(epochs=3), "epochs=2, not 3"),
        (dict(ema=True), "ema=False, not True"), (dict(recipe=["mixup"]), r"recipe=\[\], not \['mixup'\]"),
    ],
)  # fmt: skip
def test_another_run_in_the_folder_is_refused_and_forced(data, net, out, change, told):
    fit(net(), data, out=out, **QUICK)
    before = (out / "weights.safetensors").read_bytes()
    with pytest.raises(BadInput, match=f"{told}; choose another --out, or use --force"):
        fit(net(), data, out=out, **QUICK | change)
    assert (out / "weights.safetensors").read_bytes() == before
    (out / "notes.txt").write_text("mine")
    run = fit(net(), data, out=out, force=True, **QUICK | change)
    assert run.result["steps"] == run.config["plan"]["steps"] == 5 * (change.get("epochs") or 2)
    assert (out / "notes.txt").read_text() == "mine"


def test_changed_networks_and_data_are_refused(data, net, out, often, monkeypatch):
    fit(net(), data, out=out, **QUICK)
    with pytest.raises(BadInput, match="holds a run with model="):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), data, out=out, **QUICK)
    frozen = net()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(BadInput, match="holds a run with model="):
        fit(frozen, data, out=out, **QUICK)
    (out / "result.json").unlink()
    with pytest.raises(BadInput, match="'stripes' has changed since the run"):
        fit(net(), replace(data, splits=data.splits | {"train": data.val}), out=out, **QUICK)


def test_a_folder_of_somebody_else_is_left_alone(data, net, out):
    out.mkdir()
    (out / "thesis.tex").write_text("chapter 1")
    with pytest.raises(BadInput, match=f"the folder '{out}' is not empty and not a run"):
        fit(net(), data, out=out, **QUICK)
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_what_a_kill_left_half_written_is_nobodys(data, net, out):
    out.mkdir()
    mine = {".config.json.mine", ".thesis.tex.1"}
    for name in (*mine, ".config.json.4321", ".metrics.parquet.17"):
        (out / name).write_text("{")
    with pytest.raises(BadInput, match="is not empty and not a run"):
        fit(net(), data, out=out, **QUICK)
    assert {path.name for path in out.iterdir()} - {".lock"} == mine
    for name in mine:
        (out / name).unlink()
    (out / ".config.json.4321").write_text("{")
    assert fit(net(), data, out=out, **QUICK).status == "finished"
    assert not list(out.glob(".config*"))


def test_one_process_at_a_time(data, net, out):
    with only_one(out), pytest.raises(BadInput, match=f"another process is training in '{out}'"):
        fit(net(), data, out=out, **QUICK)


def test_nothing_is_left_of_a_call_that_could_not_start(out):
    with pytest.raises(UnknownName, match="metanet_xt"):
        fit("metanet_xtt", "digits", out=out, **QUICK)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(epochs=2, budget="1m"), "epochs or a budget, not both"), (dict(epochs=0), "epochs=0"),
        (dict(lr=-1.0), "lr=-1.0"), (dict(batch_size=51), "51 does not go with 50 training images; use 1 to 50"),
        (dict(warmup=2.0), "warmup=2.0"), (dict(label_smoothing=1.0), "label_smoothing=1.0"),
        (dict(precision="8"), "precision='8': choose one of 32, bf16"), (dict(devices=0), "devices=0"),
        (dict(budget="soon"), "'soon' is not a duration"),
        (dict(devices=3, batch_size=10), "10 cannot be shared by 3 devices; use a multiple of 3"),
        (dict(recipe=["metanet_n"]), "'metanet_n' is not a recipe"),
        (dict(recipe=["mixup", "mixup"]), "Mixup is given twice"), (dict(task="sing"), "no task called 'sing'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(data, net, out, change, told):
    with pytest.raises((BadInput, UnknownName), match=told):
        fit(net(), data, out=out, logger=False, **change)


def test_names_that_are_no_networks(data, out):
    with pytest.raises(BadInput, match=r"'pooling' is of the kind 'operator'.*metanet_xt\(mixer=pooling\)"):
        fit("pooling", data, out=out, **QUICK)


def test_data_for_tasks_without_training(data, net, out):
    with pytest.raises(BadInput, match=r"'stripes' is data for the task 'images', which fit does not train"):
        fit(net(), replace(data, task="images"), out=out, **QUICK)


def test_images_of_different_sizes(data, net, out):
    with pytest.raises(BadInput, match="differ in size; bring them to one size"):
        fit(net(), replace(data, size=None), out=out, **QUICK)
    with pytest.raises(BadInput, match="has no training images"):
        fit(net(), replace(data, splits={"test": data.test}), out=out, **QUICK)


class Bomb(Recipe):
    """Makes the images infinite from some step on."""

    def __init__(self, step: int):
        super().__init__()
        self.step, self.now = step, 0

    def on_train_batch_start(self, trainer, *_):
        self.now = trainer.global_step + 1

    def transform(self, images, targets, num_classes):
        return (images * float("inf") if self.now >= self.step else images), targets


@pytest.mark.usefixtures("often")
def test_a_loss_that_is_not_a_number(data, net, out):
    with pytest.raises(TrainingFailed, match=r"not a number at step 8 .*last good checkpoint is kept"):
        fit(net(), data, recipe=[Bomb(8)], out=out, **QUICK)
    result = json.loads((out / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("diverged", 7)
    assert "step 8" in result["message"] and result["val_score"] is not None
    checkpoint = read_checkpoint(out / "checkpoints")
    assert checkpoint["global_step"] == 7
    for tensors in (checkpoint["state_dict"], load_file(out / "weights.safetensors")):
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    again = Bomb(8)
    with pytest.raises(TrainingFailed, match="use --force"):  # it would happen again
        fit(net(), data, recipe=[again], out=out, **QUICK)
    assert again.now == 0, "it trained again"


class Cusp(nn.Module):
    """A finite loss whose gradient is not: the square root at zero."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def forward(self, x):
        return self.linear(x.flatten(1)) + (self.linear.weight.sum() * 0).sqrt()


def test_a_gradient_that_is_not_a_number(data, out):
    with pytest.raises(TrainingFailed, match="at step 1 "):
        fit(Cusp(), data, out=out, **QUICK)
    assert Run.load(out).status == "diverged" and Run.load(out).val_score is None


@pytest.mark.usefixtures("often")
def test_a_full_disk(data, net, out, tmp_path, monkeypatch):
    straight = fit(net(), data, out=tmp_path / "straight", **QUICK)
    replace_file, writes = files.Path.replace, []

    def full(self, target):
        writes.append(target)
        if len(writes) > 12:
            raise OSError(ENOSPC, "No space left on device")
        return replace_file(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "replace", full)
        with pytest.raises(TrainingFailed, match=f"the disk of '{out}' is full; .* same command again") as caught:
            fit(net(), data, out=out, **QUICK)
    assert isinstance(caught.value, OSError)
    assert not list(out.rglob(".*.*")), "half-written files"
    assert 1 <= read_checkpoint(out / "checkpoints")["global_step"] < 10
    run = fit(net(), data, out=out, **QUICK)
    assert run.result["status"] == "finished"
    torch.testing.assert_close(
        load_file(out / "weights.safetensors"), load_file(straight.path / "weights.safetensors"), rtol=0, atol=0
    )


@pytest.mark.usefixtures("often")
def test_an_interrupt_leaves_a_folder_to_go_on_from(data, net, out, tmp_path, monkeypatch):
    class Impatient(Streams):
        def on_train_batch_start(self, trainer, pl_module, *rest):
            if trainer.global_step == 7:
                signal.raise_signal(signal.SIGINT)
            super().on_train_batch_start(trainer, pl_module, *rest)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(job, "Streams", Impatient)
            with pytest.raises(KeyboardInterrupt):
                fit(net(), data, out=out, **QUICK)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(BadInput, match="goes on where it stopped"):
        Run.load(out)
    straight = fit(net(), data, out=tmp_path / "straight", **QUICK)
    assert fit(net(), data, out=out, **QUICK).result["val_score"] == straight.val_score
    torch.testing.assert_close(
        read_checkpoint(out / "checkpoints")["state_dict"],
        read_checkpoint(straight.path / "checkpoints")["state_dict"], rtol=0, atol=0,
    )  # fmt: skip


def test_a_budget_becomes_a_plan_that_keeps_to_it(data, net, out):
    started = time.perf_counter()
    run = fit(net(), data, budget="2s", batch_size=10, out=out, logger=False)
    wall = time.perf_counter() - started
    plan = run.config["plan"]
    assert run.result["status"] in ("finished", "out of time")
    assert plan["steps"] % plan["validate_every"] == 0
    assert plan["limit_seconds"] == pytest.approx(2.6)
    assert 0 < plan["calibration_seconds"] < run.result["seconds"] < wall
    assert run.result["seconds"] <= 2.6 + 3, "the guard did not strike"  # a step of a busy machine may take long
    assert {row["split"] for row in run.metrics().to_pylist()} == {"train", "val"}


def test_calibrating_leaves_the_model_and_the_recipes_alone(data, net, out, monkeypatch):
    seen = []
    train = job.Job.train
    monkeypatch.setattr(job.Job, "train", lambda self, module, plan, recipes: (
        seen.append((module.model.network[0].weight.clone(), recipes[0].now)), train(self, module, plan, recipes)
    ))  # fmt: skip
    fit(net(), data, budget="1s", batch_size=10, recipe=[Bomb(10**9)], out=out, logger=False)
    torch.testing.assert_close(seen[0][0], net()[0].weight, rtol=0, atol=0)
    assert seen[0][1] == 0


def test_the_guard_stops_a_run_that_was_planned_too_long(data, net, out, monkeypatch):
    monkeypatch.setattr(job, "measure_timing", lambda *_, **__: Timing(1e-7, 1e-5))
    run = fit(net(), data, budget="1s", batch_size=10, out=out, logger=False)
    assert run.result["status"] == "out of time"
    assert run.result["steps"] < run.config["plan"]["steps"]
    assert 1.3 <= run.result["seconds"] < 4
    assert run.result["message"] == f"stopped at step {run.result['steps']}, after 1.3 times the budget"
    assert run.result["val_score"] > 0 and (out / "weights.safetensors").exists()
    (out / "result.json").unlink()  # also where a kill hides that it had stopped
    monkeypatch.setattr(job, "make_trainer", lambda *_, **__: pytest.fail("trained again"))
    assert fit(net(), data, budget="1s", batch_size=10, out=out, logger=False).result["status"] == "out of time"


def test_filling_a_budget():
    plan = draft(
        "classify", samples=1000, parameters=10_000, devices=1, epochs=None, batch_size=50, lr=None, weight_decay=None,
        warmup=0.05, ema=True, uneven=False,
    )  # fmt: skip
    cheap = fill(plan, 100, 5, Timing(step=0.01, validation=0.02), 0.05)
    assert cheap.steps / cheap.validate_every == 50
    assert cheap.steps * 0.01 + 50 * 0.02 == pytest.approx(95, rel=0.02)
    assert cheap.warmup_steps == round(0.05 * cheap.steps)
    dear = fill(plan, 100, 5, Timing(step=0.01, validation=4), 0.05)
    assert dear.steps / dear.validate_every == 3  # 15 % of 95 s
    assert dear.steps * 0.01 + 3 * 4 == pytest.approx(95, rel=0.02)
    hopeless = fill(plan, 1, 3, Timing(step=10, validation=10), 0.05)
    assert hopeless.steps == hopeless.validate_every == 1


def test_the_caller_s_random_numbers_and_output_are_left_alone(data, net, out, capfd, recwarn):
    network = net()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    fit(network, data, out=out, epochs=1, batch_size=10)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert [str(w.message) for w in recwarn] == []


def test_weights_are_a_function_of_the_seed(data, tmp_path):
    options = dict(data_options={"limit": 40}, out=None) | QUICK
    first, again, other = (
        fit("metanet_n", "digits", seed=seed, **options | {"out": tmp_path / name})
        for seed, name in ((0, "first"), (0, "again"), (1, "other"))
    )
    weights = [load_file(run.path / "weights.safetensors")["network.head.weight"] for run in (first, again, other)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not torch.equal(weights[0], weights[2])


def test_bf16(data, net, out):
    run = fit(net(), data, precision="bf16", out=out, **QUICK)
    assert load_file(out / "weights.safetensors")["network.0.weight"].dtype == torch.float32
    assert run.result["status"] == "finished"


def test_default_folder():
    assert str(default_folder("metanet_xt(mixer=tvconv, k=3)", "/data/my photos", 2)) == (
        "runs/metanet_xt-mixer=tvconv-k=3-my-photos-s2"
    )
    assert str(default_folder(nn.Linear(1, 1), "digits", 0)) == "runs/linear-digits-s0"


def test_restorers_train_in_their_own_space(tmp_path, out):
    pattern = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(1))
    for split, count in (("train", 16), ("val", 3), ("test", 3)):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True)
        for i in range(count):
            size = (48, 48 + 4 * (split == "val"))
            image = F.interpolate(pattern.roll(i, 2)[None], size, mode="bicubic")
            pixels = (image[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{i}.png")
    run = fit(
        "espcn_x2", str(tmp_path / "photos"), data_options={"degrade": "bicubic:2", "crop": 32}, epochs=40, lr=1e-2,
        out=out, logger=False,
    )  # fmt: skip
    assert (run.result["score_name"], run.config["plan"]["eval_batch_size"]) == ("psnr", 1)
    scores = [row["value"] for row in run.metrics().to_pylist() if row["name"] == "psnr"]
    assert run.val_score == max(scores) > scores[0] + 3
    with pytest.raises(BadInput, match="enlarges 3 times but the clean images of 'photos' are 2 times"):
        fit("espcn_x3", opsin.data.open(str(tmp_path / "photos"), degrade="bicubic:2"), out=tmp_path / "x3")


class Undecided(nn.Module):
    """Adds noise to its logits even when it is evaluated, and starts in eval mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 4)
        self.dropout = nn.Dropout(0.5)
        self.eval()

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        self.trained = self.dropout.training
        return logits + 3 * torch.randn_like(logits)


def test_what_a_model_draws_in_validation_is_the_same_each_time(data, out):
    network = Undecided()
    run = fit(network, data, out=out, epochs=6, batch_size=10, lr=1e-12, logger=False)
    scores = [row["value"] for row in run.metrics().to_pylist() if row["name"] == "accuracy"]
    assert len(set(scores)) == 1
    (out / "result.json").unlink()
    assert fit(Undecided(), data, out=out, epochs=6, batch_size=10, lr=1e-12, logger=False).result == run.result


def test_networks_are_trained_in_train_mode(data, out, monkeypatch):
    modes = []
    step = job.Training.training_step

    def watched(self, *batch):
        losses = step(self, *batch)
        modes.append(self.model.network.trained)
        return losses

    monkeypatch.setattr(job.Training, "training_step", watched)
    fit(Undecided(), data, out=out, **QUICK)
    assert modes and all(modes)


class Diary(Recipe):
    """Notes the first number of its stream and of the hooks' stream at each step."""

    def __init__(self):
        super().__init__()
        self.drawn, self.hooked = [], []

    def on_train_batch_start(self, *_):
        self.hooked.append(torch.rand(()).item())

    def transform(self, images, targets, num_classes):
        self.drawn.append(torch.rand(()).item())
        return images, targets


class Second(Diary):
    """Another recipe."""


def test_every_step_and_every_consumer_draws_its_own_numbers(data, net, tmp_path):
    diaries = [Diary(), Second(), Diary()]
    fit(net(), data, recipe=diaries[:2], out=tmp_path / "two", **QUICK)
    fit(net(), data, recipe=diaries[2:], out=tmp_path / "one", **QUICK)
    first, second, alone = (diary.drawn for diary in diaries)
    assert len(set(first + second + diaries[0].hooked)) == 3 * 10
    assert first == alone


def test_with_ema_the_averaged_weights_are_kept(data, net, out):
    run = fit(net(), data, ema=True, out=out, **QUICK | {"epochs": 1})
    assert run.result["best_step"] == run.result["steps"]
    state = read_checkpoint(out / "checkpoints")["state_dict"]
    best = load_file(out / "weights.safetensors")
    torch.testing.assert_close(best, {name: state[f"average.module.{name}"] for name in best}, rtol=0, atol=0)
    assert not torch.equal(best["network.0.weight"], state["model.network.0.weight"])
    assert not torch.equal(best["network.0.weight"], net()[0].weight)
    assert int(state["average.n_averaged"]) == run.result["steps"]


def test_gradients_are_clipped(data, net):
    plan = draft(
        "classify", samples=50, parameters=1, devices=1, epochs=1, batch_size=10, lr=None, weight_decay=None, warmup=0,
        ema=False, uneven=False,
    )  # fmt: skip
    task = Classify()
    training = job.Training(task.wrap(net(), data), task, task.metric(data), plan, num_classes=4, seed=0)
    for parameter in training.model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    training.configure_gradient_clipping(None)
    norm = torch.stack([p.grad.norm() for p in training.model.parameters()]).norm()
    assert norm.item() == pytest.approx(plan.clip, rel=1e-4)
