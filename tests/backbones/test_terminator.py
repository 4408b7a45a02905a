"""Terminator: widths of the early code, its branches, zero-mean features, and the slow loss."""

import copy

import pytest
import torch
from torch import Tensor

import opsin
from opsin.backbones import terminator
from opsin.backbones.terminator import (
    LOCAL_SIZES,
    GroupStandardisation,
    HyperChannel,
    HyperInteraction,
    SFNEBlock,
    Terminator,
)
from opsin.catalog import card_of
from opsin.errors import BadInput
from opsin.ops.gating.hyperzzw import standardise


def small(**options: object) -> Terminator:
    return Terminator((4, 2, 2), (0, 1, 2), 5, 3, 8, slow_layers=2, **options)


def test_widths_of_the_early_code():
    with torch.device("meta"):
        net = opsin.create("terminator_cifar", num_classes=100)
    assert [info.channels for info in net.feature_info] == [12, 36, 72, 144, 288]
    inputs = [block.bottleneck.in_channels // dim for block, dim in zip(net.blocks, (3, 12, 36, 72, 144), strict=True)]
    assert inputs == [10, 10, 11, 11, 12]
    assert [len(block.slow_global.linears) for block in net.blocks] == [3, 2, 2, 2, 2]


def test_slow_networks_hold_the_share_that_the_card_says():
    """Twice of what the paper reports, about 8 %."""
    with torch.device("meta"):
        nets = [opsin.create("terminator_cifar", num_classes=classes) for classes in (10, 100)]
    shares = []
    for net in nets:
        slow = sum(p.numel() for name, p in net.named_parameters() if "slow" in name)
        shares.append(100 * slow / sum(p.numel() for p in net.parameters()))
    card = card_of("terminator").facts["slow_networks"]
    assert f"measured: {shares[0]:.1f} % of the parameters" in card and f"{shares[1]:.1f} % with 100" in card
    assert shares == pytest.approx([17.22, 16.86], abs=0.01)


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


def seen(blocks: int, side: int = 16) -> Tensor:
    """Where on the image the features at the centre depend on it, after so many blocks."""
    net = Terminator((4, 2)[:blocks], (0, 0)[:blocks], 5, 3, side).eval()
    x = torch.randn(1, 3, side, side, requires_grad=True)
    net.features(x)[-1][0, :, side // 2, side // 2].square().sum().backward()
    return x.grad.abs().amax((0, 1)) > 0


def test_products_see_row_and_column_in_one_block_and_the_whole_image_in_two(monkeypatch):
    """Means, variances and scores of channels see everything alone, so they are held for this."""
    assert seen(1).all()

    def held(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x.detach(), (2, 3), correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5)

    scores = HyperChannel.forward
    monkeypatch.setattr(terminator, "standardise", held)
    monkeypatch.setattr(HyperChannel, "forward", lambda self, x: scores(self, x.detach()))
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[8], expected[:, 8], expected[4:13, 4:13] = True, True, True
    assert torch.equal(seen(1), expected)
    assert seen(2).all()


@torch.no_grad()
def test_the_branches_are_those_of_the_formulas():
    block, x, past = SFNEBlock(3, 4, 1, 2, 6, 0.0).eval(), torch.randn(2, 3, 6, 6), torch.randn(2, 1, 6, 6)
    pairs, joined = [], []
    for branch in block.locals:
        branch.register_forward_pre_hook(lambda module, inputs: pairs.append(inputs))
    block.bottleneck.register_forward_pre_hook(lambda module, inputs: joined.extend(inputs))
    block(x, [past])

    weights = block.slow_global.generate((6, 6)) * x
    fast = standardise(block.gate_context(weights) + block.gate(x))
    mixed, gated = standardise(block.mixer(x)), standardise(x * torch.sigmoid(block.channel(x)))
    y, y_mixed, y_gated = (torch.einsum("ncik,nckj->ncij", weights, features) for features in (fast, mixed, gated))
    for found, expected in zip(pairs, ((x, gated), (gated, x), (mixed, x), (x, mixed)), strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    near = [branch(*pair) for branch, pair in zip(block.locals, list(pairs), strict=True)]
    interaction = block.interact(y, x)
    expected = (y, y_mixed, y_gated, y * torch.sigmoid(y), fast, interaction, *near, past.repeat(1, 3, 1, 1))
    names = ("y", "mixed", "gated", "y sigmoid(y)", "fast", "interaction", *LOCAL_SIZES, "earlier")
    for name, a, b in zip(names, joined[0].split(3, 1), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4), f"the branch {name} is another"
    assert [branch.kernel_size for branch in block.locals] == list(LOCAL_SIZES)


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


@pytest.mark.parametrize(
    ("factors", "earlier", "message"),
    [
        ((4, 2), (1, 1), "block 1 sees 0 to 0 earlier inputs, not 1"),
        ((4, 2, 2), (0, 0, 3), "block 3 sees 0 to 2 earlier inputs, not 3"),
        ((4, 2), (0, -1), "block 2 sees 0 to 1 earlier inputs, not -1"),
        ((4, 2), (0,), "one number each for every block"),
        ((), (), "at least one block"),
    ],
)
def test_blocks_that_cannot_be_are_refused(factors, earlier, message):
    with pytest.raises(BadInput, match=message):
        Terminator(factors, earlier)


def test_one_block_has_no_slow_loss():
    net = Terminator((4,), (0,), 5, 3, 8)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    with pytest.raises(BadInput, match="has one; leave it out"):
        net.slow_loss()
