"""What every task model must pass, whatever its task: losses with targets, typed predictions without, and it learns.

Runs over the cards of the kinds classifier, dense and embedder as they come, over the package's own classifier, and
over broken members. Detectors have checks of their own in `test_detectors.py`.
"""

from dataclasses import is_dataclass

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.catalog import list_cards
from opsin.tasks import Classes, Dense, Embeddings, TaskModel
from opsin.tasks.classify import Classifier

KINDS = {"classifier": Classes, "dense": Dense, "embedder": Embeddings}
MEMBERS = [(card.kind, name) for kind in KINDS for card in list_cards(kind) for name in card.names]


def images() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(8, 3, 16, 16)


def labels() -> Tensor:
    return torch.arange(8) % 4


def classifier() -> TaskModel:
    torch.manual_seed(1)
    return Classifier(opsin.create("metanet_n", num_classes=4), mean=(0.5,) * 3, std=(0.3,) * 3)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def check_losses_with_targets(model: TaskModel) -> None:
    losses = model(images(), labels())
    assert isinstance(losses, dict) and losses
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    total(losses).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def check_typed_predictions_without(model: TaskModel, expected: type) -> None:
    predictions = model.eval()(images())
    assert is_dataclass(predictions) and isinstance(predictions, expected)


def check_samples_do_not_influence_each_other(model: TaskModel) -> None:
    model.eval()
    together, alone = model(images()).logits, torch.cat([model(x[None]).logits for x in images()])
    assert torch.allclose(together, alone, atol=1e-4)


def check_overfits_eight_images(model: TaskModel) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        optimiser.zero_grad()
        total(model(images(), labels())).backward()
        optimiser.step()
    assert (model.eval()(images()).logits.argmax(1) == labels()).all()


@pytest.mark.parametrize(
    "check",
    [
        check_losses_with_targets,
        lambda model: check_typed_predictions_without(model, Classes),
        check_samples_do_not_influence_each_other,
        check_overfits_eight_images,
    ],
)
def test_the_classifier(check):
    check(classifier())


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_members(kind, name):
    model = opsin.create(name)
    check_losses_with_targets(model)
    check_typed_predictions_without(model, KINDS[kind])


class Broken(TaskModel):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 4))

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(images), targets)


class GivesATensor(Broken):
    def forward(self, images, targets=None):
        return self.loss(images, targets) if targets is not None else self.net(images)


class LooksAtTheBatch(Broken):
    def forward(self, images, targets=None):
        logits = self.net(images - images.mean(0))
        return Classes(logits)


class Frozen(Broken):
    def forward(self, images, targets=None):
        if targets is None:
            return Classes(self.net(images).detach())
        return {"loss": self.loss(images, targets).detach().requires_grad_()}


@pytest.mark.parametrize(
    ("member", "check"),
    [
        (GivesATensor, check_losses_with_targets),
        (GivesATensor, lambda model: check_typed_predictions_without(model, Classes)),
        (LooksAtTheBatch, check_samples_do_not_influence_each_other),
        (Frozen, check_losses_with_targets),
        (Frozen, check_overfits_eight_images),
    ],
)
def test_broken_members_are_caught(member, check):
    with pytest.raises(AssertionError):
        check(member())
