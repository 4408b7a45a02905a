"""Twins, PolyTwins and PolyViT: what circular shifts do to them, and whose weights they take."""

import pytest
import torch
from torch import Tensor

import opsin
from opsin.backbones.polytwins import PolyTwins
from opsin.backbones.polyvit import PolyViT
from opsin.backbones.twins import Twins
from opsin.backbones.vit import VisionTransformer

TWINS = dict(dims=(16, 32, 32), depths=(2, 2, 2), num_heads=(1, 2, 2), sr_ratios=(4, 2, 1), window_size=2)
VIT = dict(dim=32, depth=2, num_heads=2, patch_size=4, image_size=32)
SHIFTS = [(1, 0), (0, 1), (5, -3), (17, 30), (-8, 4)]


def double(model: torch.nn.Module) -> torch.nn.Module:
    """In eval, with weights far from their start, so that every part counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def change(model: torch.nn.Module, x: Tensor) -> float:
    """The largest change of a logit over circular shifts, for the spread of the logits."""
    y = model(x)
    return max(float((model(x.roll(s, (2, 3))) - y).abs().max()) for s in SHIFTS) / float(y.std())


@torch.no_grad()
@pytest.mark.parametrize(
    ("poly", "plain"), [(PolyTwins(**TWINS), Twins(**TWINS)), (PolyViT(**VIT), VisionTransformer(**VIT))]
)
def test_circular_shifts_change_no_logit(poly, plain):
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    assert change(double(poly), x) < 1e-10
    assert change(double(plain), x) > 1e-3


@torch.no_grad()
def test_rectangles_and_single_images():
    model, x = double(PolyViT(**VIT)), torch.rand(3, 3, 24, 40, dtype=torch.float64)
    assert change(model, x) < 1e-10
    assert torch.allclose(model(x)[1], model(x[1:2])[0], atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["polyvit_small_patch16", "polytwins_svt_small"])
def test_published_sizes_are_invariant(name):
    model, x = opsin.create(name).double().eval(), torch.rand(1, 3, 224, 224, dtype=torch.float64)
    assert (model(x.roll((5, -13), (2, 3))) - model(x)).abs().max() < 1e-10


@torch.no_grad()
def test_zeros_at_the_border_break_it():
    """The trap: one convolution with zero padding, and the shift is seen again."""
    model, x = double(PolyTwins(**TWINS)), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    model.pos_block[0].proj[0].padding_mode = "zeros"
    assert change(model, x) > 1e-3


def test_plain_weights_load():
    assert PolyTwins(**TWINS).load_state_dict(Twins(**TWINS).state_dict())
    poly, plain = PolyViT(**VIT), VisionTransformer(**VIT)
    missing, unexpected = poly.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == ["pos_embed"] and {name.split(".")[0] for name in missing} == {"patch_embed", "pos_conv"}
