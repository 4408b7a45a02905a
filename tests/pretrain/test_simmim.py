"""SimMIM: what is hidden, what is compared, and that the head is one linear layer per token."""

import math

import pytest
import torch

import opsin
from opsin.errors import BadInput
from opsin.pretrain.finetune import layer_decay_groups
from opsin.pretrain.masking import cell_mask, mean_distance_to_visible, spread
from opsin.pretrain.simmim import SimMIM

TINY = "vit_tiny_patch16_224(image_size=32, patch_size=4, dim=32, depth=2, num_heads=2, num_classes=0)"


@pytest.mark.parametrize(("side", "cell", "ratio"), [(192, 32, 0.6), (32, 8, 0.6), (64, 16, 0.33)])
def test_exactly_the_share_of_cells_is_hidden_in_aligned_blocks(side, cell, ratio):
    mask = cell_mask(16, side, side, cell, ratio)
    assert (mask.flatten(1).sum(1) == math.ceil(ratio * (side // cell) ** 2)).all()
    pixels = spread(mask, side, side)
    blocks = pixels.unfold(1, cell, cell).unfold(2, cell, cell).flatten(3)
    assert (blocks.all(3) | ~blocks.any(3)).all()
    assert len({tuple(m.flatten().tolist()) for m in mask}) > 1, "every image has its own mask"


def test_the_paper_hides_22_of_36_cells_at_192():
    assert cell_mask(1, 192, 192, 32, 0.6).sum() == 22


def test_average_distance_grows_with_the_cell():
    torch.manual_seed(0)
    distances = [mean_distance_to_visible(spread(cell_mask(64, 32, 32, c, 0.6), 32, 32)) for c in (4, 8, 16)]
    assert distances[0] < distances[1] < distances[2]


def test_masks_that_do_not_tile_are_named():
    with pytest.raises(BadInput, match="do not tile"):
        cell_mask(1, 30, 30, 8, 0.5)


def test_visible_pixels_get_no_gradient_and_hidden_ones_do(monkeypatch):
    net = SimMIM(TINY, mask_patch=8)
    x = torch.randn(2, 3, 32, 32)
    mask = cell_mask(2, 32, 32, 8, 0.6)
    monkeypatch.setattr("opsin.pretrain.simmim.cell_mask", lambda *a: mask)
    imagined = torch.randn(2, 3, 32, 32, requires_grad=True)
    monkeypatch.setattr(net, "reconstruct", lambda images, m: imagined)
    loss = net(x)["loss"]
    loss.backward()
    hidden = spread(mask, 32, 32)[:, None].expand_as(x)
    assert imagined.grad[~hidden].abs().max() == 0 and imagined.grad[hidden].abs().min() > 0
    assert torch.allclose(loss, (imagined - x).abs()[hidden].mean(), atol=1e-5)


def test_hidden_content_cannot_be_seen_and_visible_content_can():
    net, x = SimMIM(TINY, mask_patch=8).eval(), torch.randn(1, 3, 32, 32)
    mask = cell_mask(1, 32, 32, 8, 0.6)
    hidden = spread(mask, 32, 32)[:, None]
    assert torch.equal(net.reconstruct(x, mask), net.reconstruct(torch.where(hidden, 9.0, x), mask))
    assert not torch.equal(net.reconstruct(x, mask), net.reconstruct(torch.where(hidden, x, 9.0), mask))


def test_the_head_is_one_linear_layer_per_token():
    net = SimMIM(TINY, mask_patch=8)
    z = torch.randn(2, 32, 8, 8)
    conv = net.decoder[0]
    per_token = torch.nn.functional.linear(z.permute(0, 2, 3, 1), conv.weight[:, :, 0, 0], conv.bias)
    pixels = per_token.view(2, 8, 8, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)
    assert torch.allclose(net.decoder(z), pixels, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("simmim_vit_base_p16", 86.5), ("simmim_swin_base_w6_192", 87.8), ("simmim_swin_large_w12_192", 196.5)],
)
def test_published_encoders(name, millions):
    with torch.device("meta"):
        net = opsin.create(name)
    head = 1000 * (net.backbone.num_features + 1)
    size = sum(p.numel() for p in net.backbone.parameters()) + head
    assert size / 1e6 == pytest.approx(millions, rel=0.005)
    assert net.decoder[0].out_channels == 3 * net.backbone.feature_info[-1].stride ** 2


def test_backbones_without_tokens_are_named():
    with pytest.raises(BadInput, match="InceptionNeXt"):
        SimMIM("inception_next_atto")


def test_layer_decay_is_a_power_per_block():
    net = opsin.create(TINY)
    groups = layer_decay_groups(net, lr=1.0, weight_decay=0.05, decay=0.5)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert len(rate) == sum(1 for _ in net.parameters())
    assert rate[id(net.patch_embed.proj.weight)] == 0.5**3
    assert rate[id(net.blocks[0].attn.qkv.weight)] == 0.5**2
    assert rate[id(net.blocks[1].mlp.fc1.weight)] == 0.5
    assert rate[id(net.norm.weight)] == 1.0
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay[id(net.blocks[0].attn.qkv.weight)] == 0.05 and decay[id(net.blocks[0].attn.qkv.bias)] == 0
    assert decay[id(net.pos_embed)] == 0
