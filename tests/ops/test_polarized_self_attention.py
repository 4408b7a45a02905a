"""Polarized self-attention: the official classes' numbers, the two softmaxes, and where it goes in a network."""

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.backbones.resnet import BasicBlock, Bottleneck, ResNet
from opsin.catalog import all_cards
from opsin.errors import BadInput
from opsin.measure.cost import count_macs
from opsin.ops.attention.polarized_self_attention import PolarizedSelfAttention, insert_psa

FORMS = [(layout, softmax) for layout in ("parallel", "sequential") for softmax in ("paper", "official")]
# DeLightCMU/PSA: channels 0, 3 and 6 of PSA_p(8, 8) and PSA_s(8, 8) on a 2x3 map, all filled by `wave`.
OFFICIAL = {
    "psa_p": [
        0.0, 0.206446, 0.402472, 0.570243, 0.687746, 0.735433, -0.912439, -0.655764, -0.336702, 0.020517, 0.383236,
        0.711198, -1.184167, -1.210619, -1.132113, -0.94992, -0.674236, -0.330605,
    ],
    "psa_s": [
        0.0, 0.067922, 0.130278, 0.181003, 0.215181, 0.229565, -0.248302, -0.178041, -0.090685, 0.005465, 0.101175,
        0.187259, -0.132168, -0.134833, -0.125115, -0.103856, -0.07307, -0.035734,
    ],
}  # fmt: skip


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


@torch.no_grad()
@pytest.mark.parametrize("name", OFFICIAL)
def test_numbers_of_the_official_classes(name):
    op = opsin.create(name, dim=8)
    for parameter in op.parameters():
        parameter.copy_(wave(*parameter.shape))
    x = wave(1, 8, 2, 3, step=0.3)
    assert torch.allclose(op(x)[0, ::3].flatten(), torch.tensor(OFFICIAL[name]), atol=2e-6)
    paper = PolarizedSelfAttention(8, op.layout, "paper")
    paper.load_state_dict(op.state_dict())
    assert not torch.allclose(paper(x), op(x), atol=1e-2), "the two softmaxes are two functions"


