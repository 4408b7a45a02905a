"""The layers that backbones share."""

import pytest
import torch
from torch import nn

from opsin.layers import DropPath, LayerNorm2d, LayerScale, PatchEmbed, drop_path_rates, init_weights_


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    layer = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    y = layer(x)
    assert {round(v, 4) for v in y.unique().tolist()} == {0.0, round(1 / 0.75, 4)}
    assert ((y == y[:, :1, :1]).all(dim=(1, 2))).all(), "a sample is dropped as a whole"
    assert y.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)


def test_rates_grow_linearly_over_all_blocks():
    rates = drop_path_rates(0.3, (2, 1, 3))
    assert [len(r) for r in rates] == [2, 1, 3]
    flat = [rate for stage in rates for rate in stage]
    assert flat == pytest.approx([0.0, 0.06, 0.12, 0.18, 0.24, 0.3])
    assert drop_path_rates(0.3, (1,)) == [[0.0]]


def test_layer_norm_of_channels():
    layer = LayerNorm2d(6)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 6, 3, 5)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = expected * layer.weight[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)


def test_patches_are_linear_maps_and_odd_rests_are_padded():
    layer = PatchEmbed(3, 8, 4)
    x = torch.randn(2, 3, 8, 12)
    patch = x[1, :, 4:8, 8:12].flatten()
    torch.testing.assert_close(layer(x)[1, 1, 2], layer.proj.weight.flatten(1) @ patch + layer.proj.bias)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0))[:, :, :7, :10]
    y = layer(padded)
    assert y.shape == (2, 2, 3, 8)
    whole = x.clone()
    whole[:, :, 7:], whole[..., 10:] = 0, 0
    torch.testing.assert_close(y, layer(whole))


@pytest.mark.parametrize("patch_size", [4, 16])
def test_patches_of_images_in_planes_and_in_pixels_are_the_same(patch_size):
    layer, x = PatchEmbed(3, 8, patch_size), torch.randn(2, 3, 32, 32)
    assert layer(x).is_contiguous() == (patch_size == 4)  # small patches come out as tokens
    torch.testing.assert_close(layer(x), layer(x.contiguous(memory_format=torch.channels_last)))


def test_layer_scale_is_a_gain_per_channel():
    layer = LayerScale(3, 0.1)
    assert torch.allclose(layer(torch.ones(2, 3)), torch.full((2, 3), 0.1))
    layer.gamma.data = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(layer(torch.ones(2, 2, 3))[0, 0], torch.tensor([1.0, 2.0, 3.0]))


def test_initialiser():
    model = nn.Sequential(nn.Linear(400, 100), nn.Conv2d(50, 50, 3), nn.LayerNorm(4))
    init_weights_(model)
    for layer in model[:2]:
        assert not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model[2].weight, torch.ones(4))
