"""The denoiser with a slider, the multi-loss that trains it, and the two ways of interpolation beside it."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import opsin
from opsin.catalog import card_of
from opsin.deploy import fuse
from opsin.errors import BadInput, UnknownName
from opsin.ops.conv.tunable_conv import TunableConv2d, make_tunable, set_control
from opsin.restore.interpolation import AdaFM, interpolate_networks, modulated, set_amount
from opsin.restore.multi_loss import ParametricMultiLoss, per_sample
from opsin.restore.tunable_denoiser import Dncnn, TunableDenoiser

mse = per_sample(lambda a, b: F.mse_loss(a, b, reduction="none"))


def two_objectives(**options: object) -> ParametricMultiLoss:
    return ParametricMultiLoss([lambda out, a, b: mse(out, a), lambda out, a, b: mse(out, b)], **options)


@torch.no_grad()
def test_strength_and_control_are_one_thing():
    net, image = TunableDenoiser(4, 8).eval(), torch.rand(3, 3, 9, 11)
    half = net(image, strength=0.5)
    assert torch.allclose(half, net(image, control=torch.tensor([0.5, 0.5])), atol=1e-6)
    each = net(image, strength=torch.tensor([0.5, 0.0, 1.0]))
    assert torch.allclose(each[0], half[0], atol=1e-6)
    assert torch.allclose(each[1:2], net(image[1:2], strength=0.0), atol=1e-6)
    assert torch.equal(net(image), net(image, strength=1.0)), "the default takes all noise off"
    assert torch.allclose(TunableDenoiser(4, 8, strength=0.25).body[0].control, torch.tensor([0.25, 0.75]))
    set_control(net, [0.5, 0.5])
    assert torch.allclose(net(image), half, atol=1e-6)


@torch.no_grad()
def test_channels_are_denoised_by_themselves():
    net, image = TunableDenoiser(4, 8).eval(), torch.rand(2, 3, 9, 11)
    together = net(image, strength=torch.tensor([0.2, 0.9]))
    for c in range(3):
        alone = net(image[:, c : c + 1], strength=torch.tensor([0.2, 0.9]))
        assert torch.allclose(together[:, c : c + 1], alone, atol=1e-6)


@torch.no_grad()
def test_folded_at_a_strength():
    net, image = TunableDenoiser(4, 8, strength=0.3).eval(), torch.rand(1, 1, 9, 11)
    plain = fuse(net)
    assert not any(isinstance(m, TunableConv2d) for m in plain.modules())
    assert torch.allclose(plain(image), net(image), atol=1e-5)


def test_sizes():
    for name, convs in (("tunable_denoiser", 8), ("tunable_denoiser_dncnn", 17)):
        net = opsin.create(name)
        assert sum(isinstance(m, TunableConv2d) for m in net.modules()) == convs == net.receptive_field
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(
            card_of(name).variants[name].params_m, rel=1e-3
        )


@torch.no_grad()
def test_the_shipped_one_takes_off_more_noise_the_further_it_is_turned():
    torch.manual_seed(0)
    net = opsin.create("tunable_denoiser", weights="shipped").eval()
    axis = torch.linspace(0, 6, 64)
    clean = (0.5 + 0.3 * torch.sin(axis) * torch.cos(1.7 * axis[:, None]))[None, None]
    noise = 25 / 255 * torch.randn(1, 1, 64, 64)
    left = [float((net(clean + noise, strength=s) - clean).square().mean().sqrt()) for s in (0, 0.25, 0.5, 0.75, 1)]
    assert all(a > b for a, b in pairwise(left))
    assert left[0] == pytest.approx(25 / 255, rel=0.1) and left[-1] < 0.35 * left[0]


def test_a_call_of_the_verb(tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 16), (90, 120, 30)).save(tmp_path / "photo.png")
    written = opsin.restore(
        tmp_path / "photo.png", model="tunable_denoiser(strength=0.5)", output=tmp_path / "out", progress=False
    )
    with Image.open(written[0]) as image:
        assert image.size == (20, 16)


@pytest.mark.parametrize("space", ["cube", "simplex"])
def test_draws_fill_the_space_and_its_corners(space):
    loss = ParametricMultiLoss([mse] * 3, space=space, corners=0.25)
    w = loss.draw(4000, torch.Generator().manual_seed(0))
    assert w.shape == (4000, 3) and w.min() >= 0 and w.max() <= 1
    corner = ((w == 0) | (w == 1)).all(1)
    assert float(corner.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert (w[corner].sum(1) > 0).all()
    pure = [(w[corner] == row).all(1).any() for row in torch.eye(3)]
    assert all(pure), "every pure objective is seen"
    mean = 1 / 3 if space == "simplex" else 0.5
    assert torch.allclose(w[~corner].mean(0), torch.full((3,), mean), atol=0.02)
    if space == "simplex":
        assert torch.allclose(w.sum(1), torch.ones(4000), atol=1e-5)
    else:
        assert len(w[corner].unique(dim=0)) == 7, "all corners but the one without any objective"


def test_losses_are_mixed_and_balanced():
    loss = two_objectives()
    out, a, b = torch.rand(4, 1, 5, 5), torch.rand(4, 1, 5, 5), 3 * torch.rand(4, 1, 5, 5)
    w = torch.rand(4, 2)
    expected = (w[:, 0] * mse(out, a) + w[:, 1] * mse(out, b)).mean()
    assert torch.allclose(loss(out, a, b, control=w), expected)
    loss.balance(out, a, b)
    assert torch.allclose((loss.scales * loss.values(out, a, b)).mean(0), torch.ones(2))
    with pytest.raises(BadInput, match="above 0"):
        loss.balance(a, a, b)


def test_one_control_turns_network_and_loss_in_a_step():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = TunableConv2d(1, 1, 1)

        def forward(self, x):
            self.seen = self.layer.control.clone()
            return self.layer(x)

    net, loss = Recorder(), two_objectives(corners=0.0)
    x, a, b = torch.rand(5, 1, 4, 4), torch.rand(5, 1, 4, 4), torch.rand(5, 1, 4, 4)
    value = loss.step(net, x, a, b, generator=torch.Generator().manual_seed(1))
    assert net.seen.shape == (5, 2) and len(net.seen.unique(dim=0)) == 5
    assert torch.allclose(value, loss(net.layer(x, net.seen), a, b, control=net.seen))
    assert net.layer.control.tolist() == [1, 1]


def test_a_network_learns_to_slide():
    torch.manual_seed(0)
    net = make_tunable(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)))
    loss, optimiser = two_objectives(space="simplex"), torch.optim.Adam(net.parameters(), 1e-2)
    x = torch.rand(16, 1, 8, 8)
    for _ in range(150):
        optimiser.zero_grad()
        loss.step(net, x, x, 1 - x).backward()
        optimiser.step()
    with torch.no_grad():
        for w, target in (([1.0, 0.0], x), ([0.0, 1.0], 1 - x), ([0.5, 0.5], torch.full_like(x, 0.5))):
            set_control(net, w)
            assert F.mse_loss(net(x), target) < 0.02


def test_interpolated_networks():
    a, b, x = Dncnn(3, 4), Dncnn(3, 4), torch.rand(1, 1, 6, 6)
    for t, other in ((0.0, a), (1.0, b)):
        assert torch.allclose(interpolate_networks(a, b, t)(x), other(x), atol=1e-6)
    middle = interpolate_networks(a, b, 0.25)
    assert torch.allclose(middle[2].weight, 0.75 * a[2].weight + 0.25 * b[2].weight)
    assert not torch.allclose(middle(x), 0.75 * a(x) + 0.25 * b(x), atol=1e-4), "weights are mixed, not outputs"
    with pytest.raises(BadInput, match="different weights"):
        interpolate_networks(a, Dncnn(3, 5), 0.5)


@pytest.mark.parametrize("side", [1, 3])
def test_modulated_networks_start_as_they_were_and_slide(side):
    net, x = Dncnn(3, 4), torch.rand(1, 1, 6, 6)
    new = modulated(net, side)
    assert torch.allclose(new(x), net(x), atol=1e-6)
    trained = {name.rpartition(".")[0] for name, p in new.named_parameters() if p.requires_grad}
    assert trained == {name for name, m in new.named_modules() if isinstance(m, AdaFM)}
    with torch.no_grad():
        for m in new.modules():
            if isinstance(m, AdaFM):
                m.weight.add_(0.3 * torch.randn_like(m.weight))
                m.bias.add_(0.1)
    moved = new(x)
    set_amount(new, 0.0)
    assert torch.allclose(new(x), net(x), atol=1e-6) and not torch.allclose(moved, net(x), atol=1e-4)
    set_amount(new, 0.5)
    first = next(m for m in new.modules() if isinstance(m, AdaFM))
    expected = F.conv2d(first.conv(x), 0.5 * (first.same + first.weight), 0.5 * first.bias, padding=side // 2, groups=4)
    assert torch.allclose(first(x), expected, atol=1e-6)


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match=r"strength=1\.5"):
        TunableDenoiser(strength=1.5)
    with pytest.raises(BadInput, match="1 or 3 channels, not 2"):
        TunableDenoiser(2, 4)(torch.rand(1, 2, 5, 5))
    with pytest.raises(BadInput, match="at least one objective"):
        ParametricMultiLoss([])
    with pytest.raises(BadInput, match="corners=2"):
        two_objectives(corners=2)
    with pytest.raises(UnknownName, match="simplex"):
        two_objectives(space="simplx")
    with pytest.raises(BadInput, match="side=2 is even"):
        modulated(Dncnn(2, 2), 2)
    with pytest.raises(BadInput, match="no convolution"):
        modulated(nn.Linear(2, 2))


def test_an_objective_may_depend_on_the_control():
    def weaker(out: torch.Tensor, noisy: torch.Tensor, clean: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
        return mse(out, clean + (1 - control[:, :1, None, None]) * (noisy - clean))

    out, noisy, clean = torch.randn(3, 2, 1, 4, 4)
    loss, control = ParametricMultiLoss([weaker]), torch.tensor([[0.25], [1.0]])
    targets = torch.stack((clean[0] + 0.75 * (noisy[0] - clean[0]), clean[1]))
    expected = (control[:, 0] * mse(out, targets)).mean()
    assert torch.allclose(loss(out, noisy, clean, control=control), expected)
    with pytest.raises(BadInput, match="depends on the control"):
        loss.balance(out, noisy, clean)
    loss.balance(out, noisy, clean, control=control)
    assert torch.allclose(loss.scales, 1 / mse(out, targets).mean())
