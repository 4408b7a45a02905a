"""A small classification task: coloured noise whose class is a stripe, and a network with every kind of trap in it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from opsin.data import Data
from opsin.train import defaults


class Stripes:
    """Images of 8x8 pixels; the class is the row that is brightest on average."""

    def __init__(self, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 4
        self.images = torch.rand(count, 1, 8, 8, generator=generator) * 0.7
        for image, label in zip(self.images, self.labels.tolist(), strict=True):
            image[:, 2 * label : 2 * label + 2] += 0.3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])


def stripes(train: int = 50, val: int = 21, test: int = 19) -> Data:
    splits = {"train": Stripes(train, 1), "val": Stripes(val, 2), "test": Stripes(test, 3)}
    return Data("stripes", "classify", splits, ("a", "b", "c", "d"), 1, (8, 8), (0.42,), (0.23,))


def network() -> nn.Module:
    """Running statistics, dropout, and weights drawn from the global random numbers."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(384, 4)
    )


@pytest.fixture
def data() -> Data:
    return stripes()


@pytest.fixture
def net() -> Callable[[], nn.Module]:
    """A fresh network with the same weights each time."""

    def build() -> nn.Module:
        torch.manual_seed(5)
        return network()

    return build


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(defaults, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"
