"""The toolbox of filters: closed forms, libraries and small worked cases for each of its five questions."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_laplace
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput, UnknownName
from opsin.layers.filter_design import (
    BANKS,
    INITIALISERS,
    LEARNERS,
    PCANet,
    bank,
    conv_macs,
    diagnose,
    equal_width,
    fixup,
    initialise,
    learn_filters,
    receptive_field,
    receptive_fields,
    scaled_width,
    seen_pixels,
    start_from_bank,
    substitutions,
    table,
)
from opsin.layers.filter_design.diagnostics import duplicate_rate, effective_rank, sparsity, spectral_entropy
from opsin.layers.filter_design.initialisers import (
    WEIGHT_INITIALISERS,
    at_layer,
    evaluating,
    layers_of,
    learned_weight,
    residual_branches,
    to_unit_variance,
    whitened_kmeans,
)
from opsin.layers.filter_design.unsupervised import (
    Whitening,
    autoencoder,
    competitive,
    contrast_normalised,
    denoising,
    kmeans,
    oja,
    pca,
    quadrants,
    random,
    rica,
    sampled_patches,
    sanger,
)
from opsin.layers.subpixel import SubPixelConv2d
from opsin.ops.conv.depthwise import DepthwiseConv


def plain(depth: int = 4, width: int = 8, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else 3, width, 3, padding=1)] + [nn.BatchNorm2d(width)] * norm + [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def images(n: int = 16, side: int = 16) -> Tensor:
    """Smooth pictures, so that patches have structure."""
    return (
        torch.rand(n, 3, side // 4 + 1, side // 4 + 1)
        .repeat_interleave(4, 2)
        .repeat_interleave(4, 3)[..., :side, :side]
    )


# 1. how filters start


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("normal", 1e-4), ("lecun_normal", 1 / 144), ("lecun_uniform", 1 / 144), ("xavier_normal", 2 / (144 + 576)),
        ("xavier_uniform", 2 / (144 + 576)), ("he_normal", 2 / 144), ("he_uniform", 2 / 144), ("orthogonal", 1 / 144),
    ],
)  # fmt: skip
def test_variances_by_formula(name, variance):
    weight = torch.empty(64, 16, 3, 3)
    WEIGHT_INITIALISERS[name](weight)
    assert float(weight.var()) == pytest.approx(variance, rel=0.06) and abs(float(weight.mean())) < 0.02


def test_bounds_of_the_uniform_ones():
    weight = torch.empty(64, 16, 3, 3)
    for name, bound in (("xavier_uniform", (6 / 720) ** 0.5), ("he_uniform", (6 / 144) ** 0.5)):
        largest = float(WEIGHT_INITIALISERS[name](weight).abs().max())
        assert 0.99 * bound < largest <= bound


def test_gains():
    torch.manual_seed(1)
    a = WEIGHT_INITIALISERS["he_normal"](torch.empty(4, 4, 3, 3), (2 / 1.04) ** 0.5)  # leaky ReLU of slope 0.2
    torch.manual_seed(1)
    expected = nn.init.kaiming_normal_(torch.empty(4, 4, 3, 3), a=0.2)
    assert torch.allclose(a, expected)
    rows = initialise(nn.Conv2d(3, 8, 3), "orthogonal", gain=2.0).weight.flatten(1)
    assert torch.allclose(rows @ rows.T, 4 * torch.eye(8), atol=1e-5)


def test_delta_orthogonal_keeps_norms():
    conv = initialise(nn.Conv2d(4, 8, 5, padding=2, padding_mode="circular"), "delta_orthogonal")
    x = torch.randn(2, 4, 7, 9)
    assert torch.allclose(conv(x).norm(), x.norm(), rtol=1e-5) and int((conv.weight != 0).sum()) == 32
    with pytest.raises(BadInput, match="has 8 < 16"):
        initialise(nn.Conv2d(16, 8, 3), "delta_orthogonal")


def deviations(model: nn.Module, batch: Tensor) -> list[float]:
    with evaluating(model):
        return [float(at_layer(model, layer, batch)[1].std()) for layer in layers_of(model)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["lsuv", "pca", "kmeans"])
def test_initialisers_from_data_give_unit_variance(name, norm):
    model, batch = plain(4, norm=norm), images(32)
    initialise(model, "normal")
    assert deviations(model, batch)[2] < 1e-2
    initialise(model, name, batch)
    assert all(abs(value**2 - 1) < 0.11 for value in deviations(model, batch)[:-1]) and model.training
    assert not any(layer.bias.any() for layer in layers_of(model))


def test_pca_start_is_the_principal_components_of_what_a_layer_receives():
    model, batch = plain(2), images(32)
    initialise(model, "pca", batch)
    for layer in layers_of(model)[:2]:
        with torch.no_grad():
            inputs = at_layer(model, layer, batch)[0]
        patches = F.unfold(F.pad(inputs, (1, 1, 1, 1)), 3).mT.flatten(0, 1).numpy()
        first = torch.from_numpy(PCA(1).fit(patches).components_[0]).float()
        assert float(F.cosine_similarity(layer.weight.detach()[0].flatten(), first, dim=0).abs()) > 0.98


@pytest.mark.parametrize("name", ["orthogonal", "delta_orthogonal", "xavier_normal", "he_normal"])
def test_groups_start_by_themselves(name):
    grouped = initialise(nn.Conv2d(32, 64, 3, groups=4), name).weight.detach()
    one = initialise(nn.Conv2d(8, 16, 3), name).weight.detach()
    assert float(grouped.std()) == pytest.approx(float(one.std()), rel=0.1)
    if "orthogonal" in name:
        assert all(torch.linalg.matrix_rank(group.flatten(1)) == (16, 8)["delta" in name] for group in grouped.chunk(4))


@torch.no_grad()
def test_depthwise_filters_keep_the_variance():
    x = torch.randn(8, 64, 16, 16)
    for name in ("orthogonal", "delta_orthogonal"):
        assert float(initialise(DepthwiseConv(64, 3), name)(x).std()) == pytest.approx(1, abs=0.1)
    net = initialise(opsin.create("mobilenetv2_050", num_classes=5), "orthogonal", gain=2**0.5)
    assert deviations(net, torch.randn(4, 3, 64, 64))[-2] > 1e-3


@pytest.mark.parametrize("name", ["orthogonal", "delta_orthogonal"])
def test_orthogonal_in_half_precision(name):
    torch.manual_seed(0)
    half = initialise(nn.Conv2d(4, 8, 3).bfloat16(), name).weight
    squares = float(half.detach().float().square().sum())
    assert half.dtype == torch.bfloat16 and squares == pytest.approx(8 if name == "orthogonal" else 4, rel=0.02)


def test_lsuv_leaves_what_is_within_a_tenth():
    basis = torch.linalg.qr(torch.randn(64, 64)).Q
    for variance, kept in ((1.08, True), (0.92, True), (1.15, False), (0.85, False)):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        batch = basis * (variance * (basis.numel() - 1) / 64) ** 0.5
        initialise(model, "lsuv", batch)
        weight = model[0].weight.detach()
        assert torch.allclose(weight @ weight.T, torch.eye(64), atol=1e-3) == kept
        assert kept or float(model(batch).detach().var()) == pytest.approx(1, rel=1e-3)


class Scaleless(nn.Linear):
    """A layer whose output does not change with the scale of its weight: deviation 2 for ever."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y / y.std()


