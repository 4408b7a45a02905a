"""What every recipe must pass: switched off it changes nothing, and a killed training goes on bit for bit.

The checks run over every card of the kind, and over members that are broken on purpose, which they must catch.
"""

import inspect
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.catalog import entry, list_cards
from opsin.data import Data
from opsin.data.splits import Arrays
from opsin.recipes import Recipe
from opsin.train import defaults, job
from opsin.train.checkpoint import read_checkpoint
from opsin.train.fit import fit
from opsin.train.loop import Streams

CARDS = {card.key: card for card in list_cards("recipe")}
Make = Callable[[], Recipe]


class Network(nn.Sequential):
    """With a local error, for the recipe that wants one."""

    def slow_loss(self) -> Tensor:
        return self[0].weight.square().sum()


class Killed(BaseException):
    """Leaves the training where it stands."""


def weights(recipes: list[Recipe], out: Path) -> dict[str, Tensor]:
    """The last weights of a short training: 8 steps, 4 in an epoch, with dropout and running statistics."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    split = Arrays(images, torch.arange(40) % 4)
    data = Data("noise", "classify", {"train": split, "val": split}, tuple("abcd"), 3, (16, 16), (0.5,) * 3, (0.3,) * 3)
    torch.manual_seed(2)
    network = Network(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(196, 4)
    )
    fit(network, data, recipe=recipes, epochs=2, batch_size=10, out=out, logger=False, progress=False)
    checkpoint = read_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    return checkpoint["state_dict"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Tensor]:
    """What no recipe trains."""
    return weights([], tmp_path_factory.mktemp("plain") / "run")


def check_off(make: Make, folder: Path, plain: dict[str, Tensor]) -> None:
    """A recipe of probability 0 trains what no recipe trains."""
    torch.testing.assert_close(weights([make()], folder / "off"), plain, rtol=0, atol=0)


def check_resumes(make: Make, folder: Path) -> dict[str, Tensor]:
    """Killed at the third step (within an epoch) and at the sixth, each time a new process with a new recipe."""
    straight = weights([make()], folder / "straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "CHECKPOINT_SECONDS", 0.0)
        for step in (3, 6):
            patch.setattr(job, "Streams", partial(Axe, step))
            with pytest.raises(Killed):
                weights([make()], folder / "killed")
    torch.testing.assert_close(weights([make()], folder / "killed"), straight, rtol=0, atol=0)
    return straight


class Axe(Streams):
    """Kills the training at a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, *rest):
        if trainer.global_step == self.step:
            raise Killed
        super().on_train_batch_start(trainer, pl_module, *rest)


WITH_PROBABILITY = [key for key, card in CARDS.items() if "prob" in inspect.signature(entry(card)).parameters]


@pytest.mark.parametrize("name", [name for card in CARDS.values() for name in card.names])
def test_is_a_recipe(name):
    assert isinstance(opsin.create(name), Recipe)


@pytest.mark.parametrize("key", WITH_PROBABILITY)
def test_off_is_bit_identical(key, tmp_path, plain):
    check_off(partial(opsin.create, key, prob=0.0), tmp_path, plain)


@pytest.mark.parametrize("key", CARDS)
def test_resumes_bit_for_bit_and_does_something(key, tmp_path, plain):
    straight = check_resumes(partial(opsin.create, key), tmp_path)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(straight, plain, rtol=0, atol=0)


class Noise(Recipe):
    """Adds noise to the images; what it draws is a function of seed and step."""

    def __init__(self, prob: float = 1.0):
        super().__init__()
        self.prob = prob

    def transform(self, images: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(images)  # drawn whether it is used or not
        return (images + 0.1 * noise, targets) if torch.rand(()) < self.prob else (images, targets)


class Growing(Recipe):
    """Brightens the images a little more at each step, and says in its state how far it has come."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def transform(self, images: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        self.seen += 1
        return images * (1 + 0.1 * self.seen), targets

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.seen = state_dict["seen"]


class HookedGrowing(Growing):
    """Counts in a hook, and draws there."""

    def on_train_batch_start(self, *_) -> None:
        self.seen += int(torch.randint(3, ()))


@pytest.mark.parametrize("make", [Noise, Growing, HookedGrowing])
def test_sound_members_pass(make, tmp_path):
    check_resumes(make, tmp_path)


def test_drawing_without_doing_anything_changes_nothing(tmp_path, plain):
    check_off(partial(Noise, prob=0.0), tmp_path, plain)


class OtherDice(Recipe):
    """Broken: draws from Python's random numbers, which no step seeds."""

    def transform(self, images: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        return images * random.uniform(0.5, 1.5), targets


class Forgetful(Growing):
    """Broken: what it keeps between steps does not travel in the checkpoint."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None: ...


class Restless(Noise):
    """Broken: does something at probability 0."""

    def transform(self, images: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        return super().transform(images.clamp(0.01, 0.99), targets, num_classes)


@pytest.mark.parametrize("broken", [OtherDice, Forgetful])
def test_resuming_catches(broken, tmp_path):
    with pytest.raises(AssertionError):
        check_resumes(broken, tmp_path)


def test_being_off_catches(tmp_path, plain):
    with pytest.raises(AssertionError):
        check_off(partial(Restless, prob=0.0), tmp_path, plain)
