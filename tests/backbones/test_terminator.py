"""Terminator: widths of the early code, its branches, zero-mean features, and the slow loss."""

import copy

import pytest
import torch

import opsin
from opsin.backbones.terminator import GroupStandardisation, HyperChannel, HyperInteraction, SFNEBlock, Terminator
from opsin.errors import BadInput


def small(**options: object) -> Terminator:
    return Terminator((4, 2, 2), (0, 1, 2), 5, 3, 8, slow_layers=2, **options)


def test_widths_of_the_early_code():
    with torch.device("meta"):
        net = opsin.create("terminator_cifar", num_classes=100)
    assert [info.channels for info in net.feature_info] == [12, 36, 72, 144, 288]
    inputs = [block.bottleneck.in_channels // dim for block, dim in zip(net.blocks, (3, 12, 36, 72, 144), strict=True)]
    assert inputs == [10, 10, 11, 11, 12]
    assert [len(block.slow_global.linears) for block in net.blocks] == [3, 2, 2, 2, 2]
    slow = sum(p.numel() for name, p in net.named_parameters() if "slow" in name)
    assert slow < 0.25 * sum(p.numel() for p in net.parameters())


def test_groups_are_standardised_in_turn_over_the_batch_and_per_image():
    norm, x = GroupStandardisation(24), 3 * torch.randn(6, 24, 5, 5) + torch.arange(6.0)[:, None, None, None]
    groups = norm(x).unflatten(1, (12, 2))
    batch, image = groups[:, ::2], groups[:, 1::2]
    assert image.mean((3, 4)).abs().max() < 1e-5 < 0.1 < batch.mean((3, 4)).abs().max()
    assert batch.mean((0, 3, 4)).abs().max() < 1e-5 and (batch.var((0, 3, 4), correction=0) - 1).abs().max() < 1e-3
    with pytest.raises(BadInput, match="multiples of it"):
        GroupStandardisation(16)


@torch.no_grad()
def test_global_weights_are_a_product_of_matrices_with_the_kernel_times_the_input():
    block, x = SFNEBlock(3, 4, 0, 2, 6, 0.0), torch.randn(2, 3, 6, 6)
    context = block.context(x)
    assert torch.allclose(context, block.slow_global.generate((6, 6)) * x, atol=1e-6)
    rows = x.clone()
    rows[:, :, 2] *= 3
    changed = (block.context(rows) - context).abs().amax((0, 1, 3))
    assert changed[2] > 0 and not changed[[0, 1, 3, 4, 5]].any()


@torch.no_grad()
def test_hyper_interactions():
    channel, interact, y, x = HyperChannel(8), HyperInteraction(), torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    assert torch.allclose(channel(y)[:, :, 0, 0], channel.slow((4,)) * y.mean((2, 3)) ** 2, atol=1e-6)
    places = interact.slow((5, 5)) * y.mean(1, keepdim=True) ** 2
    assert torch.allclose(interact(y, x), x * torch.sigmoid(places * interact.channel(y)), atol=1e-6)


def test_every_block_sees_the_whole_image():
    block, x = SFNEBlock(3, 4, 0, 2, 8, 0.0).eval(), torch.randn(1, 3, 8, 8, requires_grad=True)
    block(x)[0, :, 3, 3].square().sum().backward()
    assert (x.grad.abs().amax((0, 1)) > 0).all()


@torch.no_grad()
def test_earlier_inputs_are_those_of_the_blocks_before():
    net, x = small().eval(), torch.randn(1, 3, 8, 8)
    first = net.blocks[0](x)
    second = net.blocks[1](first, [x])
    assert torch.allclose(net.features(x)[-1], net.blocks[2](second, [first, x]), atol=1e-5)


@torch.no_grad()
def test_the_slow_loss_compares_all_pairs_of_kernels():
    net = small()
    kernels = [block.slow_global((8, 8)) for block in net.blocks]
    assert [len(kernel) for kernel in kernels] == [3, 12, 24]
    tiled = [(kernels[0].repeat(4, 1, 1), kernels[1]), (kernels[0].repeat(8, 1, 1), kernels[2]),
             (kernels[1].repeat(2, 1, 1), kernels[2])]  # fmt: skip
    assert torch.allclose(net.slow_loss(), sum((a - b).square().mean() for a, b in tiled))


def test_the_slow_loss_teaches_global_slow_networks_only():
    net = small()
    net.slow_loss().backward()
    taught = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert taught and all(".slow_global." in name for name in taught)


@torch.no_grad()
def test_another_resolution_and_another_batch():
    net = small()
    net(torch.randn(4, 3, 8, 8))
    net.eval()
    assert net(torch.randn(1, 3, 12, 12)).shape == (1, 5)
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-5), "local kernels do not come from the mean of a batch"
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    with pytest.raises(BadInput, match="8x6 must be cropped to a square"):
        net(torch.randn(1, 3, 8, 6))
