"""T2T-ViT: names and numbers of the official network, its linear attention, and its norms."""

import pytest
import torch
from torch import nn

import opsin
from opsin.backbones.t2t_vit import TokenPerformer, sinusoids
from opsin.deploy import fuse
from opsin.errors import BadInput
from opsin.layers.affine import ChannelAffine
from opsin.ops.normact.unified_norm import UnifiedNorm

SMALL = "t2t_vit(dim=24, depth=2, num_heads=3, token_dim=8, image_size=48, num_classes=5)"

# yitu-opensource/T2T-ViT in the same size, weights and image by `wave`: the logits.
OFFICIAL = [2.70682, -0.805756, 0.228611, 3.024626, -0.118087]


def wave(*shape: int, step: float = 0.7, phase: float = 0.0) -> torch.Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + phase).reshape(shape)


@torch.no_grad()
def test_numbers_of_the_official_network():
    net = opsin.create(SMALL).eval()
    for i, (name, tensor) in enumerate(sorted(net.state_dict().items())):
        if name != "pos_embed":
            tensor.copy_((1.0 if tensor.ndim == 1 else 0.0) + 0.3 * wave(*tensor.shape, phase=float(i)))
    logits = net(wave(1, 3, 48, 48, step=0.05))[0]
    assert torch.allclose(logits, torch.tensor(OFFICIAL), rtol=1e-4, atol=1e-4)


def test_names_of_the_official_checkpoints():
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in opsin.create("t2t_vit_14").state_dict().items()}
    expected = {
        "cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "tokens_to_token.attention1.w": (32, 64),
        "tokens_to_token.attention1.kqv.weight": (192, 147), "tokens_to_token.attention2.kqv.bias": (192,),
        "tokens_to_token.attention2.norm1.weight": (576,), "tokens_to_token.attention2.mlp.2.weight": (64, 64),
        "tokens_to_token.project.weight": (384, 576), "blocks.13.attn.qkv.weight": (1152, 384),
        "blocks.0.mlp.fc1.weight": (1152, 384), "norm.bias": (384,), "head.weight": (1000, 384),
    }  # fmt: skip
    assert {name: shapes[name] for name in expected} == expected and "blocks.0.attn.qkv.bias" not in shapes
    assert len(shapes) == 188


def test_positions_alternate_sine_and_cosine():
    table = sinusoids(5, 6)[0]
    assert torch.equal(table[0], torch.tensor([0.0, 1, 0, 1, 0, 1]))
    angle = torch.tensor(3 / 10000 ** (2 / 6))
    assert torch.allclose(table[3, 2:4], torch.stack((angle.sin(), angle.cos())))


def test_attention_is_what_its_kernel_says():
    layer = TokenPerformer(6, 4, nn.LayerNorm).eval()
    x = torch.randn(2, 7, 6)
    k, q, v = layer.kqv(x).chunk(3, -1)
    weights = layer.phi(q) @ layer.phi(k).transpose(1, 2)
    expected = v + layer.proj(weights @ v / weights.sum(-1, keepdim=True))
    assert torch.allclose(layer.attention(x), expected, atol=1e-5)


def test_the_kernel_approaches_softmax_with_many_features():
    layer = TokenPerformer(6, 4, nn.LayerNorm)
    layer.w = torch.randn(200_000, 4)
    x, y = (0.5 * torch.randn(2, 1, 3, 4)).unbind(0)
    assert torch.allclose(layer.phi(x) @ layer.phi(y).transpose(1, 2), (x @ y.transpose(1, 2)).exp(), rtol=0.05)


@torch.no_grad()
def test_the_head_reads_the_class_token_of_the_normed_tokens():
    net, x = opsin.create(SMALL), torch.randn(2, 3, 48, 48)
    tokens = net.eval().forward_features(x)
    assert torch.allclose(net(x), net.head(net.norm(tokens)[:, 0]), atol=1e-6)
    net = opsin.create(SMALL, norm="unified").train()
    tokens = torch.randn(2, 10, 24)
    net.forward_head(tokens)
    assert torch.allclose(net.norm.buffer_x2[1], tokens.square().mean((0, 1)))


@torch.no_grad()
def test_with_unified_norms_all_blocks_fold():
    net, x = opsin.create(SMALL, norm="unified"), torch.randn(2, 3, 48, 48)
    assert sum(isinstance(m, UnifiedNorm) for m in net.modules()) == 9
    for _ in range(3):
        net.train()(torch.randn(4, 3, 48, 48))
    fused = fuse(net)
    assert torch.allclose(fused(x), net.eval()(x), atol=1e-5)
    assert [name for name, m in fused.named_modules() if isinstance(m, ChannelAffine)] == ["norm"]
    assert sum(isinstance(m, UnifiedNorm) for m in opsin.create("t2t_vit_14_un").modules()) == 2 * 14 + 5


def test_another_norm_is_a_sentence():
    with pytest.raises(BadInput, match=r"norm='batch' is none of layer, unified"):
        opsin.create("t2t_vit_14", norm="batch")
