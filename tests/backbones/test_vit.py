"""The vision transformer's attention, positions, and the seams that other systems use."""

import pytest
import torch

import opsin
from opsin.backbones.vit import remap
from opsin.layers import Attention
from opsin.layers.relative_position import RelativePositionBias

SMALL = dict(dim=24, depth=4, num_heads=3, patch_size=4, image_size=32, num_classes=5)


def small(**options):
    model = opsin.create("vit", **SMALL | options).eval()
    for name, parameter in model.named_parameters():
        wide = "position_bias" in name or name == "pos_embed" or parameter.ndim == 1
        torch.nn.init.normal_(parameter, std=1.0 if wide else 0.2)
    return model


def test_the_map_is_what_forward_applies():
    attention = Attention(24, 3)
    x, bias = torch.randn(2, 9, 24), torch.randn(1, 3, 9, 9)
    weights = attention.attention_map(x, bias)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 9))
    mixed = (weights @ attention.heads(x)[2]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, bias), attention.proj(mixed))
    assert not torch.allclose(attention(x, bias), attention(x))


def test_scale_is_a_temperature():
    attention = Attention(24, 3)
    x = torch.randn(2, 9, 24)
    before, weights = attention(x), attention.attention_map(x)
    assert attention.scale == pytest.approx(8**-0.5)
    attention.scale /= 4
    torch.testing.assert_close(attention.attention_map(x), weights.pow(0.25) / weights.pow(0.25).sum(-1, keepdim=True))
    assert not torch.allclose(attention(x), before)
    attention.scale = 0.0
    torch.testing.assert_close(attention.attention_map(x), torch.full((2, 3, 9, 9), 1 / 9))


def test_maps_come_from_the_quarters_of_the_depth():
    model = small(depth=12)
    assert model.taps == [3, 6, 9, 12] and len(model.feature_info) == 4
    x = torch.randn(1, 3, 32, 32)
    seen = []
    model.blocks[5].register_forward_hook(lambda _m, _i, out: seen.append(out))
    maps = model.features(x)
    torch.testing.assert_close(maps[1], seen[0][:, 1:].transpose(1, 2).view(1, 24, 8, 8))
    assert small(depth=2).taps == [1, 2]


def test_last_map_is_normalised_and_feeds_the_average_head():
    token, average = small(), small(global_pool="avg")
    x = torch.randn(2, 3, 32, 32)
    assert {"norm.weight"} == {n for n in token.state_dict() if n.endswith("norm.weight")}
    assert "fc_norm.weight" in average.state_dict()
    tokens = token.forward_features(x)
    torch.testing.assert_close(token.features(x)[-1].flatten(2).transpose(1, 2), token.norm(tokens)[:, 1:])
    torch.testing.assert_close(token(x), token.head(token.norm(tokens)[:, 0]))
    tokens = average.forward_features(x)
    torch.testing.assert_close(average(x), average.head(average.fc_norm(tokens[:, 1:].mean(1))))


def test_embed_and_encode_are_the_features():
    model = small()
    x = torch.randn(2, 3, 32, 32)
    tokens = model.embed(x)
    assert tokens.shape == (2, 8, 8, 24)
    for a, b in zip(model.encode(tokens), model.features(x), strict=True):
        assert torch.equal(a, b)


def test_positions_matter_and_are_interpolated():
    model = small()
    x = torch.randn(1, 3, 32, 32)
    rolled = x.roll(8, 3)
    assert not torch.allclose(model(x), model(rolled), atol=1e-5)
    with torch.no_grad():
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:2]  # the same everywhere: place no longer counts
    torch.testing.assert_close(model(x), model(rolled), rtol=1e-4, atol=1e-5)
    assert model(torch.randn(1, 3, 40, 28)).isfinite().all()


@pytest.mark.parametrize("grid", [(2, 3), (4, 4)])
def test_bias_of_class_and_patches(grid):
    bias = RelativePositionBias(grid, 2)
    torch.nn.init.normal_(bias.relative_position_bias_table)
    table, (h, w) = bias.relative_position_bias_table, grid
    out = bias(grid)[0]
    assert out.shape == (2, 1 + h * w, 1 + h * w)
    for i in range(h * w):
        for j in range(h * w):
            row = (i // w - j // w + h - 1) * (2 * w - 1) + i % w - j % w + w - 1
            assert torch.equal(out[:, 1 + i, 1 + j], table[row])
    assert torch.equal(out[:, 0, 1:], table[-3][:, None].expand(2, h * w)), "class to patch"
    assert torch.equal(out[:, 1:, 0], table[-2][:, None].expand(2, h * w)), "patch to class"
    assert torch.equal(out[:, 0, 0], table[-1])
    assert bias((5, 7)).shape == (1, 2, 36, 36)


def test_splitting_the_shared_bias_changes_nothing_but_who_learns():
    model = small(rel_pos_bias="shared", layer_scale=0.1)
    assert model.pos_embed is None
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    model.split_rel_pos_bias()
    torch.testing.assert_close(model(x), before)
    tables = [n for n in model.state_dict() if "position_bias_table" in n]
    assert tables == [f"blocks.{i}.rel_pos_bias.relative_position_bias_table" for i in range(4)]
    fresh = small(rel_pos_bias="per_layer", layer_scale=0.1)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), before)


def test_names_of_beit_like_checkpoints():
    model = small(rel_pos_bias="per_layer", layer_scale=0.1, global_pool="avg")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[24:48] = 0  # keys have no bias there
    theirs = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("qkv.bias"):
            theirs[name.replace("qkv.bias", "q_bias")], theirs[name.replace("qkv.bias", "v_bias")] = (
                tensor[:24],
                tensor[48:],
            )
        else:
            name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
            theirs[name.replace("rel_pos_bias.relative", "attn.relative")] = tensor
    theirs["blocks.0.attn.relative_position_index"] = torch.zeros(1)
    theirs["mask_token"] = torch.zeros(1)
    again, state = remap(theirs), model.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[n], state[n]) for n in state)
