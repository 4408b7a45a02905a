"""What every adapter must pass, and members that must not."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.catalog import card_of, list_cards

ADAPTERS = [name for card in list_cards("adapter") for name in card.names]


def vit() -> nn.Module:
    torch.manual_seed(5)
    return opsin.create(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, dim=32, depth=2, num_heads=2, num_classes=4
    )


def images(n: int = 4) -> Tensor:
    torch.manual_seed(6)
    return torch.rand(n, 3, 32, 32)


def trained(model: nn.Module, steps: int = 5) -> nn.Module:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images()), torch.arange(4)).backward()
        optimiser.step()
    return model.eval()


def check_only_its_own_parameters_train(adapter) -> None:
    base = vit()
    own = {id(p) for p in base.parameters()} - {id(p) for p in base.head.parameters()}
    frozen = {name: p.detach().clone() for name, p in base.named_parameters() if id(p) in own}
    by_id = {id(p): name for name, p in base.named_parameters()}
    torch.manual_seed(3)  # a bottleneck of one unit may start dead; here it does not
    model = adapter.adapt(base)
    assert any(p.requires_grad for p in model.parameters())
    kept = {by_id[id(p)]: p for p in model.parameters() if id(p) in own}
    assert set(kept) == set(frozen) and not any(p.requires_grad for p in kept.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trained(model)
    assert all(torch.equal(p, frozen[name]) for name, p in kept.items())
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], p) for name, p in before.items()), "an adapter parameter does not learn"


def check_near_identity_at_start(adapter, tolerance: float) -> None:
    base = vit().eval()
    before = base(images()).detach()
    model = adapter.adapt(base).eval()
    assert (model(images()) - before).abs().max() <= tolerance * before.abs().max()


def check_merged_equals_unmerged(adapter) -> None:
    model = trained(adapter.adapt(vit()))
    before = model(images()).detach()
    merged = adapter.merge(deepcopy(model)).eval()
    assert torch.allclose(merged(images()), before, atol=1e-5)


def check_it_adapts(adapter) -> None:
    model = adapter.adapt(vit())
    before = nn.functional.cross_entropy(model.eval()(images()), torch.arange(4)).detach()
    trained(model, 30)
    assert nn.functional.cross_entropy(model(images()), torch.arange(4)).detach() < before


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    "check", [check_only_its_own_parameters_train, check_merged_equals_unmerged, check_it_adapts],
    ids=lambda c: c.__name__,
)  # fmt: skip
def test_contract(name, check):
    check(opsin.create(name))


@pytest.mark.parametrize("name", ADAPTERS)
def test_near_identity(name):
    check_near_identity_at_start(opsin.create(name), card_of(name).facts.get("identity_at_start", 0.0))


class TrainsEverything:
    def adapt(self, model):
        return model

    def merge(self, model):
        return model


class LooksIdle:
    """Freezes all but the head and adds a parameter that never learns."""

    def adapt(self, model):
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        model.extra = nn.Parameter(torch.zeros(1))
        return model


class StartsElsewhere(TrainsEverything):
    def adapt(self, model):
        nn.init.normal_(model.head.weight, std=1.0)
        return model


class MergesWrongly(TrainsEverything):
    def merge(self, model):
        model.head.weight.data *= 1.01
        return model


class NeverLearns(LooksIdle):
    def adapt(self, model):
        super().adapt(model)
        model.head.requires_grad_(False)
        model.head.weight.data.zero_()
        model.head.register_forward_hook(lambda m, i, o: o + 0 * model.extra)
        return model


@pytest.mark.parametrize(
    ("member", "check"),
    [
        (TrainsEverything(), check_only_its_own_parameters_train),
        (StartsElsewhere(), lambda a: check_near_identity_at_start(a, 0.05)),
        (MergesWrongly(), check_merged_equals_unmerged),
        (NeverLearns(), check_it_adapts),
    ],
)
def test_broken_members_are_caught(member, check):
    with pytest.raises(AssertionError):
        check(member)


def test_a_parameter_that_never_learns_is_caught():
    with pytest.raises((AssertionError, TypeError)):
        check_only_its_own_parameters_train(LooksIdle())