def test_lsuv_gives_up_after_ten_rounds():
    model = nn.Sequential(Scaleless(16, 16))
    initialise(model, "lsuv", torch.randn(64, 16))
    assert float(model[0].weight.detach().norm()) == pytest.approx(4 / 2**10, rel=1e-3)


def test_one_value_has_no_variance():
    model = nn.Sequential(nn.Linear(4, 1))
    with pytest.raises(BadInput, match="give more images"):
        initialise(model, "lsuv", torch.randn(1, 4))
    assert model[0].weight.isfinite().all()
    with torch.no_grad():
        to_unit_variance(model, model[0], torch.randn(100, 4), 0.1, 10)
    assert model[0].weight.isfinite().all()


def test_patches_are_spread_and_padded_as_the_taps_are():
    picture, seen = torch.arange(144.0).view(1, 1, 12, 12), []

    def learner(patches: Tensor, count: int) -> Tensor:
        seen.append(patches)
        return patches[:count]

    learned_weight(picture, nn.Conv2d(1, 4, 3, dilation=(2, 3)), learner)
    steps = (seen[0] - seen[0][:, :1]).unique(dim=0)
    assert torch.equal(steps, torch.tensor([[24.0 * i + 3 * j for i in range(3) for j in range(3)]]))
    learned_weight(picture + 1, nn.Conv2d(1, 4, 3, padding="valid"), learner)
    assert seen[1].min() > 0, "no zeros around"
    learned_weight(picture, nn.Conv2d(1, 4, 3, padding="same", dilation=2), learner)
    corners = seen[2][(seen[2] == 0).sum(1) == 6]
    assert len(corners), "two pixels of zeros around"


