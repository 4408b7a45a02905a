"""Orthogonality of convolutions: the regulariser, whether orthogonal kernels exist, and how near a layer is to one.

Achour, Malgouyres and Mamalet 2022, "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks",
arXiv:2108.05623. A kernel K of M filters on C channels with k taps per axis, stride S and circular padding is a matrix
T, of M N^d rows and C (S N)^d columns on d axes. Filters that overlap at no shift but their own make it orthogonal:

    L(K) = || corr(K, K) - I_0 ||_F^2 - max(M - C S^d, 0)         corr: all filters with all, at multiples of S
    || T T^t - I ||_F^2  (M <= C S^d)  or  || T^t T - I ||_F^2  (M >= C S^d)   =   N^d L(K)      for S N >= 2k - 1
    || . ||_2^2 <= alpha L(K),     alpha independent of N

so a kernel with a small L is nearly an isometry at every image size. Weights are (M, C, k) on one axis (signals), or
(M, C, k, k) on two; kernels need not be square.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput

Padding = Literal["circular", "zero", "valid"]
CONV = {1: F.conv1d, 2: F.conv2d}


class Existence(NamedTuple):
    """Whether orthogonal kernels exist, and why.

    case: "rows" (T T^t = I is wanted) or "columns" (T^t T = I). trivial: the centre tap is all that may differ from 0.
    """

    exists: bool
    case: Literal["rows", "columns"]
    trivial: bool
    reason: str


def case_of(out_channels: int, in_channels: int, stride: int = 1, axes: int = 2) -> Literal["rows", "columns"]:
    """What can be orthonormal: the rows of T if it is wide or square (M <= C S^d), else its columns."""
    return "rows" if out_channels <= in_channels * stride**axes else "columns"


def existence(
    out_channels: int, in_channels: int, kernel_size: int, stride: int = 1, axes: int = 2, padding: Padding = "circular"
) -> Existence:
    """The theorem on existence, for inputs that are at least as large as the kernel.

    Circular: rows exactly if M <= C k^d, columns exactly if S <= k. At stride 1, zeros ('same') leave the centre tap
    alone, and no padding leaves no columns. Raises BadInput for a stride with other than circular padding, which the
    theorem does not cover.
    """
    case = case_of(out_channels, in_channels, stride, axes)
    taps = in_channels * kernel_size**axes
    if padding == "circular":
        if case == "rows":
            exists = out_channels <= taps
            reason = f"M = {out_channels} filters {'can' if exists else 'cannot'} be orthonormal in C k^d = {taps} taps"
        else:
            exists = stride <= kernel_size
            reason = f"a stride of {stride} {'skips no' if exists else 'skips'} pixels with {kernel_size} taps"
        return Existence(exists, case, kernel_size == 1, reason)
    if stride != 1:
        raise BadInput(f"padding='{padding}' with stride={stride} is not covered by the theorem; use stride=1")
    if padding == "zero":
        reason = "zeros make border filters shorter than inner ones, unless only the centre tap differs from 0"
        return Existence(True, case, True, reason)
    if case == "rows":
        return Existence(True, case, kernel_size == 1, "without padding every output is a whole filter")
    exists = kernel_size == 1
    reason = "every pixel is seen by all taps" if exists else "corner pixels are seen by one tap, inner ones by all"
    return Existence(exists, case, exists, reason)


def overlaps(weight: Float[Tensor, "m c *k"], stride: int = 1) -> Float[Tensor, "m m *shifts"]:
    """Inner products of all filters with all filters, shifted by every multiple of the stride at which they touch."""
    reach = [(k - 1) // stride * stride for k in weight.shape[2:]]
    return CONV[weight.ndim - 2](weight, weight, stride=stride, padding=reach)


def orthogonality_loss(weight: Float[Tensor, "m c *k"], stride: int = 1) -> Float[Tensor, ""]:
    """L(K), at least 0; it is 0 exactly where the layer is orthogonal (rows or columns, whichever the shape allows)."""
    gram = overlaps(weight, stride)
    filters, centre = len(weight), tuple(size // 2 for size in gram.shape[2:])
    wanted = torch.zeros_like(gram)
    wanted[(..., *centre)] = torch.eye(filters, dtype=gram.dtype, device=gram.device)
    return (gram - wanted).square().sum() - max(filters - weight.shape[1] * stride ** (weight.ndim - 2), 0)


def spectral_factor(shape: Sequence[int], stride: int = 1) -> int:
    """alpha: the squared spectral error of a layer with such a weight is at most alpha L, at every image size."""
    filters, channels, *kernel = shape
    if case_of(filters, channels, stride, len(kernel)) == "rows":
        return filters * prod(2 * ((k - 1) // stride) + 1 for k in kernel)
    return channels * prod(2 * k - 1 for k in kernel)


def isometry_bounds(weight: Float[Tensor, "m c *k"], stride: int = 1) -> tuple[float, float]:
    """An interval that holds every singular value of T at every image size, sqrt(1 -+ eps) with eps^2 = alpha L."""
    loss = max(float(orthogonality_loss(weight.detach().double(), stride)), 0.0)
    error = (spectral_factor(weight.shape, stride) * loss) ** 0.5
    return max(1 - error, 0.0) ** 0.5, (1 + error) ** 0.5


def singular_values(
    weight: Float[Tensor, "m c *k"], size: Sequence[int], stride: int = 1
) -> Float[Tensor, "*freqs rank"]:
    """The singular values of the circular layer on maps of `size` = S N, by output frequency, without its matrix.

    A shift-invariant layer is diagonal in frequency; a stride folds S^d input frequencies onto each output frequency,
    which gives N^d blocks of M x C S^d. Raises BadInput unless size is a multiple of the stride and holds the kernel.
    """
    axes, kernel = weight.ndim - 2, weight.shape[2:]
    if any(side % stride or side < k for side, k in zip(size, kernel, strict=True)):
        raise BadInput(f"a map of {tuple(size)} must be a multiple of the stride {stride} and hold the kernel {kernel}")
    response = torch.fft.fftn(weight.detach(), s=tuple(size), dim=tuple(range(2, 2 + axes)))
    for axis in reversed(range(2, 2 + axes)):
        response = response.unflatten(axis, (stride, -1))  # the frequencies f + N a, as (a, f)
    folded = response.movedim(tuple(range(3, 3 + 2 * axes, 2)), tuple(range(axes)))
    blocks = folded.flatten(axes + 1) / stride ** (axes / 2)
    return torch.linalg.svdvals(blocks)


def spectral_error(weight: Float[Tensor, "m c *k"], size: Sequence[int], stride: int = 1) -> float:
    """|| T T^t - I ||_2 or || T^t T - I ||_2 of the circular layer on maps of `size`."""
    return float((singular_values(weight, size, stride).square() - 1).abs().max())


def layer_matrix(
    weight: Float[Tensor, "m c *k"], size: Sequence[int], stride: int = 1, padding: Padding = "circular"
) -> Float[Tensor, "rows columns"]:
    """T itself, from the layer's outputs on a basis of the maps of `size`: an oracle for small maps."""
    channels, axes = weight.shape[1], weight.ndim - 2
    basis = torch.eye(channels * prod(size), dtype=weight.dtype, device=weight.device).view(-1, channels, *size)
    return CONV[axes](pad(basis, weight.shape[2:], padding), weight, stride=stride).flatten(1).T


