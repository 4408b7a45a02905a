"""Bicubic resampling agrees with Pillow and PyTorch within the stated tolerance, and with MATLAB at the borders."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from opsin.data.degrade import bicubic_resize
from opsin.data.resample import keys_kernel
from opsin.errors import BadInput

TOLERANCE = 1e-5
SIZES = [(21, 33), (32, 48), (126, 194), (16, 25), (40, 200), (63, 97), (1, 1)]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 3, 63, 97)


def by_pillow(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize(size[::-1], Image.Resampling.BICUBIC))
        for plane in image.flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).unflatten(0, image.shape[:2])


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_pillow(image, size):
    assert bicubic_resize(image, size=size, border="renormalise").sub(by_pillow(image, size)).abs().max() < TOLERANCE


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_torch(image, size):
    peer = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
    assert bicubic_resize(image, size=size, border="renormalise").sub(peer).abs().max() < TOLERANCE


@pytest.mark.parametrize("size", [(21, 33), (32, 48), (126, 194)])
def test_borders_matter_only_at_the_border(image, size):
    difference = bicubic_resize(image, size=size).sub(by_pillow(image, size)).abs()
    margin = 2 * max(1, size[0] // 63) + 2
    assert difference[..., margin:-margin, margin:-margin].max() < TOLERANCE
    assert difference.max() > 1e-3


def test_symmetric_border_is_mirroring_the_image_first():
    """The definition of MATLAB's convention: resizing the mirrored image gives the same in the middle."""
    image = torch.rand(3, 63, 99)
    mirrored = torch.cat([image.flip(-1), image, image.flip(-1)], -1)
    mirrored = torch.cat([mirrored.flip(-2), mirrored, mirrored.flip(-2)], -2)
    expected = bicubic_resize(mirrored, scale=1 / 3, border="renormalise")[..., 21:42, 33:66]
    assert bicubic_resize(image, scale=1 / 3).sub(expected).abs().max() < TOLERANCE


def test_kernel_is_keys_with_minus_a_half():
    x = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], dtype=torch.float64)
    assert torch.equal(keys_kernel(x), torch.tensor([1.0, 0.5625, 0.0, -0.0625, 0.0, 0.0], dtype=torch.float64))
    assert torch.equal(keys_kernel(-x), keys_kernel(x))


def test_constant_stays_and_a_ramp_goes_on_inside():
    assert bicubic_resize(torch.full((1, 17, 23), 0.3), scale=0.4).sub(0.3).abs().max() < 1e-6
    ramp = torch.arange(24.0)[None, None].expand(1, 24, 24)
    half = bicubic_resize(ramp, scale=0.5)
    assert torch.allclose(half[0, 6, 3:-3], torch.arange(24.0).reshape(12, 2).mean(1)[3:-3], atol=1e-4)


@pytest.mark.parametrize(("scale", "size"), [(1 / 3, (107, 161)), (0.5, (161, 241)), (2, (642, 962)), (1, (321, 481))])
def test_sizes_are_rounded_up(scale, size):
    assert bicubic_resize(torch.rand(1, 321, 481), scale=scale).shape[-2:] == size


def test_differentiable_and_linear(image):
    image = image.double()
    corner = image[0, :1, :6, :6].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bicubic_resize(x, scale=0.5), corner)
    other = torch.rand_like(image)
    together = bicubic_resize(2 * image + other, size=(7, 9))
    assert torch.allclose(together, 2 * bicubic_resize(image, size=(7, 9)) + bicubic_resize(other, size=(7, 9)))


def test_bad_arguments():
    for arguments in ({}, {"scale": 2, "size": (3, 3)}, {"size": (0, 3)}):
        with pytest.raises(BadInput):
            bicubic_resize(torch.rand(1, 4, 4), **arguments)
