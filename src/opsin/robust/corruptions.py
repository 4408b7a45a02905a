"""The nineteen corruptions of ImageNet-C, each in five severities.

Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
arXiv:1903.12261: fifteen types and four for validation, with the published strengths (made for images of 224 pixels).
Two differ from the release, which has files for them: frost is grown from noise instead of photographs, and JPEG is the
codec of the machine's Pillow.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from kornia.color import hsv_to_rgb, rgb_to_hsv
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from torch import Tensor
from torch.nn import functional as F

from opsin.data.degrade import Blur, Jpeg
from opsin.errors import BadInput, UnknownName

Image = Float[Tensor, "c h w"]


def gaussian_noise(x: Image, s: int) -> Image:
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[s] * torch.randn_like(x)


def shot_noise(x: Image, s: int) -> Image:
    rate = (60, 25, 12, 5, 3)[s]
    return torch.poisson(x.clamp(0, 1) * rate) / rate


def impulse_noise(x: Image, s: int) -> Image:
    u = torch.rand_like(x)
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[s]
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))


def speckle_noise(x: Image, s: int) -> Image:
    return x + x * (0.15, 0.2, 0.35, 0.45, 0.6)[s] * torch.randn_like(x)


def gaussian_blur(x: Image, s: int) -> Image:
    return Blur((1.0, 2.0, 3.0, 4.0, 6.0)[s])(x)


def convolve(x: Image, kernel: Float[Tensor, "k k"]) -> Image:
    """Every channel with one kernel, borders reflected."""
    pad = kernel.shape[0] // 2
    mode = "reflect" if pad < min(x.shape[1:]) else "replicate"
    padded = F.pad(x[:, None], [pad] * 4, mode=mode)
    return F.conv2d(padded, kernel[None, None].to(x))[:, 0]


def defocus_blur(x: Image, s: int) -> Image:
    """A disc, softened at its rim."""
    radius, alias = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[s]
    side = torch.arange(-max(8, radius), max(8, radius) + 1)
    disc = (side[:, None] ** 2 + side**2 <= radius**2).float().numpy()
    soft = torch.from_numpy(gaussian_filter(disc, alias))
    return convolve(x, soft / soft.sum())


def glass_blur(x: Image, s: int) -> Image:
    """Pixels swapped with random neighbours, between two blurs."""
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[s]
    x = Blur(sigma)(x).clone()
    height, width = x.shape[1:]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    for _ in range(rounds):
        dy, dx = (torch.randint(-reach, reach, (height, width)) for _ in range(2))
        x = x[:, (rows + dy).clamp(0, height - 1), (columns + dx).clamp(0, width - 1)]
    return Blur(sigma)(x)


def streak(radius: int, sigma: float, angle: float) -> Float[Tensor, "k k"]:
    """A one-sided Gaussian line through the middle of a kernel."""
    kernel = torch.zeros(2 * radius + 1, 2 * radius + 1)
    t = torch.linspace(0, radius, 4 * radius + 1)
    y = (radius + t * np.sin(angle)).round().long()
    x = (radius + t * np.cos(angle)).round().long()
    kernel.index_put_((y, x), torch.exp(-(t**2) / (2 * sigma**2)), accumulate=True)
    return kernel / kernel.sum()


def motion_blur(x: Image, s: int) -> Image:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[s]
    return convolve(x, streak(radius, sigma, np.deg2rad(float(torch.empty(()).uniform_(-45, 45)))))


def zoomed(x: Image, factor: float) -> Image:
    """The middle of the image, enlarged to its size."""
    height, width = x.shape[1:]
    h, w = int(np.ceil(height / factor)), int(np.ceil(width / factor))
    top, left = (height - h) // 2, (width - w) // 2
    part = x[None, :, top : top + h, left : left + w]
    return F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)[0]


def zoom_blur(x: Image, s: int) -> Image:
    top, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[s]
    return torch.stack([x, *(zoomed(x, float(f)) for f in np.arange(1, top, step))]).mean(0)


def grey(x: Image) -> Float[Tensor, "1 h w"]:
    weights = x.new_tensor((0.299, 0.587, 0.114)) if len(x) == 3 else x.new_full((len(x),), 1 / len(x))
    return (weights[:, None, None] * x).sum(0, keepdim=True)


def snow(x: Image, s: int) -> Image:
    """Bright flakes with motion blur, over a whitened image."""
    mean, std, scale, threshold, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[s]  # fmt: skip
    flakes = zoomed(mean + std * torch.randn(1, *x.shape[1:]), scale)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = convolve(flakes, streak(radius, sigma, np.deg2rad(float(torch.empty(()).uniform_(-135, -45)))))
    white = torch.maximum(x, grey(x) * 1.5 + 0.5)
    return keep * x + (1 - keep) * white + flakes + flakes.flip(1, 2)


def plasma(side: int, decay: float) -> Float[np.ndarray, "s s"]:
    """Fractal noise in [0, 1] on a square of a power of two: octaves of smooth noise, each weaker by `decay`."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    total, weight, cells = np.zeros((side, side)), 1.0, 2
    while cells <= side:
        octave = zoom(rng.random((cells, cells)), side / cells, order=1, mode="grid-wrap", grid_mode=True)
        total += weight * octave
        weight, cells = weight / decay, cells * 2
    total -= total.min()
    return total / total.max()


def cloud(x: Image, decay: float) -> Float[Tensor, "h w"]:
    """Fractal noise of the image's size."""
    height, width = x.shape[1:]
    side = 1 << (max(height, width, 2) - 1).bit_length()
    return torch.from_numpy(plasma(side, decay)[:height, :width]).float()