def test_kmeans_start_sees_whitened_patches():
    """Smooth pictures have smooth averages; what is found behind the whitening has no mean and high frequencies."""
    patches = sampled_patches(F.avg_pool2d(torch.rand(64, 1, 32, 32), 3, 1), (5, 5), 5000)
    filters = F.normalize(whitened_kmeans(patches, 16), dim=1)
    assert filters.sum(1).abs().max() < 1e-4
    prepared = contrast_normalised(patches)
    whitening = Whitening.zca(prepared)
    expected = whitening(prepared) @ kmeans(whitening(prepared), 16).T
    found = prepared @ whitened_kmeans(patches, 16).T
    assert torch.allclose(found - found.mean(0), expected - expected.mean(0), atol=1e-3), "the whitening is folded in"
    conv = nn.Conv2d(1, 16, 5)
    initialise(conv, "kmeans", F.avg_pool2d(torch.rand(8, 1, 32, 32), 3, 1))
    assert conv.weight.detach().sum((1, 2, 3)).abs().max() < 1e-3 and conv.weight.detach().norm() > 1
    grey = initialise(nn.Sequential(nn.Conv2d(1, 4, 1)), "kmeans", torch.rand(8, 1, 9, 9))
    assert grey[0].weight.detach().norm() > 0.1


def test_fixup_by_branches():
    net = opsin.create("resnet18", num_classes=4)
    initialise(net, "fixup")
    blocks = [m for m in net.modules() if type(m).__name__.endswith("Block")]
    assert len(blocks) == 8 and not any(block.conv2.weight.any() for block in blocks)
    weight = blocks[0].conv1.weight.detach()  # L = 8, m = 2
    assert float(weight.std()) == pytest.approx(8**-0.5 * (2 / weight[0].numel()) ** 0.5, rel=0.05)
    assert not net(torch.randn(2, 3, 32, 32)).any(), "the classifier starts at 0"
    branch = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    fixup(branch, [branch])
    assert branch[0].weight.any() and branch[1].weight.any() and not branch[2].weight.any()
    with pytest.raises(BadInput, match="no residual branches"):
        initialise(plain(), "fixup")


@pytest.mark.parametrize(
    ("name", "branches"), [("metanet_n", 10), ("vit_tiny_patch16_224", 24), ("mobilenetv2_050", 10), ("resnet18", 8)]
)
@torch.no_grad()
def test_fixup_makes_blocks_identities(name, branches):
    """A block with two branches counts twice, and one without a residual not at all."""
    net = initialise(opsin.create(name, num_classes=3), "fixup").eval()
    assert len(residual_branches(net)) == branches
    changes: list[float] = []

    def compare(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].relu() if "resnet" in name else inputs[0]
        if output.shape == x.shape and getattr(block, "residual", True):
            changes.append(float((output - x).abs().max()))

    for block in net.modules():
        if type(block).__name__ in ("Block", "BasicBlock", "InvertedResidual"):
            block.register_forward_hook(compare)
    net(torch.randn(2, 3, 64, 64))
    assert changes and max(changes) == 0


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu())


class ShortcutBlock(ConvBlock):
    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + super().forward(x)


class PoolBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = self.norm2 = nn.BatchNorm2d(4)
        self.mixer, self.mlp = nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 4, 1)


def test_fixup_knows_shortcuts_and_complains_where_it_cannot_know():
    weight = (net := nn.Sequential(ConvBlock(), ConvBlock()))[0].conv2.weight.detach().clone()
    with pytest.raises(BadInput, match="ConvBlock may be residual or not"):
        initialise(net, "fixup")
    assert torch.equal(net[0].conv2.weight.detach(), weight)
    for shortcut in (nn.Identity(), nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1))):
        block = initialise(ShortcutBlock(shortcut), "fixup")
        assert not block.conv2.weight.any() and block.conv1.weight.any()
        assert all(p.any() for name, p in block.named_parameters() if "shortcut" in name and p.ndim > 1)
    with pytest.raises(BadInput, match="branch of PoolBlock has no"):
        fixup(PoolBlock())


def test_he_keeps_a_deep_network_alive_and_small_starts_do_not():
    batch = torch.randn(32, 3, 12, 12)
    values = {}
    for name, gain in (("he_normal", None), ("orthogonal", 2**0.5), ("normal", None)):
        values[name] = deviations(initialise(plain(10, 32), name, gain=gain), batch)[:10]
    assert all(0.3 < v < 3 for name in ("he_normal", "orthogonal") for v in values[name])
    assert values["normal"][9] < 1e-8


