"""PolyViT's positions: a circular convolution beside the tokens themselves."""

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
