"""The fully connected CRF: the lattice, the definition, the C++ reference's figures, and what it is for."""

import time

import pytest
import torch
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.tasks.crf import DenseCRF, ExactGaussian, GridGaussian, Normalised, bilateral_features
from opsin.tasks.permutohedral import Permutohedral, enclosing_simplex


def photo(height: int, width: int) -> torch.Tensor:
    """A photograph, (3, height, width) in [0, 1]."""
    from skimage import data

    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None] / 255
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]


def noisy_halves(height: int, width: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Coarse logits of a photo, up-sampled."""
    coarse = 2 * torch.randn(1, classes, height // 4, width // 4)
    return F.interpolate(coarse, (height, width), mode="bilinear")[0], photo(height, width)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_corners_enclose_their_feature(d):
    """Shares are positive and sum to one; corners are lattice points; the weighted corners are the lifted feature."""
    from opsin.tasks.permutohedral import _lift

    features = 3 * torch.randn(200, d, dtype=torch.double)
    corners, shares = enclosing_simplex(features)
    assert (shares > -1e-9).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(200, dtype=torch.double))
    last = -corners.sum(-1, keepdim=True)
    whole = torch.cat((corners, last), -1)
    assert ((whole % (d + 1)) == torch.arange(d + 1)[:, None]).all(), "corner k has remainder k"
    torch.testing.assert_close((whole.double() * shares[..., None]).sum(1), _lift(features))


@pytest.mark.parametrize(("d", "tolerance"), [(1, 0.15), (2, 0.15), (3, 0.19), (5, 0.36)])
def test_the_lattice_approximates_the_gaussian(d, tolerance):
    """Normalised, as the CRF uses it, on values without a mean: measured are 11, 11, 15 and 29 % of relative error."""
    features, values = torch.rand(2500, d) * 6, torch.rand(2500, 3)
    values -= values.mean(0)
    ones = torch.ones(2500, 1)
    ours, exact = (Normalised(kind(features), ones)(values) for kind in (Permutohedral, ExactGaussian))
    assert (ours - exact).norm() / exact.norm() < tolerance


def test_the_lattice_is_linear_and_symmetric():
    lattice = Permutohedral(torch.randn(300, 3))
    a, b = torch.randn(300, 1), torch.randn(300, 1)
    torch.testing.assert_close(lattice(a + 2 * b), lattice(a) + 2 * lattice(b), atol=1e-4, rtol=1e-4)
    forward, backward = (a * lattice(b)).sum(), (b * lattice(a)).sum()
    assert abs(float(forward - backward)) < 0.02 * float(lattice(a).norm() * b.norm())


def test_the_lattice_reports_features_that_are_too_wide():
    with pytest.raises(BadInput, match="larger sigmas"):
        Permutohedral(torch.randn(10, 5) * 1e6)


def test_the_grid_kernel_is_exact():
    places = torch.stack(torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")).flatten(1).T
    values = torch.randn(63, 4)
    torch.testing.assert_close(GridGaussian(7, 9, 2.5, values)(values), ExactGaussian(places / 2.5)(values))


def test_kernels_are_normalised_symmetrically():
    features = bilateral_features(255 * photo(9, 10), 5.0, 20.0)
    matrix = Normalised(ExactGaussian(features), torch.ones(90, 1))(torch.eye(90))
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).max().item() == pytest.approx(1, abs=1e-4)
    assert (matrix.diag() > 0).all(), "the pixel itself is included"


def test_one_iteration_is_the_formula():
    logits, image = noisy_halves(8, 12)
    crf = DenseCRF(w_a=2.0, s_a=6.0, s_b=25.0, w_g=1.5, s_g=1.2, iterations=1, bilateral=ExactGaussian)
    features = bilateral_features((255 * image).round(), 6.0, 25.0)
    q = logits.softmax(0).flatten(1).T
    energy = -q.log()
    for weight, f in ((2.0, features), (1.5, features[:, :2] * 6.0 / 1.2)):
        kernel = (-(torch.cdist(f, f) ** 2) / 2).exp()
        degree = kernel.sum(1)
        energy -= weight * (kernel / (degree[:, None] * degree).sqrt()) @ q
    torch.testing.assert_close(crf(logits, image).flatten(1).T, (-energy).softmax(1), atol=1e-5, rtol=1e-4)


def test_the_lattice_crf_agrees_with_the_definition():
    """As far as the C++ reference does: here 97.5 and 98.5 % of its labels are those of the exact kernel, its marginals
    0.010 and 0.005 apart on average; ours 97.2 and 98.1 %, 0.011 and 0.006."""
    logits, image = noisy_halves(36, 48, classes=5)
    for options in (dict(), dict(s_a=40.0, s_b=10.0, s_g=3.0)):
        fast = DenseCRF(**options)(logits, image)
        exact = DenseCRF(**options, bilateral=ExactGaussian)(logits, image)
        assert (fast.argmax(0) == exact.argmax(0)).float().mean() > 0.96
        assert (fast - exact).abs().mean() < 0.015
        torch.testing.assert_close(fast.sum(0), torch.ones(36, 48))


# Marginals of the first two of three classes after ten iterations of pydensecrf 1.0 (DenseCRF2D, appearance kernel
# only, sxy=5, srgb=20, compat=4) on the 6 x 7 image of `formula_image`.
PYDENSECRF = (
    ((0.0445, 0.5639, 0.9033, 0.8279, 0.0108, 0.0015, 0.0021),
     (0.2159, 0.6654, 0.7089, 0.3367, 0.0018, 0.0004, 0.0014),
     (0.7121, 0.7047, 0.3277, 0.0492, 0.0010, 0.0005, 0.0039),
     (0.9541, 0.7304, 0.0570, 0.0045, 0.0015, 0.0025, 0.0162),
     (0.9827, 0.7304, 0.0196, 0.0016, 0.0024, 0.0073, 0.0502),
     (0.9762, 0.6613, 0.0177, 0.0021, 0.0041, 0.0138, 0.0812)),
    ((0.9416, 0.4140, 0.0712, 0.0507, 0.0067, 0.0017, 0.0036),
     (0.7507, 0.3137, 0.2466, 0.3586, 0.0033, 0.0004, 0.0006),
     (0.2606, 0.2807, 0.6356, 0.8146, 0.0060, 0.0006, 0.0006),
     (0.0391, 0.2590, 0.9313, 0.9691, 0.0216, 0.0035, 0.0014),
     (0.0116, 0.2494, 0.9696, 0.9823, 0.0623, 0.0126, 0.0040),
     (0.0069, 0.2350, 0.9259, 0.9489, 0.1104, 0.0271, 0.0097)),
)  # fmt: skip


def formula_image() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, 6, 7) and an image of whole grey levels."""
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    right = (x > 3).float()
    colours = torch.stack(((17 * x + 5 * y) % 256, (40 * right + 90 + 3 * y) % 256, (11 * y + 29 * right) % 256))
    scores = ((0.9 * x + 0.4 * y).sin(), (0.7 * x - 0.5 * y).cos(), 0.3 * (1.3 * y).sin() + 0.1 * x)
    return 2 * torch.stack(scores), colours / 255


def test_parity_with_pydensecrf():
    q = DenseCRF(w_a=4.0, s_a=5.0, s_b=20.0, w_g=0.0)(*formula_image())
    torch.testing.assert_close(q[:2], torch.tensor(PYDENSECRF), atol=1e-4, rtol=0)


def test_it_finds_the_edge_that_the_logits_blur():
    image = torch.full((3, 32, 48), 0.2)
    image[:, :, 21:] = 0.7
    truth = (image[0] > 0.5).long()
    position = (torch.arange(48.0) - 24).div(6).expand(32, 48)  # says that the edge is at 24, softly
    logits = torch.stack((-position, position))
    before = (logits.argmax(0) == truth).float().mean()
    after = (DenseCRF()(logits, image).argmax(0) == truth).float().mean()
    assert before < 0.95 and after == 1
    torch.testing.assert_close(DenseCRF(iterations=0)(logits, image), logits.softmax(0))


def test_a_flat_image_smooths_and_a_lone_pixel_gives_in():
    logits = torch.zeros(2, 20, 20)
    logits[0] = 1.0
    logits[:, 10, 10] = torch.tensor([0.0, 0.5])
    assert (DenseCRF()(logits, torch.full((3, 20, 20), 0.5)).argmax(0) == 0).all()


@pytest.mark.parametrize("shape", [(3, 20, 21), (1, 20, 20)])
def test_shapes_that_do_not_go_together(shape):
    with pytest.raises(BadInput, match="up-sample"):
        DenseCRF()(torch.zeros(2, 20, 20), torch.zeros(shape))


def test_a_large_image_takes_seconds():
    """480 x 360, 11 classes, 10 iterations: 2.6 s on one core of the machine it was written on."""
    coarse = 3 * torch.randn(1, 11, 45, 60)
    logits, image = F.interpolate(coarse, (360, 480), mode="bilinear")[0], photo(360, 480)
    started = time.process_time()
    DenseCRF()(logits, image)
    assert time.process_time() - started < 30