def test_initialise_complains():
    with pytest.raises(UnknownName, match="he_normal"):
        initialise(plain(), "he_norml")
    with pytest.raises(BadInput, match="batch of images"):
        initialise(plain(), "lsuv")
    with pytest.raises(BadInput, match="takes no gain"):
        initialise(plain(), "lsuv", images(), gain=2)
    assert len(INITIALISERS) == 15


# 2. filters made by hand


@pytest.mark.parametrize("name", BANKS)
def test_banks_are_of_unit_norm_and_differ(name):
    size = 8 if name == "haar" else 9
    found = bank(name, size, 3)
    assert found.shape == (3, size, size) and torch.allclose(found.flatten(1).norm(dim=1), torch.ones(3))
    assert torch.linalg.matrix_rank(found.flatten(1)) == 3


def test_gabor_by_formula():
    """The first: wavelength 4, horizontal wave, even; the fifth is its odd partner."""
    y, x = torch.meshgrid(*[torch.arange(-4.0, 5)] * 2, indexing="ij")
    window = torch.exp(-(x**2 + 0.25 * y**2) / (2 * 2.24**2))
    for place, wave in ((0, torch.cos(torch.pi * x / 2)), (4, torch.sin(torch.pi * x / 2))):
        expected = window * wave
        found = bank("gabor", 9, 5)[place]
        assert abs(float((found * expected).sum() / expected.norm())) == pytest.approx(1, abs=1e-5)


def test_orthonormal_banks():
    for name, size in (("dct", 5), ("haar", 4)):
        found = bank(name, size, size**2).flatten(1)
        assert torch.allclose(found @ found.T, torch.eye(size**2), atol=1e-6)
        assert (found[0] - found[0].mean()).abs().max() < 1e-6, "the first is the mean"


def test_steerable_and_centre_surround():
    """First derivatives of a Gaussian span all their rotations; the Laplacian is SciPy's."""
    gx, gy = bank("gaussian_derivatives", 11, 3)[1:]
    diagonal = torch.rot90(gx, 2) * -1
    assert torch.allclose(diagonal, gx, atol=1e-6) and torch.allclose(gx.T.abs(), gy.abs(), atol=1e-6)
    point = np.zeros((31, 31))
    point[15, 15] = 1
    expected = torch.from_numpy(gaussian_laplace(point, 11 / 5, truncate=5)[10:21, 10:21]).float()
    assert torch.allclose(bank("log", 11, 1)[0], expected / expected.norm(), atol=1e-5)
    rings = bank("schmid", 9, 13)
    assert torch.allclose(rings, rings.mT) and rings.sum((1, 2)).abs().max() < 1e-4


@pytest.mark.parametrize(("size", "count"), [(3, 2), (5, 4), (7, 9), (9, 13), (49, 13)])
def test_schmid_has_no_rings_that_others_add_up_to(size, count):
    assert torch.linalg.matrix_rank(bank("schmid", size, count).flatten(1), rtol=1e-5) == count
    with pytest.raises(BadInput, match=f"has {count} filters"):
        bank("schmid", size, count + 1)


def test_start_from_a_bank():
    conv = start_from_bank(nn.Conv2d(3, 9, 3), "dct")
    for filters, atom in zip(conv.weight.detach(), bank("dct", 3, 9)):
        assert torch.linalg.matrix_rank(filters.flatten(1)) == 1 and float((filters * atom).sum((1, 2)).norm()) > 1.4
    assert float(conv.weight.detach().flatten(1).norm(dim=1).mean()) == pytest.approx(2**0.5, rel=1e-4)
    for wrong, match in ((lambda: bank("haar", 6, 2), "power of two"), (lambda: bank("dct", 3, 10), "has 9 filters")):
        with pytest.raises(BadInput, match=match):
            wrong()
    with pytest.raises(UnknownName, match="gabor"):
        bank("gabr", 5, 2)


# 3. filters learned without labels


@pytest.mark.parametrize("method", LEARNERS)
def test_learners_give_filters(method):
    found = learn_filters(images(), method, 12, 4, samples=1500)
    assert found.filters.shape == (12, 3, 4, 4) and found.filters.isfinite().all()
    assert torch.allclose(found.filters.flatten(1).norm(dim=1), torch.ones(12), atol=1e-4)
    again = learn_filters(images(), "kmeans", 12, 4, samples=1500, seed=1)
    assert found.encode(images(3)).shape == (3, 48) and not torch.equal(again.filters, found.filters)


