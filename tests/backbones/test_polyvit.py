"""PolyViT's positions: a circular convolution beside the tokens themselves."""

import pytest
import torch
from torch.nn import functional as F

from opsin.backbones.polyvit import CircularPosition, PolyViT


@torch.no_grad()
def test_positions_are_added_to_the_tokens():
    position, x = CircularPosition(6), torch.randn(2, 5, 4, 6)
    wrapped = F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="circular")
    around = F.conv2d(wrapped, position.proj.weight, position.proj.bias, groups=6).permute(0, 2, 3, 1)
    assert torch.allclose(position(x), x + around, atol=1e-6)


@torch.no_grad()
def test_tokens_pass_positions_that_learned_nothing():
    model, x = PolyViT(dim=24, depth=1, num_heads=3, patch_size=4, image_size=16), torch.rand(2, 3, 16, 16)
    for parameter in model.pos_conv.parameters():
        parameter.zero_()
    tokens = model.embed(x)
    assert tokens.shape == (2, 4, 4, 24) and float(tokens.std()) > 0.5


@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_shifts_change_no_logit(kind, change):
    model = PolyViT(dim=24, depth=2, num_heads=3, patch_size=4, image_size=16, num_classes=10).to(kind).eval()
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.rand(2, 3, 16, 24, dtype=kind)
    for shift in ((1, 0), (0, 3), (7, -5)):
        assert torch.allclose(model(x.roll(shift, (2, 3))), model(x), atol=change, rtol=change)
