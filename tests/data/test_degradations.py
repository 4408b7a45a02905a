"""Each degradation does what its formula says: to the letter where exact, in its statistics where random."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import opsin.data
from opsin.data import degrade
from opsin.data.degrade import DEGRADATIONS, Degraded, degradation
from opsin.errors import BadInput, UnknownName


@pytest.fixture
def photo() -> torch.Tensor:
    """Smooth, colourful, with edges, inside [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 60), indexing="ij")
    return torch.stack([((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float(), x, y])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", list(DEGRADATIONS))
@pytest.mark.parametrize("channels", [1, 3])
def test_contract(name, channels, photo):
    """Shape by the scale, values in [0, 1], reproducible by the generator, input untouched."""
    image = photo[:channels].clone()
    worse = degradation(name)
    result = worse(image, seeded())
    assert result.shape == (channels, 48 // worse.scale, 60 // worse.scale)
    assert result.dtype == torch.float32 and torch.isfinite(result).all()
    assert torch.equal(image, photo[:channels])
    assert torch.equal(result, worse(image, seeded()))
    if name != "noise":
        assert result.min() >= 0 and result.max() <= 1
    if worse.scale == 1:
        assert result.sub(image).abs().max() > 0.01
    torch.manual_seed(1)
    once = worse(image)
    torch.manual_seed(1)
    assert torch.equal(once, worse(image))


@pytest.mark.parametrize("name", ["noise", "poisson", "motion", "haze", "rain", "dark"])
def test_random_ones_differ_between_seeds(name, photo):
    assert not torch.equal(degradation(name)(photo, seeded(0)), degradation(name)(photo, seeded(1)))


def test_bicubic_is_what_the_benchmarks_store(photo):
    low = degradation("bicubic:3")(photo)
    assert torch.equal(low, low.mul(255).round() / 255)
    assert low.sub(degrade.bicubic_resize(photo, scale=1 / 3).clamp(0, 1)).abs().max() <= 0.5001 / 255


def test_noise_has_its_sigma_and_is_not_clamped():
    noise = degradation("noise:25")(torch.zeros(3, 200, 200), seeded())
    assert noise.std() == pytest.approx(25 / 255, rel=0.01)
    assert noise.mean().abs() < 1e-3
    assert noise.min() < 0


def test_poisson_has_the_variance_of_photons():
    counts = degradation("poisson:50")(torch.full((1, 300, 300), 0.4), seeded()) * 50
    assert counts.mean() == pytest.approx(20, rel=0.01)
    assert counts.var() == pytest.approx(20, rel=0.03)
    assert torch.allclose(counts, counts.round(), atol=1e-4)


def test_jpeg_is_the_real_codec(photo):
    levels = photo.mul(255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", quality=30)
    expected = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255
    assert torch.equal(degradation("jpeg:30")(photo), expected)
    quality = [peak_signal_noise_ratio(photo.numpy(), degradation(f"jpeg:{q}")(photo).numpy()) for q in (10, 50, 95)]
    assert quality == sorted(quality)


def test_blur_is_a_gaussian_of_its_sigma():
    dot = torch.zeros(1, 41, 41)
    dot[0, 20, 20] = 1
    spread = degradation("blur:2.5")(dot)[0]
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    distance = torch.arange(41.0) - 20
    assert (spread.sum(0) * distance**2).sum().sqrt() == pytest.approx(2.5, rel=0.02)
    assert (spread.sum(1) * distance**2).sum().sqrt() == pytest.approx(2.5, rel=0.02)


def test_motion_smears_along_its_angle_only():
    dot = torch.zeros(1, 41, 41)
    dot[0, 20, 20] = 1
    along = degradation("motion:15:0")(dot)[0]
    assert along.sum() == pytest.approx(1, abs=1e-4)
    rows, columns = along.sum(1).gt(1e-3).sum(), along.sum(0).gt(1e-3).sum()
    assert {int(rows), int(columns)} == {1, 15}


def test_haze_follows_koschmieder(photo):
    haze = degrade.Haze(beta=1.2, airlight=0.8)
    depth = torch.rand(48, 60)
    transmission = torch.exp(-1.2 * depth)
    assert torch.allclose(haze.through(photo, depth), photo * transmission + 0.8 * (1 - transmission))
    assert torch.equal(haze.through(photo, torch.zeros(48, 60)), photo)
    contrast = haze(photo, seeded()).std(dim=(1, 2)) / photo.std(dim=(1, 2))
    assert contrast.max() < 0.9


def test_rain_only_adds_light_in_slanted_streaks(photo):
    wet = degradation("rain")(photo * 0.1, seeded())
    added = wet - photo * 0.1
    assert added.min() >= 0
    assert 0.005 < added.mean() < 0.3
    assert torch.allclose(added[0], added[1], atol=1e-6)  # white light
    across = added[0].diff(dim=1).abs().mean()
    assert added[0].diff(dim=0).abs().mean() < 0.7 * across  # longer than wide
    assert torch.equal(degrade.Rain(amount=0.0)(photo, seeded()), photo)


def test_dark_is_gamma_with_noise_of_its_variance():
    image = torch.full((1, 300, 300), 0.9)
    dark = degrade.Dark(gamma=2.0, gain=0.8, shot=0.002, read=0.01)(image, seeded())
    level = (0.8 * 0.9) ** 2
    assert dark.mean() == pytest.approx(level, rel=0.01)
    assert dark.std() == pytest.approx(math.sqrt(0.002 * level + 0.01**2), rel=0.02)


def test_chains_apply_in_turn(photo):
    both = degradation("blur:1.5+bicubic:2+jpeg:60")
    assert both.scale == 2
    steps = degradation("jpeg:60")(degradation("bicubic:2")(degradation("blur:1.5")(photo)))
    assert torch.equal(both(photo), steps)


@pytest.mark.parametrize(
    "text",
    ["noise:x", "noise:1:2:3", "noise:-5", "bicubic:2.5", "bicubic:0", "jpeg:0", "motion:4", "haze:1:2", "rain:2", ""],
)
def test_bad_descriptions(text):
    with pytest.raises((BadInput, UnknownName)) as error:
        degradation(text)
    assert "\n" not in str(error.value)


def test_unknown_degradation_suggests():
    with pytest.raises(UnknownName, match="bicubic"):
        degradation("bicubik:2")


class Photos:
    """A split of three sizes."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.rand(3, 20 + index, 31, generator=seeded(index)), 0


def test_degraded_split_is_a_function_of_epoch_and_index():
    split = Degraded(Photos(), degradation("noise:25"))
    first = [split[i][0] for i in range(3)]
    torch.manual_seed(99)
    assert all(torch.equal(split[i][0], first[i]) for i in (2, 0, 1))
    split.set_epoch(1)
    assert not torch.equal(split[0][0], first[0])
    split.set_epoch(0)
    assert torch.equal(split[0][0], first[0])


def test_degraded_split_cuts_to_a_multiple():
    low, clean = Degraded(Photos(), degradation("bicubic:3"))[2]
    assert clean.shape == (3, 21, 30) and low.shape == (3, 7, 10)


def test_photos_of_the_benchmark(opsin_data):
    data = opsin.data.open("set5", degrade="bicubic:2")
    assert (data.task, data.scale, list(data.splits), len(data.test)) == ("restore", 2, ["test"], 5)
    for low, clean in (data.test[i] for i in range(5)):
        assert clean.shape[-2:] == (low.shape[-2] * 2, low.shape[-1] * 2)
        up = degrade.bicubic_resize(low, scale=2).clamp(0, 1)
        assert 25 < peak_signal_noise_ratio(clean.numpy(), up.numpy()) < 45