def test_preprocessing_whitens():
    patches = contrast_normalised(sampled_patches(F.avg_pool2d(torch.rand(64, 3, 24, 24), 3, 1), (4, 4), 5000))
    assert patches.mean(1).abs().max() < 1e-5
    x = torch.tensor([[0.0, 10 / 255, 20 / 255, 10 / 255]])  # a variance of 50 on the scale of 255
    assert torch.allclose(contrast_normalised(x), torch.tensor([[-10.0, 0, 10, 0]]) / 60**0.5)
    exact = Whitening.zca(patches, epsilon=1e-7)(patches)
    spread = torch.linalg.eigvalsh(exact.T.cov(correction=0).double())
    assert spread[1:].sub(1).abs().max() < 0.05 and spread[0] < 0.05, "all but the mean, which is gone already"
    soft = Whitening.zca(patches, epsilon=0.1)
    values = torch.linalg.eigvalsh(patches.T.cov(correction=0).double())
    after = torch.linalg.eigvalsh(soft(patches).T.cov(correction=0).double())
    assert torch.allclose(after, values / (values + 0.1), atol=1e-3) and torch.allclose(
        soft.matrix, soft.matrix.T, atol=1e-5
    )


def test_pca_is_sklearns_and_hebbian_rules_find_it():
    basis = torch.linalg.qr(torch.randn(8, 8)).Q
    patches = (torch.randn(6000, 8) * torch.tensor([4.0, 2.5, 1.5, 0.4, 0.3, 0.2, 0.1, 0.1])) @ basis.T
    ours = pca(patches, 3)
    theirs = torch.from_numpy(PCA(3).fit(patches.numpy()).components_).float()
    assert torch.allclose(ours.abs(), theirs.abs(), atol=1e-5)
    assert (sanger(patches, 3) * ours).sum(1).abs().min() > 0.98
    assert (oja(patches, 2) @ ours[0]).abs().min() > 0.98, "each unit by itself finds the first component"


@pytest.mark.parametrize("whiten", [True, False])
def test_what_learners_get(monkeypatch, whiten):
    """Contrast-normalised patches, whitened with 0.1 added to the eigenvalues."""
    seen: list[Tensor] = []

    def learner(patches: Tensor, count: int, seed: int) -> Tensor:
        seen.append(patches)
        return random(patches, count, seed)

    monkeypatch.setitem(LEARNERS, "random", learner)
    x = F.avg_pool2d(torch.rand(64, 1, 24, 24), 3, 1)
    found = learn_filters(x, "random", 4, 4, samples=5000, **({} if whiten else {"whiten": False}))
    plain_ones = contrast_normalised(sampled_patches(x, (4, 4), 5000, 0))
    values = torch.linalg.eigvalsh(plain_ones.T.cov(correction=0).double())
    got = torch.linalg.eigvalsh(seen[0].T.cov(correction=0).double())
    assert torch.allclose(got, values / (values + 0.1) if whiten else values, atol=1e-3)
    assert (found.whitening is not None) == whiten
    assert torch.allclose(found.prepared(sampled_patches(x, (4, 4), 5000, 0)), seen[0], atol=1e-5)


def test_rica_finds_sparse_sources():
    """Behind a rotation, which reconstruction alone cannot undo."""
    sources = torch.distributions.Laplace(0.0, 0.5**0.5).sample((6000, 4)) * (torch.rand(6000, 4) < 0.3) / 0.3**0.5
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    found = rica(sources @ turn.T, 4, steps=1500)
    assert (found @ turn).abs().amax(1).min() > 0.95
    without = rica(sources @ turn.T, 4, sparsity=0.0, steps=1500)
    assert (without @ turn).abs().amax(1).min() < 0.95


def test_denoising_is_the_auto_encoder_under_noise():
    patches = torch.randn(500, 12) * 3
    assert torch.equal(denoising(patches, 4), autoencoder(patches, 4, noise=0.5 * float(patches.std())))
    assert not torch.allclose(denoising(patches, 4), autoencoder(patches, 4))


def test_competitive_step_by_hand():
    """One patch, over and over: the winner turns to it, the second away from it with 0.4 of the rate."""
    x = F.normalize(torch.randn(6), dim=0)
    start = random(x[None], 3)
    y = start @ x
    first, second, third = y.argsort(descending=True)
    g = torch.zeros(3)
    g[first], g[second] = 1.0, -0.4
    change = g[:, None] * (x - y[:, None] * start)
    expected = F.normalize(start + 0.05 * change / change.abs().max(), dim=1)
    found = competitive(x.expand(10, -1), 3, steps=1)
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(found[third], start[third])


@pytest.mark.parametrize("method", ["random", "kmeans", "rica", "autoencoder", "competitive"])
def test_learners_stay_on_the_patches_device(method):
    """Shown on the device without values: what is drawn on the processor follows the patches."""
    options = {"rica": {"steps": 1}, "autoencoder": {"steps": 1, "noise": 0.5}, "competitive": {"steps": 1}}
    patches = torch.empty(300, 12, device="meta")
    assert LEARNERS[method](patches, 4, **options.get(method, {})).device.type == "meta"


