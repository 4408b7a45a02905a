"""Cross-D convolution: the official layer's numbers, shifts of the kernel, and the way to volumes and back."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.backbones.resnet import BasicBlock, ResNet
from opsin.errors import BadInput
from opsin.ops.conv.cross_d_conv import (
    CrossDConv2d,
    RotatedConv2d,
    convert,
    fractional_shift,
    remap,
    rotation_of,
    shift_of,
    to_3d,
)  # fmt: skip

# convergedmachine/Cross-D-Conv: CrossDConv(2, 4, 3, stride=2, padding=1, groups=2) in eval mode, its parameters, the
# statistics of its norm and two images filled by `wave`; the first 24 numbers of the output.
OFFICIAL = [
    0.632376, 0.849439, 0.882056, -2.180829, -2.119735, -1.277901, 0.545891, 0.779819, 0.866374, -2.052779, -1.964704,
    -1.217774, 0.002808, 0.094477, 0.524709, -1.419376, -1.417603, -1.048287, -0.099438, 0.000672, 0.488396, -1.27151,
    -1.227748, -0.956328,
]  # fmt: skip


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def official_state() -> dict[str, Tensor]:
    """As the official layer writes it."""
    shapes = {
        "weights_3d": (4, 1, 3, 3, 3), "rotation_params.0.weight": (16, 2, 1, 1), "rotation_params.0.bias": (16,),
        "rotation_params.1.weight": (16,), "rotation_params.1.bias": (16,), "rotation_params.3.weight": (4, 16, 1, 1),
        "rotation_params.3.bias": (4,),
    }  # fmt: skip
    state = {name: wave(*shape, step=0.7 + 0.1 * i) for i, (name, shape) in enumerate(shapes.items())}
    return state | {
        "rotation_params.1.running_mean": 0.1 * wave(16), "rotation_params.1.running_var": 1 + 0.5 * wave(16),
        "rotation_params.1.num_batches_tracked": torch.tensor(0),
    }  # fmt: skip


def still(op: CrossDConv2d) -> CrossDConv2d:
    """The layer with theta = 0 for all images."""
    with torch.no_grad():
        op.rotation_params[3].weight.zero_()
        op.rotation_params[3].bias.zero_()
    return op


@torch.no_grad()
def test_numbers_of_the_official_layer():
    op = CrossDConv2d(2, 4, 3, stride=2, groups=2).eval()
    op.load_state_dict(remap(official_state()))
    y = op(wave(2, 2, 4, 5, step=0.3))
    assert y.shape == (2, 4, 2, 3)
    assert torch.allclose(y[0].flatten(), torch.tensor(OFFICIAL), atol=2e-5)


def test_official_heads_of_1x1_kernels_are_dropped():
    state = {f"a.{name}": value for name, value in official_state().items()} | {
        "a.weights_3d": torch.ones(4, 1, 1, 1, 1)
    }
    assert set(remap(state)) == {"a.weights_3d"}


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_whole_shifts_are_rolls_and_fractions_are_what_the_transform_says(size):
    x = torch.randn(size, dtype=torch.float64)
    for steps in (0.0, 1.0, -2.0, 0.5, 1.3):
        shift = torch.tensor([steps], dtype=torch.float64)
        real, imaginary = fractional_shift(size, shift)[0]
        phase = torch.exp(-2j * torch.pi * torch.fft.fftfreq(size, dtype=torch.float64) * steps)
        expected = torch.fft.ifft(torch.fft.fft(x) * phase)
        assert torch.allclose(real @ x, expected.real) and torch.allclose(imaginary @ x, expected.imag)
        if steps == int(steps):
            assert torch.allclose(real @ x, x.roll(int(steps)))
        if size % 2:
            assert imaginary.abs().max() < 1e-12


@torch.no_grad()
def test_the_phase_is_a_shift_by_the_transposed_rotation_of_ones():
    op = CrossDConv2d(2, 3)
    axis, angle = torch.tensor([[0.6, 0.0, 0.8]]), torch.tensor([0.5])
    shift = shift_of(axis, angle)[0]
    assert torch.allclose(shift, torch.tensor([1 + 0.5 * 0.8, 1 - 0.5 * 0.2, 1 - 0.5 * 0.6]))
    matrices = [fractional_shift(3, s[None])[0, 0] for s in shift]
    expected = torch.einsum("oidhw,ad,bh,cw->oiabc", op.weights_3d, *matrices)
    assert torch.allclose(op.moved(axis[0], angle[0]), expected, atol=1e-6)


@torch.no_grad()
def test_without_an_angle_the_kernel_is_already_rolled_by_one_voxel():
    op, x = still(CrossDConv2d(4, 6)), torch.randn(2, 4, 7, 6)
    rolled = op.weights_3d.roll((1, 1, 1), (2, 3, 4))[:, :, 1]
    assert torch.allclose(op(x), F.conv2d(x, rolled, padding=1), atol=1e-5)
    assert not torch.allclose(op(x), F.conv2d(x, op.weights_3d[:, :, 1], padding=1), atol=0.1)
    turned = still(RotatedConv2d(4, 6))
    assert torch.allclose(turned(x), F.conv2d(x, turned.weights_3d[:, :, 1], padding=1), atol=1e-5)


@torch.no_grad()
def test_each_image_has_kernels_of_its_own():
    op, x = CrossDConv2d(4).eval(), torch.randn(3, 4, 6, 6)
    kernels = op.kernels(x)
    assert kernels.shape == (3, 4, 4, 3, 3) and (kernels[0] - kernels[1]).abs().max() > 1e-3
    assert torch.equal(op(x)[1:2], op(x[1:2])) or torch.allclose(op(x)[1:2], op(x[1:2]), atol=1e-6)
    axis, angle = op.pose(1000 * x)
    assert torch.allclose(axis.norm(dim=1), torch.ones(3)) and angle.abs().max() <= math.pi / 4


@pytest.mark.parametrize("layer", [CrossDConv2d, RotatedConv2d])
@pytest.mark.parametrize(
    "options", [{}, dict(kernel_size=5, stride=2, groups=2, out_dim=6), dict(kernel_size=(1, 3), dilation=2, bias=True),
                dict(kernel_size=4, stride=4, padding=0), dict(kernel_size=1, stride=2)],
)  # fmt: skip
def test_fast_path_and_graph_against_the_loop_over_images(layer, options):
    op, x = layer(4, **options), torch.randn(3, 4, 9, 12)
    with torch.no_grad():
        for parameter in op.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = op.eval().reference(x)
    assert torch.allclose(op(x), expected, atol=2e-5)
    if "kernel_size" not in options or options["kernel_size"] != 1:
        assert torch.allclose(op._products(x, op.kernels(x)), expected, atol=2e-5)
    op(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in op.parameters())


@torch.no_grad()
def test_true_rotation_by_a_right_angle():
    axis, angle = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([math.pi / 2])
    assert torch.allclose(
        rotation_of(axis, angle)[0] @ torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0, 1]), atol=1e-6
    )
    op = RotatedConv2d(2)
    slices = (op.weights_3d.flatten(2) @ op.slicer(axis, angle)[0]).view(2, 2, 3, 3)
    assert torch.allclose(slices, op.weights_3d[:, :, 1].rot90(1, (2, 3)), atol=1e-5)


def test_a_1x1_kernel_is_a_plain_convolution_and_biases_are_off_unless_asked_for():
    op, x = CrossDConv2d(4, 6, 1), torch.randn(2, 4, 5, 5)
    assert set(op.state_dict()) == {"weights_3d"}
    assert torch.allclose(op(x), F.conv2d(x, op.weights_3d[..., 0, :, :]), atol=1e-6)
    biased = CrossDConv2d(4, 6, bias=True)
    with torch.no_grad():
        before = biased(x)
        biased.bias.add_(torch.arange(6.0))
        assert torch.allclose(biased(x) - before, torch.arange(6.0)[:, None, None].expand(6, 5, 5), atol=1e-4)


def test_the_transform_is_in_float32_whatever_the_weights_are():
    op = CrossDConv2d(4).bfloat16().eval()
    axis, angle = op.pose(torch.randn(2, 4, 5, 5, dtype=torch.bfloat16))
    assert axis.dtype == angle.dtype == op.slicer(axis, angle).dtype == torch.float32


def test_kernels_travel_to_volumes_bit_for_bit_and_back():
    op = CrossDConv2d(4, 6, 3, stride=2, groups=2, bias=True)
    conv = op.to_conv3d()
    assert torch.equal(conv.weight, op.weights_3d) and conv.weight is not op.weights_3d
    assert conv(torch.randn(1, 4, 5, 6, 7)).shape == (1, 6, 3, 3, 4)
    back = CrossDConv2d.from_conv3d(conv)
    assert torch.equal(back.weights_3d, op.weights_3d) and back.stride == (2, 2) and back.padding == (1, 1)
    with pytest.raises(BadInput, match="as deep as its larger side"):
        CrossDConv2d.from_conv3d(nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1)))


def test_converting_any_network():
    plain = opsin.create("mobilenet_v2_x0_1_face")
    with torch.no_grad():
        net = convert(plain)
        assert any(isinstance(m, nn.Conv2d) for m in plain.modules()), "the original stays"
        left = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        heads = [m.rotation_params for m in net.modules() if isinstance(m, CrossDConv2d) and max(m.kernel_size) > 1]
        assert len(left) == 2 * len(heads) > 0, "the only flat convolutions left are those of the heads"
        x = torch.randn(2, 3, 96, 96)
        assert net.eval()(x).shape == plain.eval()(x).shape
    for bad, message in ((nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "only zero padding"),
                         (nn.Conv2d(2, 2, 2, padding="same"), "no middle")):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            convert(nn.Sequential(bad))
    assert convert(nn.Sequential(nn.Conv2d(2, 2, 5, padding="same", dilation=2)))[0].padding == (4, 4)


@torch.no_grad()
def test_the_network_for_volumes_has_the_kernels_and_the_statistics():
    flat = opsin.create("cross_d_resnet", depths=(1, 1), dims=(4, 6), num_classes=3)
    flat(torch.randn(4, 3, 32, 32))
    solid = to_3d(flat.eval())
    assert isinstance(solid.conv1, nn.Conv3d) and torch.equal(solid.conv1.weight, flat.conv1.weights_3d)
    down = solid.layer2[0].downsample
    assert down[0].kernel_size == (1, 1, 1) and torch.equal(down[0].weight, flat.layer2[0].downsample[0].weights_3d)
    assert isinstance(solid.bn1, nn.BatchNorm3d) and torch.equal(solid.bn1.running_var, flat.bn1.running_var)
    assert torch.equal(solid.fc.weight, flat.fc.weight) and not solid.bn1.training
    assert solid(torch.randn(2, 3, 16, 24, 24)).shape == (2, 3)
    assert not any(isinstance(m, nn.Conv2d | CrossDConv2d | nn.BatchNorm2d | nn.MaxPool2d) for m in solid.modules())
    with pytest.raises(BadInput, match="Conv2d has no form"):
        to_3d(ResNet(BasicBlock, (1,), (4,)))


def test_resnet18_by_name():
    with torch.device("meta"):
        net, plain = opsin.create("crossd_resnet18_in1k"), opsin.create("resnet18")
    flat = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)}
    ours = {n: m for n, m in net.named_modules() if isinstance(m, CrossDConv2d)}
    assert flat.keys() == ours.keys() and len(ours) == 20
    for name, m in ours.items():
        k = flat[name].kernel_size[0]
        assert m.weights_3d.numel() == k * flat[name].weight.numel() and m.stride == flat[name].stride
    assert opsin.create("crossd_resnet18_rin", depths=(1,), dims=(4,)).fc.out_features == 165


def test_networks_in_double_and_without_numbers():
    plain = opsin.create("resnet", depths=(1, 1), dims=(4, 6), num_classes=3).double()
    net = convert(plain).eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    solid = to_3d(net).forward_features(x[:, :, None].expand(-1, -1, 8, -1, -1))
    assert net(x).dtype == solid.dtype == torch.float64
    assert net.conv1.weights_3d.dtype == torch.float64
    empty = convert(plain.to("meta"))
    assert {t.device.type for t in (*empty.state_dict().values(), *to_3d(empty).state_dict().values())} == {"meta"}
    conv = nn.Conv3d(4, 6, 3, padding=1).double()
    assert CrossDConv2d.from_conv3d(conv).rotation_params[0].weight.dtype == torch.float64


def test_kernels_start_by_what_goes_out():
    weights = CrossDConv2d(8, 128, 3).weights_3d
    assert float(weights.detach().std()) == pytest.approx(math.sqrt(2 / (128 * 27)), rel=0.05)
