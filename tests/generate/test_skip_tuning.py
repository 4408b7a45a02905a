"""The factors, where they act, and how they are tuned."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput, TrainingFailed
from opsin.generate.edm import EDM
from opsin.generate.skip_tuning import HasSkips, SkipPoint, SkipTuning, learn, points_of, tune
from opsin.generate.unet import UNetBlock


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = EDM(8, 1, channels=16, channel_mult=(1, 2), num_blocks=2, attn_resolutions=(4,), head_dim=8, dropout=0.0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15)
    return network.eval()


@pytest.fixture
def noisy():
    return torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.5, 2.0, 9.0])


class UViT(nn.Module):
    """A transformer with long skips: a linear layer on the concatenation (x, skip)."""

    def __init__(self, dim=8):
        super().__init__()
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.inner, self.outer = nn.Linear(2 * dim, dim), nn.Linear(2 * dim, dim)
        self.dim = dim

    def skip_points(self):
        return [SkipPoint(self.inner, self.dim, dim=-1), SkipPoint(self.outer, self.dim, dim=-1)]

    def forward(self, x, scales=(1.0, 1.0)):
        a = self.first(x).tanh()
        b = self.second(a).tanh()
        y = self.inner(torch.cat((b, scales[0] * b), -1)).tanh()
        return self.outer(torch.cat((y, scales[1] * a), -1))


def test_factors_rise_from_the_innermost_skip():
    torch.testing.assert_close(SkipTuning(0.6, 1.0).factors(5), torch.tensor([0.6, 0.7, 0.8, 0.9, 1.0]))
    assert SkipTuning(rhos=[0.5, 0.9]).factors(2).tolist() == pytest.approx([0.5, 0.9])
    with pytest.raises(BadInput, match="2 factors, but the network has 3 skips"):
        SkipTuning(rhos=[0.5, 0.9]).factors(3)
    with pytest.raises(BadInput, match="sigma_range"):
        SkipTuning(sigma_range=(2.0, 1.0))
    assert repr(SkipTuning(0.7, 1, sigma_range=(0.5, 2))) == "SkipTuning(0.7, 1, sigma_range=(0.5, 2))"
    assert "rhos=[0.5, 1.0]" in repr(SkipTuning(rhos=[0.5, 1.0]))


def test_each_skip_gets_its_own_factor_and_the_decoder_none(model, noisy):
    seen = {}
    for i, point in enumerate(model.skip_points()):
        point.register_forward_hook(lambda module, inputs, output, i=i: seen.setdefault(i, []).append(output))
    plain = {}
    for i, point in enumerate(model.skip_points()):
        point.register_forward_pre_hook(lambda module, inputs, i=i: plain.__setitem__(i, inputs))
    with torch.no_grad(), SkipTuning(0.5, 1.0).apply(model):
        model(*noisy)
    factors = torch.linspace(0.5, 1.0, 6)
    for i in range(6):
        x, skip = plain[i]
        torch.testing.assert_close(seen[i][0], torch.cat((x, factors[i] * skip), 1))


def test_one_skip_alone(model, noisy):
    with torch.no_grad():
        plain = model(*noisy)
        for i in range(6):
            rhos = torch.ones(6)
            rhos[i] = 0.5
            with SkipTuning(rhos=rhos).apply(model):
                assert (model(*noisy) - plain).abs().max() > 1e-5


def test_a_factor_equals_scaled_weight_columns():
    d, s = torch.randn(2, 4, 8, 5, 5).unbind(0)
    conv = nn.Conv2d(16, 8, 1)
    weight = torch.cat((conv.weight[:, :8], 0.6 * conv.weight[:, 8:]), 1)
    (joined,) = SkipPoint(conv, width=8).scaled((torch.cat((d, s), 1),), torch.tensor(0.6))
    torch.testing.assert_close(conv(joined), F.conv2d(torch.cat((d, s), 1), weight, conv.bias))


def test_group_norm_cancels_aligned_groups_but_the_shortcut_does_not():
    d, s = torch.randn(2, 4, 32, 8, 8).unbind(0)
    block, emb = UNetBlock(64, 32, 8).eval(), torch.randn(4, 8)
    nn.init.normal_(block.conv1.weight, std=0.1)
    joined, scaled = torch.cat((d, s), 1), torch.cat((d, 0.6 * s), 1)
    assert (block(scaled, emb) - block(joined, emb)).abs().max() > 0.1
    nn.init.zeros_(block.skip.weight)
    assert (block(scaled, emb) - block(joined, emb)).abs().max() < 1e-3
    straddling = UNetBlock(48, 32, 8).eval()  # groups of 4 from 18 + 30 channels: one holds both halves
    nn.init.normal_(straddling.conv1.weight, std=0.1)
    nn.init.zeros_(straddling.skip.weight)
    joined, scaled = torch.cat((d[:, :18], s[:, :30]), 1), torch.cat((d[:, :18], 0.6 * s[:, :30]), 1)
    assert (straddling(scaled, emb) - straddling(joined, emb)).abs().max() > 1e-3


def test_a_range_of_noise_levels_acts_per_sample(model, noisy):
    x, sigma = noisy
    with torch.no_grad():
        plain = model(x, sigma)
        with SkipTuning(0.5).apply(model):
            everywhere = model(x, sigma)
        with SkipTuning(0.5, sigma_range=(0.3, 3.0)).apply(model):
            middle = model(x, sigma)
            by_name = model(x, sigma=sigma)
    assert torch.equal(middle[[0, 3]], plain[[0, 3]])
    assert torch.equal(middle[1:3], everywhere[1:3]) and not torch.equal(middle[1:3], plain[1:3])
    assert torch.equal(by_name, middle)


def test_transformers_with_long_skips():
    network, x = UViT(), torch.randn(3, 5, 8)
    assert isinstance(network, HasSkips) and len(points_of(network)) == 2
    with torch.no_grad(), SkipTuning(0.5, 0.8).apply(network):
        tuned = network(x)
    torch.testing.assert_close(tuned, network(x, scales=(0.5, 0.8)))
    assert not network.inner._forward_pre_hooks


def test_tricks_nest(model, noisy):
    with torch.no_grad():
        with SkipTuning(0.36, 1.0).apply(model):
            once = model(*noisy)
        with (
            SkipTuning(0.6, 1.0).apply(model),
            SkipTuning(rhos=torch.linspace(0.36, 1, 6) / torch.linspace(0.6, 1, 6)).apply(model),
        ):
            torch.testing.assert_close(model(*noisy), once)


def test_networks_without_skips_are_named():
    with pytest.raises(BadInput, match="Linear declares no skip"), SkipTuning().apply(nn.Linear(2, 2)):
        pass


def test_the_grid_search_finds_the_minimum(model, noisy):
    with torch.no_grad(), SkipTuning(0.7, 1.1).apply(model):
        wanted = model(*noisy)

    @torch.no_grad()
    def distance(network):
        return float((network(*noisy) - wanted).square().mean())

    found = tune(model, distance, (0.6, 0.7, 0.8), (1.0, 1.1))
    assert (found.trick.rho_bottom, found.trick.rho_top) == (0.7, 1.1)
    assert len(found.scores) == 6 and found.scores[0.7, 1.1] == 0


def test_gradient_descent_moves_the_factors_alone(model, noisy):
    with torch.no_grad(), SkipTuning(0.6).apply(model):
        wanted = model(*noisy)
    weights = {name: t.clone() for name, t in model.state_dict().items()}

    def loss(network):
        return (network(*noisy) - wanted).square().mean()

    learned = learn(model, loss, steps=60, lr=0.03)
    with torch.no_grad():
        before = loss(model)
        with learned.apply(model):
            assert loss(model) < 0.3 * before
    assert learned.rhos is not None and not learned.rhos.requires_grad
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(TrainingFailed, match="step 0"):
        learn(model, lambda network: loss(network) * float("nan"), steps=2)
    assert all(p.requires_grad for p in model.parameters())


def test_from_the_catalogue():
    trick = opsin.create("skip_tuning(rho_bottom=0.7, sigma_range=(0.5, 2.0))")
    assert trick.rho_bottom == 0.7 and trick.sigma_range == (0.5, 2.0)