def test_pcanet_stays_on_the_images_device():
    net, x = PCANet((2, 3), 3), torch.empty(2, 3, 16, 16, device="meta")
    net.stages = [torch.empty(2, 3, 3, 3, device="meta"), torch.empty(3, 1, 3, 3, device="meta")]
    assert net.codes(x).device.type == net.transform(x).device.type == "meta"


def test_learners_take_half_precision():
    patches = torch.randn(300, 6).bfloat16()
    assert pca(patches, 2).dtype == torch.bfloat16


def test_kmeans_finds_directions():
    truth = torch.linalg.qr(torch.randn(10, 10)).Q[:4]
    patches = (3 + torch.rand(4000, 1)) * truth[torch.randint(4, (4000,))] + 0.1 * torch.randn(4000, 10)
    found = kmeans(patches, 12)
    assert (found @ truth.T).abs().amax(0).min() > 0.99
    used = (patches @ found.T).abs().argmax(1).unique()
    assert (found[used] @ truth.T).abs().amax(1).min() > 0.95


def test_triangle_code_by_hand():
    found, x = learn_filters(images(), "kmeans", 6, 4, samples=800), images(2)
    maps = found.triangle(x, stride=3)
    assert maps.shape == (2, 6, 5, 5)
    patch = found.prepared(x[1, :, 6:10, 9:13].flatten())
    z = (patch - found.filters.flatten(1)).norm(dim=1)
    assert torch.allclose(maps[1, :, 2, 3], (z.mean() - z).clamp(min=0), atol=1e-4)
    summed = quadrants(maps)
    assert torch.allclose(summed.view(2, 4, 6).sum(1), maps.sum((2, 3)), atol=1e-4)
    assert torch.allclose(summed[:, :6], maps[:, :, :3, :3].sum((2, 3)), atol=1e-5)
    assert torch.allclose(found.encode(x, 3, batch_size=1), summed, atol=1e-4)


def test_pcanet_codes_and_histograms():
    net, x = PCANet((3, 4), 5, block=4, overlap=0.5), images(12)
    with pytest.raises(BadInput, match="fit"):
        net.codes(x)
    net.fit(x)
    codes = net.codes(x)
    assert codes.shape == (12, 3, 16, 16) and int(codes.min()) >= 0 and 7 < int(codes.max()) <= 15
    features = net.transform(x, batch_size=5).view(12, 3, 49, 16)
    assert torch.equal(features.sum(3), torch.full((12, 3, 49), 16.0))
    assert torch.equal(features[2, 1, 8], torch.bincount(codes[2, 1, 2:6, 2:6].flatten(), minlength=16).float())


def test_pcanet_learns_from_patches_without_their_means():
    net = PCANet((3, 4), 3).fit(images() + 0.5)
    assert all(filters.sum((1, 2, 3)).abs().max() < 1e-3 for filters in net.stages)


@pytest.mark.parametrize(("block", "overlap", "blocks"), [(7, 0.0, 9), (7, 0.5, 25), (8, 0.5, 16), (20, 0.0, 1)])
def test_pcanet_counts_every_pixel(block, overlap, blocks):
    net = PCANet((2, 2), 3, block=block, overlap=overlap).fit(images(4, 20))
    x = images(2, 20)
    features = net.transform(x).view(2, 2, -1, 4)
    assert features.shape[2] == blocks and torch.equal(features.sum(3), torch.full((2, 2, blocks), float(block**2)))
    last = net.codes(x)[1, 0, -block:, -block:]
    assert torch.equal(features[1, 0, -1], torch.bincount(last.flatten(), minlength=4).float())
    with pytest.raises(BadInput, match="no block of 21"):
        PCANet((2, 2), 3, block=21).fit(images(4, 20)).transform(x)


def test_pcanet_bits_by_hand():
    """Any filters, on patches without their means; the first filter of stage 2 is the highest bit."""
    net, x = PCANet((2, 3), 3), images(2)
    net.stages = [torch.rand(2, 3, 3, 3), torch.rand(3, 1, 3, 3)]

    def without_mean(maps: Tensor, filters: Tensor) -> Tensor:
        patches = F.unfold(maps, 3, padding=1)
        return (filters.flatten(1) @ (patches - patches.mean(1, keepdim=True))).unflatten(2, maps.shape[2:])

    first = without_mean(x, net.stages[0])
    second = without_mean(first[:, 1:], net.stages[1])
    sure = (second.abs() > 1e-4).all(1)
    expected = (second > 0).float().mul(torch.tensor([4.0, 2, 1])[:, None, None]).sum(1).long()
    assert torch.equal(net.codes(x)[:, 1][sure], expected[sure]) and sure.float().mean() > 0.5 and expected[sure].any()


