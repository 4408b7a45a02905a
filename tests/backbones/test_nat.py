"""NAT: the equations of its block and of its head, and options that make no network."""

import pytest
import torch

import opsin
from opsin.backbones.nat import NAT, NATBlock
from opsin.errors import BadInput


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


@torch.no_grad()
def test_a_block_weighs_both_branches():
    block = stirred(NATBlock(32, 2, 3, 1, 2.0, 0.0, layer_scale=0.5))
    x = torch.randn(2, 6, 7, 32)
    assert not torch.allclose(block.gamma1, block.gamma2)
    middle = x + block.gamma1 * block.attn.reference(block.norm1(x).movedim(-1, 1)).movedim(1, -1)
    assert torch.allclose(block(x), middle + block.gamma2 * block.mlp(block.norm2(middle)), atol=1e-5)


@torch.no_grad()
def test_the_head_norms_every_position_and_then_pools():
    net = stirred(NAT(dim=32, depths=(1, 1), num_classes=5))
    x = torch.randn(2, 64, 3, 4)
    normed = torch.stack([net.norm(x[:, :, i, j]) for i in range(3) for j in range(4)]).mean(0)
    assert torch.allclose(net.forward_head(x), net.head(normed), atol=1e-5)


def test_heads_divide_every_level():
    with torch.device("meta"):
        found = [[level.blocks[0].attn.num_heads for level in NAT(dim).levels] for dim in (64, 96, 112)]
    assert found == [[2, 4, 8, 16], [3, 6, 12, 24], [4, 7, 14, 28]]


@pytest.mark.parametrize(
    ("options", "words"), [(dict(dim=16), "at least 32"), (dict(dim=32, kernel_size=0), "kernel_size=0")]
)
def test_options_that_make_no_network(options, words):
    with pytest.raises(BadInput, match=words):
        opsin.create("nat", **options)
