"""Quality of restored images as super-resolution papers report it: PSNR and SSIM on luminance, without the border.

The convention (MATLAB's, from Yang and Timofte on): images are 8-bit files, so both are clamped and rounded to 255
levels; luminance is BT.601 with the range 16 to 235 of 255; as many border pixels as the scale are left out; the figure
of a data set is the mean of its images' figures. SSIM is Wang's: Gaussian window 11x11, sigma 1.5, no padding.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from opsin.errors import BadInput

# BT.601: rows are Y, Cb, Cr; the input is R, G, B in [0, 1], the output is in 255ths
YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
OFFSET = (16.0, 128.0, 128.0)
RGB = np.linalg.inv(np.array(YCBCR) / 255).tolist()


def rgb_to_ycbcr(image: Float[Tensor, "*n 3 h w"]) -> Float[Tensor, "*n 3 h w"]:
    """BT.601 in studio range: RGB in [0, 1] to Y in [16, 235]/255 and Cb, Cr in [16, 240]/255."""
    matrix, offset = _bt601(image)
    return torch.einsum("ij,...jhw->...ihw", matrix, image) + offset


def ycbcr_to_rgb(image: Float[Tensor, "*n 3 h w"]) -> Float[Tensor, "*n 3 h w"]:
    """The inverse of `rgb_to_ycbcr`; not clamped."""
    _, offset = _bt601(image)
    return torch.einsum("ij,...jhw->...ihw", image.new_tensor(RGB), image - offset)


def luminance(image: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n 1 h w"]:
    """BT.601 studio-range Y of an RGB image; a one-channel image is taken as luminance already."""
    if image.shape[-3] == 1:
        return image
    weights = image.new_tensor(YCBCR[0]) / 255
    return (image * weights[:, None, None]).sum(-3, keepdim=True) + OFFSET[0] / 255


def _bt601(image: Tensor) -> tuple[Tensor, Tensor]:
    return image.new_tensor(YCBCR) / 255, (image.new_tensor(OFFSET) / 255)[:, None, None]


def psnr_y(
    restored: Float[Tensor, "n c h w"], clean: Float[Tensor, "n c h w"], border: int = 0, *, levels: int | None = 255
) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each image in dB, on Y, `border` pixels cropped; infinite where they are equal.

    levels: both are rounded to that many steps first, as their files are; None leaves them.
    """
    restored, clean = _comparable(restored, clean, border, levels)
    error = (restored - clean).square().mean((1, 2, 3))
    return (-10 * error.log10()).float()


def ssim_y(
    restored: Float[Tensor, "n c h w"], clean: Float[Tensor, "n c h w"], border: int = 0, *, levels: int | None = 255
) -> Float[Tensor, " n"]:
    """Structural similarity of each image, on Y, `border` pixels cropped. Raises BadInput below 11x11 pixels."""
    restored, clean = _comparable(restored, clean, border, levels)
    if min(restored.shape[-2:]) < 11:
        raise BadInput(f"SSIM needs 11x11 pixels within the border, not {restored.shape[-2]}x{restored.shape[-1]}")
    _, ssim = structural_similarity_index_measure(
        restored, clean, gaussian_kernel=True, sigma=1.5, kernel_size=11, data_range=1.0, return_full_image=True
    )
    return ssim[..., 5:-5, 5:-5].mean((1, 2, 3)).float()


def _comparable(restored: Tensor, clean: Tensor, border: int, levels: int | None) -> tuple[Tensor, Tensor]:
    if restored.shape != clean.shape:
        raise BadInput(f"images of {tuple(restored.shape)} and {tuple(clean.shape)} cannot be compared")
    restored, clean = (image.double().clamp(0, 1) for image in (restored, clean))
    if levels is not None:
        restored, clean = ((image * levels).round() / levels for image in (restored, clean))
    h, w = clean.shape[-2:]
    if h <= 2 * border or w <= 2 * border:
        raise BadInput(f"an image of {h}x{w} has nothing within a border of {border}")
    crop = (..., slice(border, h - border), slice(border, w - border))
    return luminance(restored)[crop], luminance(clean)[crop]


class _MeanOverImages(Metric):
    """The mean over all images of a figure per image. border: pixels cropped at each side (the scale, in papers)."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, border: int = 0, *, levels: int | None = 255, **options: Any):
        super().__init__(**options)
        self.border, self.levels = border, levels
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def figure(self, restored: Tensor, clean: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no figure")

    def update(self, restored: Float[Tensor, "n c h w"], clean: Float[Tensor, "n c h w"]) -> None:
        values = self.figure(restored, clean)
        self.total += values.sum()
        self.images += len(values)

    def compute(self) -> Tensor:
        return (self.total / self.images).float()


class PsnrY(_MeanOverImages):
    """Mean PSNR on Y in dB."""

    def figure(self, restored: Tensor, clean: Tensor) -> Tensor:
        return psnr_y(restored, clean, self.border, levels=self.levels)


class SsimY(_MeanOverImages):
    """Mean SSIM on Y."""

    plot_upper_bound = 1.0

    def figure(self, restored: Tensor, clean: Tensor) -> Tensor:
        return ssim_y(restored, clean, self.border, levels=self.levels)