def test_learners_complain():
    with pytest.raises(UnknownName, match="kmeans"):
        learn_filters(images(), "kmean")
    with pytest.raises(BadInput, match="no patches of 20x20"):
        learn_filters(images(), "kmeans", kernel_size=20)
    with pytest.raises(BadInput, match="has no 50 filters"):
        learn_filters(images(), "pca", 50, 4, samples=500)


# 4. size, shape and number


def test_receptive_field_by_the_recursion_and_by_gradient():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 5, 2, 2), nn.ReLU(), nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, dilation=2, padding=2),
    )  # fmt: skip
    fields = receptive_fields(net)
    assert fields["0"].size == (5, 5) and fields["2"].size == (9, 5) and fields["3"].size == (11, 7)
    assert receptive_field(net).size == (27, 23) == seen_pixels(net, (64, 64)) and receptive_field(net).stride == (4, 4)
    assert receptive_field(opsin.create("resnet18")).size == (435, 435)
    assert receptive_field(nn.Conv2d(3, 3, 7)).size == (7, 7)
    with pytest.raises(BadInput, match="no convolutions"):
        receptive_field(nn.Sequential(nn.ReLU()))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 3, 5, padding=2), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x) + self.narrow(x))


def test_the_wider_branch_counts():
    assert receptive_field(Branches()).size == (7, 7) == seen_pixels(Branches(), (16, 16))


