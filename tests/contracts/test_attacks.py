"""What every attack and defence must pass, and members that must not."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import opsin
from opsin.catalog import list_cards

ATTACKS = [card.key for card in list_cards("attack")]
DEFENCES = [card.key for card in list_cards("defence")]


def vit() -> nn.Module:
    torch.manual_seed(7)
    return opsin.create(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, dim=32, depth=2, num_heads=2, num_classes=4
    ).eval()


def small(name: str):
    return opsin.create(name, patch_size=8, steps=2)


def check_stays_inside_its_threat_model(attack) -> None:
    images = torch.rand(3, 3, 32, 32)
    attacked = attack(vit(), images, torch.zeros(3, dtype=torch.long))
    assert attacked.shape == images.shape and attacked.isfinite().all()
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert attack.allowed(images, attacked).all()
    assert ((images != attacked).any(1).flatten(1).sum(1) <= 64).all()


def check_refuses_what_is_outside(attack) -> None:
    images = torch.rand(3, 3, 32, 32)
    assert attack.allowed(images, images).all()
    assert not attack.allowed(images, 1 - images).any()
    too_bright = images.clone()
    too_bright[:, :, 0, 0] = 1.5
    assert not attack.allowed(images, too_bright).any()


def check_leaves_inputs_and_model_alone(attack) -> None:
    images, model = torch.rand(2, 3, 32, 32), vit().train()
    copy, before = images.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    attack(model, images, torch.zeros(2, dtype=torch.long))
    assert torch.equal(images, copy) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def check_defence_acts_and_is_undone(defence) -> None:
    model, images = vit(), torch.rand(2, 3, 32, 32)
    before = model(images)
    with defence.apply(model) as defended:
        assert not torch.equal(defended(images), before)
    assert torch.equal(model(images), before)
    with pytest.raises(ZeroDivisionError), defence.apply(model):
        _ = 1 / 0
    assert torch.equal(model(images), before)


CHECKS = [check_stays_inside_its_threat_model, check_refuses_what_is_outside, check_leaves_inputs_and_model_alone]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_attacks(name, check):
    check(small(name))


@pytest.mark.parametrize("name", DEFENCES)
def test_defences(name):
    check_defence_acts_and_is_undone(opsin.create(name))


class WholeImage:
    """Claims a patch and changes everything."""

    def __call__(self, model, images, labels):
        return (images + 0.1).clamp(0, 1)

    def allowed(self, images, attacked):
        return torch.ones(len(images), dtype=torch.bool)


class InPlace(WholeImage):
    def __call__(self, model, images, labels):
        images[:, :, :8, :8] = 0
        return images


class NeverUndone:
    @contextmanager
    def apply(self, model):
        model.blocks[0].attn.scale = 9.0
        yield model


@pytest.mark.parametrize(
    ("member", "check"),
    [
        (WholeImage(), check_stays_inside_its_threat_model),
        (WholeImage(), check_refuses_what_is_outside),
        (InPlace(), check_leaves_inputs_and_model_alone),
        (NeverUndone(), check_defence_acts_and_is_undone),
    ],
)
def test_broken_members_are_caught(member, check):
    with pytest.raises(AssertionError):
        check(member)
