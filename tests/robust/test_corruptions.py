"""ImageNet-C: every type at every severity, and what each is known by."""

import pytest
import torch

from opsin.errors import BadInput, UnknownName
from opsin.robust.corruptions import BLUR, CORRUPTIONS, NOISE, VALIDATION, Corrupt


def photo(channels: int = 3, height: int = 48, width: int = 56) -> torch.Tensor:
    torch.manual_seed(4)
    coarse = torch.rand(1, channels, 6, 7)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    smooth[..., 10:30, 20:40] = 0.9
    return smooth


def test_fifteen_types_and_four_for_validation():
    assert len(CORRUPTIONS) == 19 and len(VALIDATION) == 4


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_severity_changes_the_image_and_stays_in_range(name, channels):
    x = photo(channels)
    for severity in range(1, 6):
        torch.manual_seed(0)
        y = Corrupt(name, severity)(x)
        assert y.shape == x.shape and y.isfinite().all() and y.min() >= 0 and y.max() <= 1
        assert torch.equal(y, x) == (channels == 1 and name == "saturate"), "grey alone has no saturation to change"


@pytest.mark.parametrize(
    "name", [f.__name__ for f in NOISE] + ["contrast", "pixelate", "jpeg_compression", "gaussian_blur"]
)
def test_severity_five_is_worse_than_one(name):
    x, distance = photo(), []
    for severity in (1, 5):
        torch.manual_seed(0)
        distance.append(float((Corrupt(name, severity)(x) - x).square().mean()))
    assert distance[1] > 1.5 * distance[0]


@pytest.mark.parametrize("name", [f.__name__ for f in BLUR])
def test_blurs_keep_a_flat_image_and_smooth_an_edge(name):
    flat = torch.full((1, 3, 40, 40), 0.4)
    assert torch.allclose(Corrupt(name, 5)(flat), flat, atol=1e-4)
    x = photo()
    steps = [t.diff(dim=3).abs().max() for t in (x, Corrupt(name, 5)(x))]
    assert steps[1] < steps[0]


def test_gaussian_noise_has_the_published_deviation():
    flat = torch.full((1, 3, 100, 100), 0.5)
    noisy = Corrupt("gaussian_noise", 1)(flat)
    assert float((noisy - flat).std()) == pytest.approx(0.08, rel=0.05)


def test_contrast_keeps_the_mean_and_scales_the_rest():
    x = photo()
    y = Corrupt("contrast", 3)(x)
    assert torch.allclose(y.mean((2, 3)), x.mean((2, 3)), atol=1e-4)
    assert torch.allclose(y.std((2, 3)), 0.2 * x.std((2, 3)), atol=1e-4)


def test_the_same_seed_gives_the_same_image():
    for name in CORRUPTIONS:
        results = []
        for _ in range(2):
            torch.manual_seed(9)
            results.append(Corrupt(name, 4)(photo()))
        assert torch.equal(*results), name


def test_unknown_names_and_severities_are_named():
    with pytest.raises(UnknownName, match="fog"):
        Corrupt("frog")
    with pytest.raises(BadInput, match="1 to 5"):
        Corrupt("fog", 6)