def test_fields_of_other_windows():
    """Classes made of torch's count as those do, and slices with steps thin the map."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), DepthwiseConv(4, 5), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))
    assert receptive_fields(net)["1"].size == (11, 11) and receptive_field(net) == ((13, 13), (4, 4))
    assert receptive_field(opsin.create("mobilenetv2_050")).size == (491, 491)
    assert receptive_field(opsin.create("metanet_n")).size == (122, 122)

    class Thinned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)[:, :, ::2, ::3])

    assert receptive_field(Thinned()) == ((7, 9), (2, 3))
    assert seen_pixels(Thinned(), (24, 24)) == (7, 9)


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.function(x))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (nn.Upsample(scale_factor=2), "Upsample"), (nn.ConvTranspose2d(4, 4, 2, 2), "ConvTranspose2d"),
        (nn.PixelShuffle(2), "PixelShuffle"), (nn.AdaptiveAvgPool2d(7), "AdaptiveAvgPool2d"),
        (SubPixelConv2d(4, 4, 3, 2), "SubPixelConv2d"), (nn.LPPool2d(2, 2), "LPPool2d"),
        (Function(lambda x: F.max_pool2d(x, 2)), "max_pool2d"), (Function(lambda x: F.avg_pool2d(x, 2)), "avg_pool2d"),
        (Function(lambda x: F.interpolate(x, scale_factor=2)), "interpolate"),
        (Function(lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3))), "conv2d"), (Function(lambda x: x.roll(1, 2)), "roll"),
        (Function(lambda x: F.adaptive_avg_pool2d(x, 2)), "adaptive_avg_pool2d"),
    ],
)  # fmt: skip
def test_no_field_where_the_rule_does_not_know_it(part, name):
    with pytest.raises(BadInput, match=f"{name} at .*seen_pixels"):
        receptive_field(nn.Sequential(nn.Conv2d(3, 4, 3), part))


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(training):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)).train(training)
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert seen_pixels(net, (32, 32)) == (5, 5) and seen_pixels(net.train(), (32, 32)) == (5, 5)
    assert net.training and net[1].training
    assert conv_macs(net, (1, 1), 3) == 9 * (3 * 4 + 4 * 4)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and net[1].training


@pytest.mark.parametrize(("kernel", "stride"), [(5, 1), (5, 2), (7, 1), (7, 3)])
def test_substitutions_see_as_much(kernel, stride):
    conv = nn.Conv2d(6, 8, kernel, stride, kernel // 2)
    x = torch.randn(2, 6, 17, 14)
    for name, other in substitutions(conv, (17, 14)).items():
        assert other.module(x).shape == conv(x).shape, name
        assert receptive_field(other.module) == receptive_field(conv), name
        count = sum(p.numel() for p in other.module.parameters())
        assert other.parameter_ratio == pytest.approx(count / sum(p.numel() for p in conv.parameters()))


def test_ratios_by_hand():
    found = substitutions(nn.Conv2d(10, 10, 5, padding=2, bias=False))
    ratios = {name: round(other.parameter_ratio, 6) for name, other in found.items()}
    assert ratios == {"stacked_3x3": 0.72, "separated": 0.4, "dilated_3x3": 0.36, "depthwise_separable": 0.14}
    assert all(other.mac_ratio == pytest.approx(other.parameter_ratio) for other in found.values())
    with pytest.raises(BadInput, match="odd square kernels"):
        substitutions(nn.Conv2d(4, 4, 4, padding=2))


def test_widths():
    assert [scaled_width(32, m) for m in (1.0, 0.75, 0.35, 0.1)] == [32, 24, 16, 8]
    width = equal_width(lambda w: nn.Conv2d(w, w, 3, bias=False), 9 * 50**2 + 5)
    assert width == 50
    with pytest.raises(BadInput, match="more than 3 parameters"):
        equal_width(lambda w: nn.Conv2d(w, w, 3), 3)


# 5. diagnostics


def test_measures_of_filters():
    wave = torch.cos(torch.pi / 2 * torch.arange(4.0))[None, None, None].expand(1, 1, 4, 4)
    assert spectral_entropy(wave) < 0.3 and spectral_entropy(torch.eye(16).view(16, 1, 4, 4)) == pytest.approx(1)
    weight = torch.zeros(4, 1, 1, 2)
    weight[:, 0, 0] = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [1, 1]])
    assert sparsity(weight) == 3 / 8 and duplicate_rate(weight) == 1 / 4
    assert effective_rank(torch.eye(5)) == pytest.approx(5) and effective_rank(torch.ones(5, 7)) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 3)) == 0


def test_diagnose_finds_what_is_broken_and_changes_nothing():
    model, batch = initialise(plain(3, 16, norm=False), "he_normal"), torch.randn(8, 3, 10, 10)
    with torch.no_grad():
        model[2].bias[:4] = -100.0
        model[2].weight[7] = model[2].weight[5]
    reports = diagnose(model, batch, torch.zeros(8, dtype=torch.long))
    assert [r.name for r in reports] == ["0", "2", "4", "8"] and reports[1].dead == 0.25
    assert reports[1].duplicate_rate == 1 / 16 and reports[0].shape == (16, 3, 3, 3)
    assert reports[0].activation == pytest.approx(float(model[0](batch).detach().std()), rel=1e-5)
    y = model[0](batch).detach().requires_grad_()
    F.cross_entropy(model[1:](y), torch.zeros(8, dtype=torch.long)).backward()
    assert reports[0].gradient == pytest.approx(float(y.grad.std()), rel=1e-4)
    lines = table(reports).splitlines()
    assert len(lines) == 5 and lines[0].split()[:3] == ["name", "shape", "activation"]
    normed = plain(2, norm=True)
    before = {name: value.clone() for name, value in normed.state_dict().items()}
    diagnose(normed, batch)
    assert all(torch.equal(before[name], value) for name, value in normed.state_dict().items())
    assert all(p.grad is None for p in normed.parameters())
    with pytest.raises(BadInput, match="no convolutions"):
        diagnose(nn.ReLU(), batch)


def activated(inplace: bool) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace),
        nn.Conv2d(8, 4, 3), nn.LeakyReLU(0.1, inplace),
    )  # fmt: skip


def test_diagnose_sees_outputs_before_they_are_changed_in_place():
    batch = torch.randn(4, 3, 12, 12)
    for found, expected in zip(diagnose(activated(True), batch), diagnose(activated(False), batch), strict=True):
        assert found[:1] == expected[:1] and found[2:] == pytest.approx(expected[2:])
        assert found.gradient > 0


def test_dead_channels_are_those_behind_the_norm():
    model, batch = activated(True), torch.randn(4, 3, 12, 12).abs()
    with torch.no_grad():
        model[2].weight.abs_().neg_()  # all below 0, which the norm undoes
        model[3].bias[:2] = -50.0
    assert diagnose(model, batch)[1].dead == 0.25
    alone = nn.Sequential(model[2], nn.ReLU())
    assert diagnose(alone, torch.rand(2, 8, 6, 6))[0].dead == 1


def test_the_toolbox_by_name():
    design = opsin.create("filter_design")
    assert design.registries["banks"] == tuple(BANKS) and design.registries["initialisers"] == INITIALISERS
    assert design.initialise(plain(), "zero")[0].weight.any().logical_not()
    assert isinstance(design.pcanet(), PCANet) and design.receptive_field(nn.Conv2d(1, 1, 3)).size == (3, 3)
