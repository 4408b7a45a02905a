"""TVConv: the official layer's numbers, the depthwise convolution inside it, and what is kept for inference."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.deploy import fuse
from opsin.errors import BadInput
from opsin.measure.cost import count_macs
from opsin.ops.conv.tvconv import PositionConv, TVConv, remap, translation_variant_conv, unfolded_sum

# JierunChen/TVConv: TVConv(2, k=3, stride=2, 3 affinity maps, 4 inner channels, 1 inner layer, bias, h=2, w=3), with
# every parameter and the input filled by `wave`.
OFFICIAL = [
    -10.065906, -29.259577, -18.168907, 4.022267, 4.404088, -1.569202,
    -5.119840, -18.170948, -7.103474, 4.156950, 3.308226, -1.297188,
]  # fmt: skip


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def fresh(dim: int = 4, size: tuple[int, int] = (9, 7), **options: object) -> TVConv:
    """A layer whose positions differ, as after some training."""
    op = TVConv(dim, size, **options)
    with torch.no_grad():
        for parameter in op.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return op


def test_numbers_of_the_official_layer():
    op = TVConv(2, (2, 3), stride=2, affinity_channels=3, hidden=4, inner_layers=1, bias=True)
    with torch.no_grad():
        for parameter in op.parameters():
            parameter.copy_(wave(*parameter.shape))
    x = wave(1, 2, 4, 6, step=0.3)
    assert torch.allclose(op(x).flatten(), torch.tensor(OFFICIAL), rtol=1e-5)
    assert torch.allclose(op.eval()(x).flatten(), torch.tensor(OFFICIAL), rtol=1e-5)


def test_official_checkpoints_load_without_their_settings():
    op = fresh()
    state = {**op.state_dict(), "TVConv_k": torch.tensor(3), "h": torch.tensor(9), "stride": torch.tensor(1)}
    assert remap(state).keys() == op.state_dict().keys()
    assert {"posi_map", "weight_layers.0.0.weight", "weight_layers.0.1.bias", "weight_layers.2.weight"} <= set(state)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(3, 1, (8, 11)), (3, 2, (8, 11)), (5, 1, (7, 6)), (5, 3, (7, 9))]
)
def test_equal_filters_everywhere_are_a_depthwise_convolution(kernel, stride, size):
    x, taps = torch.randn(2, 4, *size), torch.randn(4, kernel**2)
    expected = F.conv2d(x, taps.view(4, 1, kernel, kernel), padding=kernel // 2, stride=stride, groups=4)
    weight = taps[:, :, None, None].expand(-1, -1, *expected.shape[2:])
    assert torch.allclose(translation_variant_conv(x, weight, stride=stride), expected, atol=1e-5)
    assert torch.allclose(unfolded_sum(x, weight, stride), expected, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 3)])
def test_gradients(kernel, stride):
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    size = [(side - 1) // stride + 1 for side in x.shape[2:]]
    weight = torch.randn(2, kernel**2, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: translation_variant_conv(a, b, stride=stride), (x, weight))


def test_channels_in_parts_and_channels_last(monkeypatch):
    x, weight = torch.randn(2, 10, 6, 6), torch.randn(10, 9, 6, 6)
    expected = unfolded_sum(x, weight, 1)
    monkeypatch.setattr("opsin.ops.conv.tvconv.CACHED_BYTES", 900)  # three channels at a time
    assert torch.allclose(translation_variant_conv(x, weight), expected, atol=1e-5)
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(translation_variant_conv(x, weight), expected, atol=1e-5)


def test_backward_keeps_input_and_filters_only():
    x, weight = torch.randn(2, 4, 9, 7, requires_grad=True), torch.randn(4, 9, 9, 7, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        translation_variant_conv(x, weight)
    assert sorted(kept) == sorted([x.numel(), weight.numel()])


def test_shifting_the_image_does_not_shift_the_output():
    x = torch.randn(1, 4, 9, 7)
    inner = (..., slice(2, -2), slice(2, -2))
    for op, moves in ((fresh(), False), (nn.Conv2d(4, 4, 3, padding=1, groups=4), True)):
        shifted, y = op(x.roll(1, 3)), op(x).roll(1, 3)
        assert torch.allclose(shifted[inner], y[inner], atol=1e-5) == moves


def test_the_generator_is_small_by_default():
    op = TVConv(8, (5, 6))
    assert op.posi_map.shape == (1, 4, 5, 6) and (op.posi_map == 1).all() and op.bias_layers is None
    shapes = [tuple(p.shape) for p in op.weight_layers.parameters() if p.shape[-1] == 3]
    assert shapes == [(16, 4, 3, 3), (16, 16, 3, 3), (72, 16, 3, 3)]


def test_positions_are_alike_at_first_and_differ_after_a_step():
    op = TVConv(4, (14, 14))
    inner = op.generate()[0][..., 4:-4, 4:-4]
    assert torch.allclose(inner, inner[..., :1, :1].expand_as(inner), atol=1e-5)
    optimiser = torch.optim.SGD(op.parameters(), 0.1)
    op(torch.randn(2, 4, 14, 14)).square().sum().backward()
    optimiser.step()
    assert op.generate()[0][..., 4:-4, 4:-4].flatten(2).std(-1).min() > 1e-3


def calls_of(op: TVConv) -> list[int]:
    """Grows by one whenever the generator runs."""
    calls: list[int] = []
    op.weight_layers.register_forward_hook(lambda *_: calls.append(1))
    return calls


@torch.no_grad()
def test_filters_are_generated_once_in_eval():
    op, x = fresh(bias=True), torch.randn(2, 4, 9, 7)
    expected = op(x)
    calls = calls_of(op.eval())
    assert (op(x) - expected).abs().max() < 1e-6 and op(x) is not None
    assert not calls
    assert not any("cached" in name for name in op.state_dict())
    op.train()
    assert op.cached_weight is None and torch.equal(op(x), expected) and calls


def test_kept_filters_follow_the_parameters():
    op, x = fresh().eval(), torch.randn(1, 4, 9, 7)

    def current() -> bool:
        with torch.no_grad():
            return bool(torch.allclose(op(x), op.reference(x), atol=1e-6))

    with torch.no_grad():
        op.posi_map.mul_(torch.rand_like(op.posi_map))
    assert current()
    op.load_state_dict(fresh().state_dict())
    assert op.cached_weight is None and current()
    op.weight_layers[2].weight = nn.Parameter(torch.randn_like(op.weight_layers[2].weight))
    assert current()
    weight = op.weight_layers[2].weight
    for scale in (0.5, 0.25):  # as a search for bit widths does; memory of the first may serve the second
        original = weight.data
        weight.data = original * scale
        assert current()
        weight.data = original
    assert current()
    with torch.inference_mode():
        op.eval()
    with torch.no_grad():
        op.posi_map.data.mul_(torch.rand_like(op.posi_map))
        op.cache()
    assert current()
    x.requires_grad_()
    op(x).sum().backward()
    assert op.posi_map.grad is not None, "in eval mode gradients still reach the generator"


@torch.no_grad()
def test_fusing_leaves_the_filters_alone():
    op, x = fresh(bias=True, size=(5, 4), stride=2), torch.randn(2, 4, 9, 7)
    fused = op.fuse()
    assert not list(fused.parameters()) and set(fused.state_dict()) == {"weight", "bias"}
    assert isinstance(fused, PositionConv) and (fused(x) - op(x)).abs().max() < 1e-6
    assert torch.allclose(fused.reference(x), op(x), atol=1e-5)
    empty = fresh(bias=True, size=(5, 4), stride=2).fuse()
    empty.load_state_dict(copy.deepcopy(fused.state_dict()))
    assert torch.equal(empty(x), fused(x))


@torch.no_grad()
def test_fusing_a_whole_face_network():
    net = opsin.create("mobilenet_v2_x0_1_tvconv").eval()
    x = torch.randn(2, 3, 96, 96)
    fused = fuse(net)
    assert not any(isinstance(m, TVConv) for m in fused.modules())
    assert torch.allclose(fused(x), net(x), atol=1e-4)
    assert sum(p.numel() for p in fused.parameters()) < 0.4e6 < 16e6 < sum(p.numel() for p in net.parameters())


def test_inference_multiplies_as_often_as_a_depthwise_convolution():
    with torch.device("meta"):
        x = torch.empty(2, 4, 9, 7)
        ours = count_macs(TVConv(4, (9, 7)).eval(), x)
        assert ours == count_macs(nn.Conv2d(4, 4, 3, padding=1, groups=4), x) == 2 * 4 * 9 * 63
    built = TVConv(4, (9, 7))
    assert opsin.measure(built, (9, 7), channels=4, modes=()).macs == 4 * 9 * 63 and not built.posi_map.is_meta


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match=r"output map of 9x7.*input of 8x7.*input_size=\(8, 7\)"):
        TVConv(4, (9, 7))(torch.randn(1, 4, 8, 7))
    with pytest.raises(BadInput, match="kernel_size=4 is even"):
        TVConv(4, (9, 7), kernel_size=4)


@pytest.mark.parametrize(("stride", "side"), [(3, 9), (3, 10), (4, 8), (4, 12), (5, 7)])
def test_large_strides_train(stride, side):
    x = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    out = (side - 1) // stride + 1
    weight = torch.randn(3, 9, out, out, dtype=torch.float64, requires_grad=True)
    fast, plain = translation_variant_conv(x, weight, stride=stride), unfolded_sum(x, weight, stride)
    assert torch.allclose(fast, plain)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (x, weight)) for y in (fast, plain))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))


def test_filters_kept_under_autocast_are_those_of_float32():
    layer, x = TVConv(4, (6, 6)).eval(), torch.randn(1, 4, 6, 6)
    layer.uncache()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        assert torch.equal(layer(x), TVConv.forward(copy.deepcopy(layer).train(), x))