def fog(x: Image, s: int) -> Image:
    amount, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[s]
    top = x.max()
    return (x + amount * cloud(x, decay)) * top / (top + amount)


def frost(x: Image, s: int) -> Image:
    """Ice crystals: the ridges of fractal noise, laid over the image."""
    keep, amount = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[s]
    ridges = 1 - (2 * cloud(x, 1.3) - 1).abs()
    return keep * x + amount * ridges**3


def spatter(x: Image, s: int) -> Image:
    """Drops of water at severities 1 to 3, of mud at 4 and 5."""
    mean, std, sigma, threshold, amount, mud = (
        (0.65, 0.3, 4, 0.69, 0.6, False), (0.65, 0.3, 3, 0.68, 0.6, False), (0.65, 0.3, 2, 0.68, 0.5, False),
        (0.65, 0.3, 1, 0.65, 1.5, True), (0.67, 0.4, 1, 0.65, 1.5, True),
    )[s]  # fmt: skip
    liquid = gaussian_filter((mean + std * torch.randn(x.shape[1:])).numpy(), sigma)
    mask = torch.from_numpy(np.where(liquid < threshold, 0, liquid)).float()
    if mud:
        mask = Blur(amount)((mask > threshold).float()[None])[0]
        colour = (63 / 255, 42 / 255, 20 / 255)
    else:
        mask = amount * mask / mask.max().clamp(min=1e-6)
        colour = (175 / 255, 238 / 255, 238 / 255)
    tint = x.new_tensor(colour if len(x) == 3 else (sum(colour) / 3,) * len(x))[:, None, None]
    mask = mask.clamp(0, 1)
    return x * (1 - mask) + tint * mask


def with_hsv(x: Image, change: Callable[[Tensor], Tensor]) -> Image:
    """A change of hue, saturation and value; grey images are taken as their own value."""
    rgb = x if len(x) == 3 else x[:1].expand(3, -1, -1)
    out = hsv_to_rgb(change(rgb_to_hsv(rgb.clamp(0, 1))))
    return out if len(x) == 3 else out[:1].expand_as(x)


def brightness(x: Image, s: int) -> Image:
    more = (0.1, 0.2, 0.3, 0.4, 0.5)[s]
    return with_hsv(x, lambda hsv: torch.cat((hsv[:2], (hsv[2:] + more).clamp(0, 1))))


def saturate(x: Image, s: int) -> Image:
    factor, shift = ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2))[s]
    return with_hsv(x, lambda hsv: torch.cat((hsv[:1], (hsv[1:2] * factor + shift).clamp(0, 1), hsv[2:])))


def contrast(x: Image, s: int) -> Image:
    mean = x.mean((1, 2), keepdim=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[s] + mean


def elastic_transform(x: Image, s: int) -> Image:
    """Smooth random displacement; strengths are shares of the image's side."""
    amount, sigma, shear = (
        (2.0, 0.7, 0.1), (2.0, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)
    )[s]  # fmt: skip
    height, width = x.shape[1:]
    side = min(height, width)
    corners = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.25, 0.25]], dtype=torch.float64).numpy() * side
    moved = corners + torch.empty(3, 2).uniform_(-shear * side, shear * side).double().numpy()
    affine = np.linalg.solve(np.c_[corners, np.ones(3)], moved)
    y, z = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    place = np.stack([y, z, np.ones_like(y)], -1) @ affine
    for axis in (0, 1):
        noise = gaussian_filter(torch.empty(height, width).uniform_(-1, 1).numpy(), sigma * side, truncate=3)
        place[..., axis] += amount * side * noise
    grid = [place[..., 0], place[..., 1]]
    return torch.stack([torch.from_numpy(map_coordinates(c.numpy(), grid, order=1, mode="reflect")) for c in x]).float()


def pixelate(x: Image, s: int) -> Image:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[s]
    small = [max(1, int(side * share)) for side in x.shape[1:]]
    return F.interpolate(F.interpolate(x[None], size=small, mode="area"), size=x.shape[1:], mode="nearest")[0]


def jpeg_compression(x: Image, s: int) -> Image:
    return Jpeg((25, 18, 15, 10, 7)[s])(x)


NOISE = (gaussian_noise, shot_noise, impulse_noise)
BLUR = (defocus_blur, glass_blur, motion_blur, zoom_blur)
WEATHER = (snow, frost, fog, brightness)
DIGITAL = (contrast, elastic_transform, pixelate, jpeg_compression)
VALIDATION = (speckle_noise, gaussian_blur, spatter, saturate)
CORRUPTIONS = {f.__name__: f for f in (*NOISE, *BLUR, *WEATHER, *DIGITAL, *VALIDATION)}


class Corrupt:
    """One corruption of ImageNet-C on a batch; random numbers come from torch's generator.

    Args: name, a key of CORRUPTIONS; severity 1 to 5. Raises UnknownName, BadInput.
    """

    def __init__(self, name: str = "gaussian_noise", severity: int = 5):
        if name not in CORRUPTIONS:
            raise UnknownName("corruption", name, CORRUPTIONS)
        if severity not in range(1, 6):
            raise BadInput(f"the severity of a corruption is 1 to 5, not {severity}")
        self.name, self.severity = name, severity

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        corrupt = CORRUPTIONS[self.name]
        out = torch.stack([corrupt(image.cpu(), self.severity - 1) for image in images])
        return out.clamp(0, 1).to(images)
