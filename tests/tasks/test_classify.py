"""Classifiers normalise inside, know their loss, and say what does not fit."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import opsin
from opsin.data import Data
from opsin.errors import BadInput, UnknownName
from opsin.layers.normalize import Normalize
from opsin.tasks import Classes, Images
from opsin.tasks.classify import Classifier, Classify
from opsin.tasks.registry import TASKS, task_by_name
from opsin.tasks.restore import Restore, RestorerModel

DATA = Data("photos", "classify", {}, ("cat", "dog", "owl"), 3, (32, 32), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


def linear(channels: int = 3, side: int = 32, classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))


def test_images_are_normalised_inside():
    classifier = Classify().wrap(linear(), DATA)
    images = torch.rand(5, 3, 32, 32)
    mean, std = torch.tensor(DATA.mean), torch.tensor(DATA.std)
    expected = classifier.network((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    predictions = classifier(images)
    assert isinstance(predictions, Classes)
    torch.testing.assert_close(predictions.logits, expected)
    assert {"normalize.mean", "normalize.std"} <= set(classifier.state_dict())


def test_channels_without_spread_are_only_shifted():
    layer = Normalize((0.5, 0.25), (0.0, 0.5))
    torch.testing.assert_close(layer(torch.ones(1, 2, 1, 1)).flatten(), torch.tensor([0.5, 1.5]))
    assert torch.equal(Normalize()(torch.ones(1, 3, 2, 2)), torch.ones(1, 3, 2, 2))
    assert "mean=[0.5, 0.25]" in repr(layer)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_by_its_definition_for_classes_and_probabilities(smoothing):
    classifier = Classifier(linear(), label_smoothing=smoothing)
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([0, 2, 1, 1])
    hard = F.one_hot(targets, 3).float()
    log = classifier(images).logits.log_softmax(1)
    expected = -((hard * (1 - smoothing) + smoothing / 3) * log).sum(1).mean()
    torch.testing.assert_close(classifier(images, targets)["loss"], expected)
    torch.testing.assert_close(classifier(images, hard)["loss"], expected)
    mixed = 0.5 * hard + 0.5 * hard.roll(1, 0)
    expected = -((mixed * (1 - smoothing) + smoothing / 3) * log).sum(1).mean()
    torch.testing.assert_close(classifier(images, mixed)["loss"], expected)


def test_accuracy_is_over_all_samples():
    task = Classify()
    metric = task.metric(DATA)
    for logits, targets in (([[1.0, 0, 0]] * 3, [0, 0, 1]), ([[0, 0, 1.0]], [2])):
        task.update_metric(metric, Classes(torch.tensor(logits)), torch.tensor(targets))
    assert float(metric.compute()) == pytest.approx(3 / 4)


def test_a_classifier_stays_as_it_is():
    classifier = Classifier(linear())
    assert Classify(0.3).wrap(classifier, DATA) is classifier


def test_wrapping_leaves_mode_and_random_numbers_alone():
    network = linear().train()
    before = torch.get_rng_state()
    assert Classify().wrap(network, DATA).training
    assert network.eval() and not Classify().wrap(network, DATA).network.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("network", "data", "told"),
    [
        (linear(), replace(DATA, classes=("cat",)), "'photos' has 1 class; classification needs at least two"),
        (
            opsin.create("metanet_n", num_classes=3, in_chans=1), DATA,
            "takes images of 1 channels but those of 'photos' have 3; create it with in_chans=3",
        ),
        (
            opsin.create("metanet_n", num_classes=10), DATA,
            "gives 10 classes but 'photos' has 3; create it with num_classes=3",
        ),
        (
            opsin.create("metanet_t", num_classes=3), replace(DATA, size=(16, 40)),
            "are 16x40 pixels, smaller than the network's stride of 32; use larger images",
        ),
        (linear(side=28), DATA, r"cannot take the images of 'photos' \(3x32x32\)"),
        (linear(classes=5), DATA, r"output of shape \(1, 5\), not \(1, 3\)"),
        (nn.Conv2d(3, 3, 1), DATA, r"output of shape \(1, 3, 32, 32\)"),
        (RestorerModel(opsin.create("espcn_x2")), replace(DATA, channels=1), "RestorerModel is not a classifier"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(network, data, told):
    with pytest.raises(BadInput, match=told):
        Classify().wrap(network, data)


def test_tasks_by_name():
    assert {task_by_name(name).name for name in TASKS} >= {"classify", "segment", "restore"}
    assert task_by_name("classify", 0.2).label_smoothing == 0.2
    with pytest.raises(UnknownName, match="no task called 'classifi'; did you mean classify"):
        task_by_name("classifi")


PAIRS = Data("pairs", "restore", {}, size=(8, 8), scale=2)


def test_a_restorer_is_trained_with_its_own_loss_or_with_the_distance():
    images, clean = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
    restorer = opsin.create("espcn_x2")
    model = Restore().wrap(restorer, PAIRS)
    torch.testing.assert_close(model(images, clean)["loss"], restorer.loss(images, clean))
    assert torch.equal(model.eval()(images).images, restorer(images))
    plain = Enlarge()
    for distance, loss in (("l1", F.l1_loss), ("mse", F.mse_loss)):
        model = Restore(distance).wrap(plain, PAIRS)
        torch.testing.assert_close(model(images, clean)["loss"], loss(plain(images), clean))


class Enlarge(opsin.restore.Restorer):
    scale = 2

    def forward(self, image):
        return F.interpolate(image, scale_factor=2)


def test_psnr_is_the_mean_over_images_of_clamped_values():
    task, clean = Restore(), torch.full((2, 3, 4, 4), 1.0)
    metric = task.metric(PAIRS)
    task.update_metric(metric, Images(torch.stack([clean[0] - 0.1, clean[1] - 0.01])), clean)
    task.update_metric(metric, Images(clean[:1] - 0.001), clean[:1])
    assert float(metric.compute()) == pytest.approx((20 + 40 + 60) / 3, rel=1e-3)
    metric.reset()
    task.update_metric(metric, Images(clean[:1] + 0.5), clean[:1] - 0.1)
    assert float(metric.compute()) == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "data", "told"),
    [
        (linear(), PAIRS, "needs a restorer, which Sequential is not"),
        (Enlarge(), replace(PAIRS, scale=3), "enlarges 2 times but the clean images of 'pairs' are 3 times"),
        (Enlarge(), DATA, "'photos' has no pairs of degraded and clean images"),
    ],
)
def test_what_is_no_restoration_is_told(model, data, told):
    with pytest.raises(BadInput, match=told):
        Restore().wrap(model, data)
