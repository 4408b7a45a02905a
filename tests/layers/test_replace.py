"""Exchanging layers in a copy of a network."""

import pytest
import torch
from torch import nn

from opsin.layers.replace import with_layers_replaced


def swap(module: nn.Module) -> nn.Module | None:
    return nn.Sequential(nn.Linear(2, 2)) if isinstance(module, nn.Linear) else None


def test_a_copy_is_changed_everywhere_and_the_original_is_not():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.ReLU(), nn.Sequential(nn.Linear(2, 2), shared))
    new, count = with_layers_replaced(net, swap)
    assert count == 2 and new[0] is new[2][1] and isinstance(new[2][0], nn.Sequential)
    assert net[0] is shared and isinstance(net[2][0], nn.Linear)
    assert isinstance(new[0][0], nn.Linear), "what a replacement holds is left alone"


def test_the_model_itself_may_be_replaced():
    linear = nn.Linear(2, 2)
    new, count = with_layers_replaced(linear, swap)
    assert count == 1 and isinstance(new, nn.Sequential) and isinstance(linear, nn.Linear)
    same, none = with_layers_replaced(nn.ReLU(), swap)
    assert none == 0 and isinstance(same, nn.ReLU)


def test_places_without_a_module_stay():
    net = nn.Module()
    net.a, net.b = None, nn.Linear(2, 2)
    net.register_module("c", None)
    new, count = with_layers_replaced(net, swap)
    assert count == 1 and new.c is None and torch.is_tensor(new.b[0].weight)


def mixed(module: nn.Module) -> nn.Module | None:
    """A layer with real, complex and whole numbers, made without a word of device or type."""
    if not isinstance(module, nn.Linear):
        return None
    new = nn.BatchNorm1d(2)
    new.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    return new


@pytest.mark.parametrize(
    ("old", "real", "wide"),
    [
        (torch.float64, torch.float64, torch.complex128), (torch.bfloat16, torch.bfloat16, torch.complex64),
        (torch.complex128, torch.float64, torch.complex128),
    ],
)  # fmt: skip
def test_replacements_have_the_device_and_the_precision_of_what_they_replace(old, real, wide):
    for device in ("cpu", "meta"):
        net = nn.Sequential(nn.Linear(2, 2, dtype=old, device=device), nn.Linear(2, 2, device=device))
        new = with_layers_replaced(net, mixed)[0]
        assert {t.device.type for t in new.state_dict().values()} == {device}
        types = [(m.weight.dtype, m.running_var.dtype, m.num_batches_tracked.dtype, m.phase.dtype) for m in new]
        single = (torch.float32, torch.float32, torch.int64, torch.complex64)
        assert types == [(real, real, torch.int64, wide), single]


def test_parameters_that_a_replacement_takes_over_stay_themselves():
    def around(module: nn.Module) -> nn.Module | None:
        return nn.Sequential(module, nn.PReLU()) if isinstance(module, nn.Linear) else None

    net = nn.Sequential(nn.Linear(2, 2).double().requires_grad_(False), nn.Flatten())
    net.also = net[0].weight
    new = with_layers_replaced(net, around)[0]
    assert new[0][0].weight is new.also and not new.also.requires_grad
    assert new[0][1].weight.dtype == torch.float64 and torch.equal(new.also, net.also)
