"""The slow loss as a recipe: its gradient, on any network that has one, and in a training by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import opsin
from opsin.backbones.terminator import Terminator
from opsin.data import Data
from opsin.data.splits import Arrays
from opsin.errors import BadInput
from opsin.recipes.penalty import Penalty
from opsin.recipes.slow_loss import SlowLoss
from opsin.tasks.classify import Classifier


def small() -> Terminator:
    return Terminator((4, 2), (0, 1), 4, 3, 8, slow_layers=1)


def noise() -> Data:
    images = torch.randint(256, (32, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Arrays(images, torch.arange(32) % 4)
    return Data("noise", "classify", {"train": split, "val": split}, tuple("abcd"), 3, (8, 8), (0.5,) * 3, (0.3,) * 3)


@pytest.mark.parametrize("wrap", [nn.Identity, Classifier], ids=["bare", "classifier"])
def test_it_adds_its_gradient(wrap):
    net, x, y = small(), torch.randn(4, 3, 8, 8), torch.arange(4)
    twin = copy.deepcopy(net)
    F.cross_entropy(net(x), y).backward()
    model = net if wrap is nn.Identity else wrap(net)
    with torch.no_grad():
        SlowLoss(0.3).on_after_backward(None, model)
    (F.cross_entropy(twin(x), y) + 0.3 * twin.slow_loss()).backward()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name
    before = copy.deepcopy([p.grad for p in net.parameters()])
    SlowLoss(0).on_after_backward(None, model)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, net.parameters(), strict=True))


def test_every_part_that_has_a_slow_loss_counts():
    a, b = small(), small()
    assert torch.allclose(SlowLoss().penalty(nn.ModuleList([a, nn.ReLU(), b])), a.slow_loss() + b.slow_loss())
    with pytest.raises(BadInput, match="such as terminator; leave it out"):
        SlowLoss().penalty(nn.Linear(3, 3))
    with pytest.raises(BadInput, match="0 or more, not -1"):
        SlowLoss(-1)


def test_fit_takes_it_by_name(tmp_path):
    """From the same start, the kernels come nearer to each other than without it."""
    start, losses = small(), []
    for name, recipe in (("without", []), ("with", ["slow_loss(weight=10)"])):
        net = copy.deepcopy(start)
        opsin.fit(
            net, noise(), recipe=recipe, epochs=3, batch_size=8, out=tmp_path / name, logger=False, progress=False
        )
        losses.append(net.slow_loss().item())
    assert losses[1] < 0.9 * losses[0]


def test_a_penalty_without_a_formula_says_so():
    with pytest.raises(TypeError, match="Penalty does not implement penalty"):
        Penalty(0.1).on_after_backward(None, nn.Linear(2, 2))
