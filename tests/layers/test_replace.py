"""Exchanging layers in a copy of a network."""

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
