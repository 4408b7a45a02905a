"""Patches, rollout and temperature: exact properties of the bench."""

import pytest
import torch
from torch import nn

import opsin
from opsin.errors import BadInput
from opsin.robust.attention_tools import AttentionTemperature, attention_maps, attention_shift, rollout
from opsin.robust.vit_patch_robustness import PatchAttack, PatchCorruption, patch_masks


def vit() -> nn.Module:
    torch.manual_seed(7)
    net = opsin.create("vit_tiny_patch16_224", image_size=16, patch_size=4, dim=32, depth=3, num_heads=4, num_classes=5)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return net.eval()


def test_masks_tile_the_grid():
    masks, grid = patch_masks(16, 20, 4)
    assert grid == (4, 5) and masks.shape == (20, 1, 16, 20)
    assert torch.equal(masks.sum(0), torch.ones(1, 16, 20, dtype=torch.long))
    assert masks[6, 0, 4:8, 4:8].all() and masks[6].sum() == 16


def test_a_shifted_grid_lies_between_the_tokens():
    masks, grid = patch_masks(16, 16, 4, shift=2)
    assert grid == (3, 3) and masks[0, 0, 2:6, 2:6].all() and (masks.flatten(1).sum(1) == 16).all()


def test_a_patch_larger_than_the_image_is_named():
    with pytest.raises(BadInput, match="does not fit"):
        patch_masks(8, 8, 16)


@pytest.mark.parametrize("perturbation", [PatchAttack(4, steps=3), PatchCorruption(patch_size=4)])
def test_pixels_outside_the_patch_are_bit_identical(perturbation):
    images = torch.rand(2, 3, 16, 16)
    result = perturbation.fooling(vit(), images)
    masks, _ = patch_masks(16, 16, 4)
    outside = ~masks.expand(-1, 3, -1, -1)
    for n in range(2):
        for p in range(16):
            assert torch.equal(result.images[n, p][outside[p]], images[n][outside[p]])
    assert result.images.min() >= 0 and result.images.max() <= 1


def test_the_attack_does_better_than_its_start_and_stops_at_the_first_change():
    net, images = vit(), torch.rand(4, 3, 16, 16)
    torch.manual_seed(0)
    start = PatchAttack(4, steps=0).fooling(net, images)
    torch.manual_seed(0)
    end = PatchAttack(4, steps=40, step_size=0.05).fooling(net, images)
    assert end.fooled.sum() > start.fooled.sum()
    assert end.rate == pytest.approx(float(end.fooled.float().mean())) and end.map.shape == (4, 4)
    assert torch.equal(end.images[start.fooled], start.images[start.fooled])


def test_the_attack_raises_the_loss_of_the_clean_prediction():
    net, images = vit(), torch.rand(3, 3, 16, 16)
    predicted = net(images).argmax(1).repeat_interleave(16)

    def loss(steps: int) -> float:
        torch.manual_seed(1)
        x = PatchAttack(4, steps=steps, step_size=0.02).fooling(net, images).images.flatten(0, 1)
        return float(nn.functional.cross_entropy(net(x), predicted).detach())

    assert loss(10) > loss(0)


def test_natural_patches_come_from_the_corrupted_image():
    images = torch.rand(1, 3, 16, 16)
    result = PatchCorruption(lambda x: 1 - x, patch_size=4).fooling(vit(), images)
    assert torch.equal(result.images[0, 5][:, 4:8, 4:8], (1 - images[0])[:, 4:8, 4:8])


def test_temperature_one_is_the_network_and_infinity_is_uniform():
    net, images = vit(), torch.rand(2, 3, 16, 16)
    before, scales = net(images), [b.attn.scale for b in net.blocks]
    with AttentionTemperature(1.0).apply(net):
        assert torch.equal(net(images), before)
    with AttentionTemperature(1e9).apply(net):
        maps = attention_maps(net, images)
        assert torch.allclose(maps, torch.full_like(maps, 1 / 17), atol=1e-5)
        assert not torch.allclose(net(images), before)
    assert torch.equal(net(images), before) and [b.attn.scale for b in net.blocks] == scales


def test_smoothing_lowers_every_largest_weight():
    net, images = vit(), torch.rand(2, 3, 16, 16)
    sharp = attention_maps(net, images)[0].max(-1).values
    with AttentionTemperature(2.0).apply(net):
        smooth = attention_maps(net, images)[0].max(-1).values
    assert (smooth < sharp).all()


def test_models_without_attention_and_bad_temperatures_are_named():
    with pytest.raises(BadInput, match="no self-attention"), AttentionTemperature().apply(nn.Linear(2, 2)):
        pass
    with pytest.raises(BadInput, match="above 0"):
        AttentionTemperature(0)


def test_rollout_of_uniform_attention_is_uniform_and_of_one_token_is_that_token():
    uniform = torch.full((3, 1, 2, 5, 5), 0.2)
    assert torch.allclose(rollout(uniform, discard=0), torch.ones(1, 4))
    one = torch.zeros(1, 1, 1, 5, 5)
    one[..., 3] = 1
    assert torch.equal(rollout(one, discard=0), torch.tensor([[0.0, 0, 1, 0]]))


def test_attention_maps_are_what_forward_uses():
    net, images = vit(), torch.rand(2, 3, 16, 16)
    maps = attention_maps(net, images)
    assert maps.shape == (3, 2, 4, 17, 17) and torch.allclose(maps.sum(-1), torch.ones(3, 2, 4, 17))
    attn = net.blocks[0].attn
    x = torch.randn(2, 17, 32)
    _, _, v = attn.heads(x)
    assert torch.allclose(attn.proj((attn.attention_map(x) @ v).transpose(1, 2).flatten(2)), attn(x), atol=1e-5)


def test_attention_shift_of_nothing_is_one():
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(attention_shift(vit(), images, images, 3), torch.ones(2))
