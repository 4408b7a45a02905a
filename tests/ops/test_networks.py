"""The networks that come with the operators: NAT, MobileNetV2, ShuffleNetV2, and the face heads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import opsin
from opsin.backbones.mobilenetv2 import round_channels
from opsin.backbones.shufflenetv2 import shuffle
from opsin.errors import BadInput
from opsin.layers.margin import AMSoftmax, EmbeddingHead
from opsin.ops.attention.neighborhood_attention import NeighborhoodAttention
from opsin.ops.conv.tvconv import TVConv


def test_nat_has_the_names_of_the_official_checkpoints():
    with torch.device("meta"):
        plain, scaled = (opsin.create(name).state_dict() for name in ("nat_mini", "nat_base"))
    shapes = {
        "patch_embed.proj.1.weight": (64, 32, 3, 3), "patch_embed.norm.weight": (64,),
        "levels.0.blocks.2.attn.qkv.weight": (192, 64), "levels.1.blocks.3.attn.rpb": (4, 13, 13),
        "levels.2.downsample.reduction.weight": (512, 256, 3, 3), "levels.3.blocks.4.mlp.fc1.weight": (1536, 512),
        "norm.bias": (512,), "head.weight": (1000, 512),
    }  # fmt: skip
    assert {name: tuple(plain[name].shape) for name in shapes} == shapes
    assert "levels.0.blocks.0.gamma1" not in plain and "levels.3.blocks.0.gamma2" in scaled


def test_dinat_dilates_every_second_layer_as_far_as_the_map_goes():
    with torch.device("meta"):
        net = opsin.create("dinat_tiny")
    found = [[block.attn.dilation for block in level.blocks] for level in net.levels]
    assert found[0] == [(1, 1), (8, 8), (1, 1)] and found[1] == [(1, 1), (4, 4)] * 2
    assert found[2] == [(1, 1), (2, 2)] * 9 and found[3] == [(1, 1)] * 5
    for level, side in zip(net.levels, (56, 28, 14, 7)):
        for module in level.modules():
            if isinstance(module, NeighborhoodAttention):
                assert module.window((side, side)) == (module.kernel_size, module.dilation)


def test_round_channels():
    assert [round_channels(32 * w) for w in (0.1, 0.2, 0.3, 0.5, 1.0)] == [8, 8, 16, 16, 32]
    assert round_channels(12) == 16 and round_channels(24 * 0.5) == 16


def test_face_networks_put_tvconv_where_the_depthwise_filters_are():
    with torch.device("meta"):
        for family, width in (("mobilenet_v2", "x0_1"), ("shufflenet_v2", "x0_5")):
            plain, ours = (opsin.create(f"{family}_{width}_{kind}") for kind in ("face", "tvconv"))
            filters = [name for name, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
            assert filters == [name for name, m in ours.named_modules() if isinstance(m, TVConv)]
            for name in filters:
                a, b = plain.get_submodule(name), ours.get_submodule(name)
                assert (a.in_channels, a.stride[0]) == (b.dim, b.stride)
                assert b.weight_layers[0][0].out_channels == 64 and len(b.weight_layers) == 5


def test_a_face_network_wants_its_size():
    net = opsin.create("shufflenet_v2_x0_5_tvconv", image_size=64).eval()
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 512)
    with pytest.raises(BadInput, match="input_size"):
        net(torch.randn(1, 3, 96, 96))
    with pytest.raises(BadInput, match="cannot be built"):
        opsin.create("mobilenetv2_100", mixer="pooling")


def test_additive_margin_softmax():
    head, x, labels = AMSoftmax(8, 5), torch.randn(3, 8), torch.tensor([0, 4, 2])
    cosine = F.cosine_similarity(x[:, None], head.weight[None], dim=-1)
    assert torch.allclose(head(x), 32 * cosine, atol=1e-4)
    margins = head(x) - head(x, labels)
    assert torch.allclose(margins, 32 * 0.35 * F.one_hot(labels, 5).float(), atol=1e-4)
    assert torch.allclose(head(7 * x, labels), head(x, labels), atol=1e-4), "the length of a feature does not matter"


def test_embedding_head_normalises_both_ends():
    head = EmbeddingHead(6, 16).train()
    y = head(3 + 5 * torch.randn(32, 6, 4, 4))
    assert y.shape == (32, 16)
    assert y.mean(0).abs().max() < 1e-4 and (y.var(0, unbiased=False) - 1).abs().max() < 0.1


def test_shuffle_interleaves_the_halves():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]