@pytest.mark.parametrize(("layout", "softmax"), FORMS)
def test_projections_after_collapsing_equal_those_before(layout, softmax):
    op, x = PolarizedSelfAttention(16, layout, softmax).double(), torch.randn(2, 16, 5, 7, dtype=torch.float64)
    weight, variables = torch.randn_like(x), [x.requires_grad_(), *op.parameters()]
    fast, plain = op(x), op.reference(x)
    assert torch.allclose(fast, plain, atol=1e-12)
    gradients = zip(*(torch.autograd.grad((y * weight).sum(), variables) for y in (fast, plain)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in gradients)


@torch.no_grad()
def test_the_spatial_gain_of_the_official_code_is_nearly_a_half_on_large_maps():
    """The trap: logits that are normalised over pixels sum to a constant, so their mean vanishes as the map grows."""
    x = 3 * torch.randn(2, 16, 64, 64)
    for layout in ("parallel", "sequential"):
        gains = {s: PolarizedSelfAttention(16, layout, s) for s in ("paper", "official")}
        gains["paper"].load_state_dict(gains["official"].state_dict())
        spread = {s: float((op.spatial_gain(x) - 0.5).abs().mean()) for s, op in gains.items()}
        assert spread["official"] < 1e-3 and spread["paper"] > 0.1, spread


@torch.no_grad()
@pytest.mark.parametrize(("layout", "softmax"), FORMS)
def test_gains_are_between_zero_and_one_and_multiply(layout, softmax):
    op, x = PolarizedSelfAttention(16, layout, softmax), torch.randn(2, 16, 6, 5)
    channels, places = op.channel_gain(x), op.spatial_gain(x)
    assert channels.shape == (2, 16, 1, 1) and places.shape == (2, 1, 6, 5)
    assert all(float(g.min()) > 0 and float(g.max()) < 1 for g in (channels, places))
    expected = channels * x + places * x
    if layout == "sequential":
        expected = channels * x * op.spatial_gain(channels * x)
    assert torch.allclose(op(x), expected, atol=1e-6)


@torch.no_grad()
def test_what_a_spatial_gain_sees():
    """Permuting pixels permutes the gain: the branch has no positions, and every pixel keeps a gain of its own."""
    op, x = PolarizedSelfAttention(16), torch.randn(1, 16, 4, 6)
    order = torch.randperm(24)
    mixed = op(x.flatten(2)[:, :, order].unflatten(2, (4, 6)))
    assert torch.allclose(mixed.flatten(2), op(x).flatten(2)[:, :, order], atol=1e-5)


def test_cost_is_linear_in_the_map_and_less_than_the_definition():
    with torch.device("meta"):
        op = PolarizedSelfAttention(64)
        costs = [count_macs(op, torch.empty(1, 64, side, side)) for side in (8, 16, 32)]
    assert costs[2] - costs[1] == 4 * (costs[1] - costs[0])
    assert costs[2] == 3 * 64 * 32**2 + 2 * 64**2


@pytest.mark.parametrize(("layout", "softmax"), FORMS)
def test_the_card_has_the_cost_of_every_form(layout, softmax):
    facts = all_cards()["polarized_self_attention"].facts
    name = "macs" if layout == "parallel" else "macs_sequential" + "_official" * (softmax == "official")
    for c, h, w in ((64, 32, 32), (32, 5, 7)):
        with torch.device("meta"):
            op, x = PolarizedSelfAttention(c, layout, softmax), torch.empty(1, c, h, w)
            definition = nn.Module()
            definition.forward = op.reference
            macs, plain = count_macs(op, x), count_macs(definition, x)
        assert macs == eval(facts[name], {"N": h * w, "C": c}), (layout, softmax)
        assert macs < 3 / 2 * h * w * c**2 < plain, "the definition projects every pixel three times to C / 2 channels"


def test_the_four_projections_start_as_in_the_official_code():
    op = PolarizedSelfAttention(512)
    for conv in (op.conv_q_right, op.conv_v_right, op.conv_q_left, op.conv_v_left):
        assert float(conv.weight.detach().std()) == pytest.approx((2 / 512) ** 0.5, rel=0.1)
    assert float(op.conv_up.weight.detach().std()) < 0.6 * (2 / 256) ** 0.5, "the last one keeps PyTorch's start"


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_inserted_after_the_first_relu_of_every_block(block):
    net = ResNet(block, (1, 2), (8, 16), stem="cifar", num_classes=3)
    names = set(net.state_dict())
    seen: list[tuple[str, ...]] = []
    assert insert_psa(net, "sequential", "official") is net
    assert names < set(net.state_dict())
    assert net.layer2[1].relu1.psa.layout == "sequential" and net.layer2[1].relu1.psa.conv_v_left.in_channels == 16
    first = net.layer1[0]
    for name in ("bn1", "conv2"):
        first.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: seen.append((name, x[0], y)))
    x = torch.randn(2, 3, 9, 9)
    net.eval()(x).sum().backward()
    (_, _, normed), (_, into, _) = seen
    assert torch.allclose(first.relu1.psa(normed.relu()), into)
    assert net.layer1[0].relu1.psa.conv_q_left.weight.grad.any()


@pytest.mark.parametrize("wrong", [dict(dim=7), dict(dim=12, layout="sequential"), dict(dim=8, layout="both")])
def test_widths_and_names_that_do_not_fit(wrong):
    with pytest.raises(BadInput, match=r"take another width|unknown"):
        PolarizedSelfAttention(**wrong)


def test_a_network_without_blocks():
    with pytest.raises(BadInput, match="no block"):
        insert_psa(nn.Sequential(nn.Conv2d(3, 8, 3)))
