"""A small classifier whose exports are checked."""

import pytest
import torch
from torch import nn

from opsin.deploy.facts import Facts
from opsin.tasks import Classes


class Tiny(nn.Module):
    """A task model: normalises inside, predicts `Classes`."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, images, targets=None):
        return Classes(self.head(self.norm(self.conv(images - self.mean)).relu().mean((2, 3))))


@pytest.fixture(scope="session")
def facts():
    return Facts("tiny", "classify", ("cat", "dog", "été"), 3, (16, 16), "logits")


@pytest.fixture
def model():
    return Tiny().eval()


@pytest.fixture(scope="session")
def trained():
    torch.manual_seed(0)
    return Tiny().eval()
