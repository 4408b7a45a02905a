"""ESPCN: the paper's numbers, its exact identities, and what the shipped weights reach on Set5."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from opsin.catalog import create, find
from opsin.data.resample import bicubic_resize
from opsin.errors import BadInput
from opsin.layers.subpixel import SubPixelConv2d, paper_order, transposed
from opsin.measure.cost import count_macs
from opsin.measure.image_quality import luminance, psnr_y, rgb_to_ycbcr
from opsin.restore.espcn import ESPCN

PARAMS = {2: 21_284, 3: 22_729, 4: 24_752}


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_published_parameters_and_macs(scale):
    net = ESPCN(scale)
    assert sum(p.numel() for p in net.parameters()) == PARAMS[scale]
    assert count_macs(net, torch.zeros(1, 1, 10, 7)) == 70 * (25 * 64 + 9 * 64 * 32 + 9 * 32 * scale**2)


def test_forward_is_equations_1_to_3():
    net, y = ESPCN(2).train(), torch.rand(1, 1, 6, 7)
    w = net.state_dict()
    f1 = torch.tanh(F.conv2d(y, w["conv1.weight"], w["conv1.bias"], padding=2))
    f2 = torch.tanh(F.conv2d(f1, w["conv2.weight"], w["conv2.bias"], padding=1))
    t = F.conv2d(f2, w["conv3.weight"], w["conv3.bias"], padding=1)
    expected = torch.stack(
        [torch.stack([t[0, 2 * (i % 2) + j % 2, i // 2, j // 2] for j in range(14)]) for i in range(12)]
    )
    assert torch.allclose(net(y)[0, 0], expected, atol=1e-6)


def paper_shuffle(t, r, channels):
    """Equation 4, pixel by pixel; x is the row."""
    _, height, width = t.shape
    out = torch.zeros(channels, height * r, width * r)
    for x in range(height * r):
        for y in range(width * r):
            for c in range(channels):
                out[c, x, y] = t[channels * r * (y % r) + channels * (x % r) + c, x // r, y // r]
    return out


@pytest.mark.parametrize(("channels", "r"), [(1, 2), (1, 3), (3, 2), (2, 4)])
def test_weights_in_the_papers_order_give_the_papers_shuffle(channels, r):
    layer = SubPixelConv2d(5, channels, 3, r)
    x = torch.randn(1, 5, 4, 6)
    expected = paper_shuffle(layer.low_resolution(x)[0], r, channels)
    order = paper_order(channels, r)
    ours = SubPixelConv2d(5, channels, 3, r)
    ours.load_state_dict({name: tensor[order] for name, tensor in layer.state_dict().items()})
    assert torch.allclose(ours(x)[0], expected, atol=1e-6)
    assert not torch.allclose(layer(x)[0], expected, atol=1e-3)


@pytest.mark.parametrize(("out", "kernel", "r"), [(1, 3, 3), (2, 5, 2), (3, 3, 4), (1, 1, 2)])
def test_subpixel_convolution_is_a_transposed_convolution(out, kernel, r):
    layer = SubPixelConv2d(6, out, kernel, r).double()
    with torch.no_grad():
        layer.bias.copy_(layer.bias[:: r**2].repeat_interleave(r**2))
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    assert (layer(x) - transposed(layer)(x)).abs().max() < 1e-12
    assert (layer(x) - F.pixel_shuffle(layer.low_resolution(x), r)).abs().max() == 0


def test_transposed_refuses_biases_that_it_cannot_hold():
    with pytest.raises(ValueError, match="sub-pixel"):
        transposed(SubPixelConv2d(6, 1, 3, 2))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_loss_at_low_resolution_is_the_loss_of_the_image(scale):
    net = ESPCN(scale).train()
    low, high = torch.rand(2, 3, 8, 9), torch.rand(2, 3, 8 * scale, 9 * scale)
    plain = F.mse_loss(net(luminance(low)), luminance(high))
    assert net.loss(low, high).item() == pytest.approx(plain.item(), rel=1e-6)
    direct = torch.autograd.grad(plain, net.conv1.weight)[0]
    cheap = torch.autograd.grad(net.loss(low, high), net.conv1.weight)[0]
    assert torch.allclose(direct, cheap, atol=1e-6)


def test_colour_is_the_network_on_y_and_bicubic_on_the_rest():
    net = ESPCN(2).train()
    x = torch.rand(1, 3, 10, 12)
    out = rgb_to_ycbcr(net(x))
    assert torch.allclose(out[:, :1], net(luminance(x)), atol=1e-5)
    chroma = bicubic_resize(rgb_to_ycbcr(x)[:, 1:], 2, border="renormalise")
    assert torch.allclose(out[:, 1:], chroma, atol=1e-5)


def test_clamped_in_eval_only():
    net = ESPCN(2)
    with torch.no_grad():
        net.conv3.bias.fill_(1.5)
    x = torch.rand(1, 1, 5, 5)
    assert net.train()(x).max() > 1 and net.eval()(x).max() == 1


def test_icnr_starts_without_checkerboard():
    x = torch.rand(1, 1, 8, 8)
    blocks = F.pixel_unshuffle(ESPCN(3, icnr=True)(x), 3)
    assert torch.allclose(blocks, blocks[:, :1].expand_as(blocks), atol=1e-6)
    blocks = F.pixel_unshuffle(ESPCN(3)(x), 3)
    assert not torch.allclose(blocks, blocks[:, :1].expand_as(blocks), atol=1e-3)


def test_receptive_field_is_what_it_says():
    net = ESPCN(2)
    x = torch.rand(1, 1, 21, 21, requires_grad=True)
    net(x)[0, 0, 20:22, 20:22].sum().backward()  # the four pixels of input pixel (10, 10)
    rows = x.grad[0, 0].abs().amax(1).nonzero().flatten()
    assert (rows.min().item(), rows.max().item()) == (10 - net.receptive_field, 10 + net.receptive_field)


def test_wrong_channels_and_scale():
    with pytest.raises(BadInput, match="1 or 3 channels"):
        ESPCN(2)(torch.rand(1, 4, 8, 8))
    with pytest.raises(BadInput):
        ESPCN(0)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_shipped_weights_are_small_and_sharpen(scale):
    card, variant = find(f"espcn_x{scale}")
    assert (card.path.parent / variant.weights).stat().st_size < 200_000
    from skimage import data

    photo = torch.from_numpy(data.astronaut()[:240, :240].copy()).permute(2, 0, 1)[None] / 255
    low = (bicubic_resize(photo, 1 / scale).clamp(0, 1) * 255).round() / 255
    net = create(f"espcn_x{scale}", weights="shipped").eval()
    with torch.no_grad():
        gain = psnr_y(net(low), photo, scale) - psnr_y(bicubic_resize(low, scale), photo, scale)
    assert gain.item() > {2: 1.0, 3: 0.8, 4: 0.6}[scale]


def test_set5_beats_bicubic(opsin_data):
    """Bicubic reaches the literature's 33.66 dB, which checks the whole pipeline; the weights, 1 dB more."""
    from opsin.data.images import read_image

    bicubic, ours = [], []
    net = create("espcn_x2", weights="shipped").eval()
    for file in sorted((opsin_data / "sr" / "Set5").glob("*.png")):
        high = read_image(file)[None]
        high = high[..., : high.shape[-2] // 2 * 2, : high.shape[-1] // 2 * 2]
        low = (bicubic_resize(high, 0.5).clamp(0, 1) * 255).round() / 255
        bicubic.append(psnr_y(bicubic_resize(low, 2), high, 2).item())
        with torch.no_grad():
            ours.append(psnr_y(net(low), high, 2).item())
    assert len(ours) == 5
    assert np.mean(bicubic) == pytest.approx(33.66, abs=0.1)
    assert np.mean(ours) >= np.mean(bicubic) + 1
