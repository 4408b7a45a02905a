"""Filters made by hand: `bank(name, kernel_size, count)` gives (count, k, k) of unit norm, the most basic ones first.

They serve fixed, fixed under learned 1 x 1 mixing (the operator `filter_bank`), or as a start (`start_from_bank`).
"""

from collections.abc import Callable, Iterator
from itertools import count as counting
from itertools import islice, takewhile

import numpy as np
import torch
from jaxtyping import Float
from scipy import fft, ndimage
from skimage.filters import gabor_kernel
from torch import Tensor, nn

from opsin.errors import BadInput, UnknownName

Kernel = Float[np.ndarray, "k k"]
SCHMID = ((2, 1), (4, 1), (4, 2), (6, 1), (6, 2), (6, 3), (8, 1), (8, 2), (8, 3), (10, 1), (10, 2), (10, 3), (10, 4))


def delta(size: int) -> Kernel:
    """One in the middle of a margin that keeps what is done to it off the border."""
    return np.pad(np.ones((1, 1)), size)


def middle(kernel: np.ndarray, size: int) -> Kernel:
    """The inner size x size taps, with zeros around where there are fewer."""
    rows, columns = (max(0, size - side + 1) // 2 + 1 for side in kernel.shape)
    kernel = np.pad(kernel, ((rows, rows), (columns, columns)))
    top, left = ((side - size) // 2 for side in kernel.shape)
    return kernel[top : top + size, left : left + size]


def gabor(size: int, angles: int = 4, aspect: float = 0.5) -> Iterator[Kernel]:
    """exp(-(x'^2 + aspect^2 y'^2) / (2 s^2)) cos(2 pi x' / l + phase), x' = x cos t + y sin t; even ones and odd ones.

    Octaves from the shortest wavelength l = 4 pixels on, with s = 0.56 l (one octave of bandwidth), `angles` each.
    """
    for wavelength in takewhile(lambda w: w <= 2 * size, (4.0 * 2**octave for octave in counting())):
        sigma = 0.56 * wavelength
        for phase in (0.0, np.pi / 2):
            for turn in range(angles):
                kernel = gabor_kernel(
                    1 / wavelength, np.pi * turn / angles, sigma_x=sigma, sigma_y=sigma / aspect, offset=phase,
                    n_stds=1 + size / sigma,
                )  # fmt: skip
                yield middle(kernel.real, size)


def gaussian_derivatives(size: int) -> Iterator[Kernel]:
    """d^(a + b) / dy^a dx^b of a Gaussian of size / 5 pixels, by order: each order spans all its rotations."""
    for order in range(size):
        for rows in range(order + 1):
            yield middle(ndimage.gaussian_filter(delta(size), size / 5, (rows, order - rows), truncate=5), size)


def half_octaves(widest: float) -> Iterator[float]:
    """Standard deviations from the widest down to what pixels can show."""
    return takewhile(lambda sigma: sigma >= 0.4, (widest / 2 ** (step / 2) for step in counting()))


def laplacian_of_gaussian(size: int) -> Iterator[Kernel]:
    """Centre-surround, from the widest (size / 5 pixels) to finer ones by half octaves."""
    for sigma in half_octaves(size / 5):
        yield middle(ndimage.gaussian_laplace(delta(size), sigma, truncate=5), size)


def difference_of_gaussians(size: int) -> Iterator[Kernel]:
    """The same as a Gaussian less one 1.6 times as wide."""
    for sigma in half_octaves(size / 8):
        inner, outer = (ndimage.gaussian_filter(delta(size), s, truncate=5) for s in (sigma, 1.6 * sigma))
        yield middle(inner - outer, size)


def schmid(size: int) -> Iterator[Kernel]:
    """Schmid's thirteen rings cos(pi tau r / sigma) exp(-r^2 / (2 sigma^2)) less their mean.

    Made for 49 pixels; in smaller kernels sigma shrinks in proportion, down to 0.4 pixels. Kernels below 9 pixels have
    too few radii for thirteen: a ring that the earlier ones add up to is left out.
    """
    kept: list[np.ndarray] = []
    axis = np.arange(size) - (size - 1) / 2
    radius = np.hypot(axis[:, None], axis)
    for sigma, tau in SCHMID:
        width = max(sigma * size / 49, 0.4)
        ring = np.cos(np.pi * tau * radius / width) * np.exp(-(radius**2) / (2 * width**2))
        ring = ring - ring.mean()
        candidates = [*kept, ring.ravel() / max(np.linalg.norm(ring), 1e-12)]
        if np.linalg.matrix_rank(np.stack(candidates), tol=1e-4) == len(candidates):
            kept = candidates
            yield ring


def dct(size: int) -> Iterator[Kernel]:
    """The k^2 products of the orthonormal DCT-II, by rising frequency."""
    return products(fft.dct(np.eye(size), axis=0, norm="ortho"))


def haar(size: int) -> Iterator[Kernel]:
    """The k^2 products of the orthonormal Haar basis, coarse to fine. Raises BadInput unless k is a power of two."""
    if size & (size - 1):
        raise BadInput(f"the Haar bank needs a kernel_size that is a power of two, not {size}")
    basis = np.ones((1, 1))
    while len(basis) < size:
        basis = np.concatenate((np.kron(basis, [1, 1]), np.kron(np.eye(len(basis)), [1, -1]))) / 2**0.5
    return products(basis)


def products(basis: np.ndarray) -> Iterator[Kernel]:
    """Outer products of rows, those with small indices first."""
    size = len(basis)
    for i, j in sorted(((i, j) for i in range(size) for j in range(size)), key=lambda p: (sum(p), max(p), p)):
        yield np.outer(basis[i], basis[j])


def edges(size: int) -> Iterator[Kernel]:
    """Sobel's two, and the Laplacian; 3 x 3 in the middle."""
    yield from (middle(ndimage.sobel(delta(size), axis), size) for axis in (0, 1))
    yield middle(ndimage.laplace(delta(size)), size)


BANKS: dict[str, Callable[[int], Iterator[Kernel]]] = {
    "gabor": gabor, "gaussian_derivatives": gaussian_derivatives, "log": laplacian_of_gaussian,
    "dog": difference_of_gaussians, "schmid": schmid, "dct": dct, "haar": haar, "edges": edges,
}  # fmt: skip


def bank(name: str, kernel_size: int, count: int) -> Float[Tensor, "count k k"]:
    """The first `count` filters of a bank, of unit norm. Raises UnknownName; BadInput where it has fewer."""
    if name not in BANKS:
        raise UnknownName("filter bank", name, BANKS)
    kernels = list(islice(BANKS[name](kernel_size), count))
    if len(kernels) < count:
        raise BadInput(f"the bank '{name}' has {len(kernels)} filters at kernel_size={kernel_size}, fewer than {count}")
    stacked = torch.from_numpy(np.stack(kernels)).float()
    return stacked / stacked.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]


def start_from_bank(conv: nn.Conv2d, name: str) -> nn.Conv2d:
    """Sets the filters of a convolution to those of a bank, on a random mixture of its inputs, at He's variance."""
    if conv.kernel_size[0] != conv.kernel_size[1]:
        raise BadInput(f"banks are square, and the convolution has a kernel of {tuple(conv.kernel_size)}")
    filters = bank(name, conv.kernel_size[0], conv.out_channels).to(conv.weight)
    mixture = nn.functional.normalize(torch.randn(conv.weight.shape[:2], dtype=conv.weight.dtype), dim=1)
    with torch.no_grad():
        conv.weight.copy_(2**0.5 * mixture.to(conv.weight)[..., None, None] * filters[:, None])
    return conv