def pad(x: Float[Tensor, "n c *s"], kernel: Sequence[int], padding: Padding) -> Float[Tensor, "n c *s2"]:
    """The map with k // 2 positions before and the rest after, from the other side or zeros; or as it is."""
    ends = [end for k in reversed(kernel) for end in (k // 2, (k - 1) // 2)]
    if padding == "valid" or not any(ends):
        return x
    return F.pad(x, ends, mode="circular" if padding == "circular" else "constant")


def free_orthogonal_kernel(out_channels: int, in_channels: int, kernel_size: int, stride: int = 1) -> Tensor:
    """A random orthogonal kernel (M, C, k, k) in float64, with all its taps in use where k > S.

    The S x S middle taps hold an orthonormal matrix on C S^2 inputs; every further row and column of taps is a factor
    P + (I - P) z with a random projection P, which keeps energy for every z of modulus 1. Raises BadInput where no
    orthogonal kernel exists.
    """
    kernel = middle_orthogonal_kernel(out_channels, in_channels, kernel_size, stride)
    inner = min(stride, kernel_size)
    first = (kernel_size - inner) // 2
    kernel = kernel[..., first : first + inner, first : first + inner]
    for axis in (2, 3):
        for step in range(kernel_size - inner):
            frame = torch.linalg.qr(torch.randn(in_channels, in_channels, dtype=torch.float64)).Q
            part = frame[:, : (in_channels + step % 2) // 2]
            kept = torch.einsum("mdij,dc->mcij", kernel, part @ part.T)
            one = list(kernel.shape)
            one[axis] = 1
            zeros = kernel.new_zeros(one)
            kernel = torch.cat((kept, zeros), axis) + torch.cat((zeros, kernel - kept), axis)
    return kernel


def middle_orthogonal_kernel(out_channels: int, in_channels: int, kernel_size: int, stride: int = 1) -> Tensor:
    """A random orthogonal kernel with the fewest taps, around the centre; delta-orthogonal at stride 1 (float64)."""
    found = existence(out_channels, in_channels, kernel_size, stride)
    if not found.exists:
        raise BadInput(f"no orthogonal kernel exists: {found.reason}; use another stride, kernel_size or width")
    inner = min(stride, kernel_size)
    matrix = torch.empty(out_channels, in_channels * inner**2, dtype=torch.float64)
    kernel = matrix.new_zeros(out_channels, in_channels, kernel_size, kernel_size)
    first = (kernel_size - inner) // 2
    block = nn.init.orthogonal_(matrix).view(out_channels, in_channels, inner, inner)
    kernel[..., first : first + inner, first : first + inner] = block
    return kernel
