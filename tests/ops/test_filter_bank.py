"""Fixed filters under learned mixing."""

import pytest
import torch
from torch import nn

import opsin
from opsin.deploy import fuse
from opsin.errors import BadInput
from opsin.layers.filter_design import bank
from opsin.ops.conv.filter_bank import FilterBank


@torch.no_grad()
def test_what_it_computes_and_that_only_the_mixing_is_learned():
    op, x = FilterBank(2, "gabor", 5, 3), torch.randn(1, 2, 9, 8)
    taps = bank("gabor", 5, 3)
    maps = [nn.functional.conv2d(x[:, c : c + 1], taps[b : b + 1, None], padding=2) for c in range(2) for b in range(3)]
    assert torch.allclose(op(x), op.mixing(torch.cat(maps, 1)), atol=1e-5)
    assert [name for name, _ in op.named_parameters()] == ["mixing.weight"] and "bank" in op.state_dict()


@pytest.mark.parametrize(("dim", "kernel", "filters", "dense"), [(8, 5, 9, True), (64, 7, 8, True), (256, 7, 8, False)])
@torch.no_grad()
def test_both_ways_agree(dim, kernel, filters, dense):
    op, x = FilterBank(dim, "gaussian_derivatives", kernel, filters), torch.randn(1, dim, 9, 8)
    assert op.dense == dense and torch.allclose(op(x), op.reference(x), atol=1e-4)
    assert torch.allclose(op.fuse()(x), op(x), atol=1e-4)


@torch.no_grad()
def test_all_of_the_dct_is_any_convolution():
    op, conv, x = FilterBank(4), nn.Conv2d(4, 4, 3, padding=1, bias=False), torch.randn(2, 4, 7, 9)
    op.mixing.weight.copy_(torch.einsum("mcij,bij->mcb", conv.weight, op.bank).flatten(1)[..., None, None])
    assert torch.allclose(op(x), conv(x), atol=1e-5)


@torch.no_grad()
def test_fusing_inside_a_network():
    net, x = opsin.create("metanet_n", mixer="filter_bank", num_classes=3).eval(), torch.randn(2, 3, 16, 16)
    fused = fuse(net)
    assert torch.allclose(fused(x), net(x), atol=1e-4) and not any(isinstance(m, FilterBank) for m in fused.modules())


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="kernel_size=4 is even"):
        FilterBank(4, kernel_size=4)
    with pytest.raises(BadInput, match="fewer than 9"):
        FilterBank(4, "edges")
