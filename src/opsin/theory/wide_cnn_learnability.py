"""What infinitely wide deep CNNs can learn: their kernels in closed form, and the rates that follow from the spectrum.

Cagnetta, Favero, Wyart 2023, "What Can Be Learnt With Wide Convolutional Neural Networks?", arXiv:2208.01003.

A hierarchical CNN cuts its input into patches of size s_1 (each a point on a sphere), those into groups of s_2, and so
on: no two patches overlap, so the receptive fields form a tree. With infinite width the net becomes a kernel machine
whose kernel climbs that tree. Per leaf patch p, c_p = <x_p, y_p>, Theta_p = c_p; then at each of the L layers

    Theta <- mean over siblings of  k0(c) Theta + k1(c),        c <- mean over siblings of  k1(c),
    k0(t) = (pi - arccos t) / pi,        k1(t) = (sqrt(1 - t^2) + (pi - arccos t) t) / pi            (section 3)

Theta at the root is the neural tangent kernel (NTK), c the random-feature kernel (NNGP). Eigenfunctions sort into
sectors: those of sector l depend on one patch of layer l, with d_eff(l) = (s_1 - 1) s_2 ... s_l free coordinates, and
their eigenvalues fall as |k|^-(2 nu + d_eff(l)), nu = 1/2 for the NTK and 3/2 for the NNGP (theorem 3.1). A target
that lives on one such patch is therefore learnt at a rate set by d_eff(l), however deep the student is (section 4).
"""

from collections.abc import Sequence
from math import pi, prod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import BadInput

BLOCK = 2**22  # elements of the tensor of cosines that are held at once
SMOOTHNESS = {"ntk": 0.5, "nngp": 1.5}
Filter = int | tuple[int, int]


def arc_cosine(t: Float[Tensor, "*s"]) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    """The arc-cosine kernels of order 0 and 1 of a cosine (Cho and Saul 2009), normalised to 1 at t = 1."""
    t = t.clamp(-1, 1)
    rest = pi - torch.arccos(t)
    return rest / pi, ((1 - t * t).sqrt() + rest * t) / pi


def filter_areas(filter_sizes: Sequence[Filter], dims: int) -> list[tuple[int, int]]:
    """Filters as (height, width): a 1-D input is an image of height 1, and one number is the side of a square."""
    sizes = [size if isinstance(size, tuple) else (1 if dims == 1 else size, size) for size in filter_sizes]
    if dims not in (1, 2) or not sizes or min(map(min, sizes)) < 1 or (dims == 1 and any(h != 1 for h, _ in sizes)):
        raise BadInput(
            f"filter_sizes={filter_sizes} with dims={dims} is no hierarchy; give positive sizes, dims 1 or 2"
        )
    return sizes


def as_image(x: Tensor, dims: int, in_chans: int) -> Float[Tensor, "n c h w"]:
    """Rows of numbers (n, d), or maps (n, c, d) or (n, c, h, w), as maps; rows of a 2-D input are square images."""
    if x.ndim == 2:
        pixels = x.shape[1] // in_chans
        side = round(pixels**0.5)
        height, width = (1, pixels) if dims == 1 else (side, side)
        if in_chans * height * width != x.shape[1]:
            raise BadInput(f"rows of {x.shape[1]} numbers are not {in_chans} square maps; give (n, c, h, w) instead")
        return x.reshape(len(x), in_chans, height, width)
    image = x.unsqueeze(2) if dims == 1 and x.ndim == 3 else x
    if image.ndim != 4 or image.shape[1] != in_chans:
        raise BadInput(f"an input of shape {tuple(x.shape)} does not fit dims={dims}, in_chans={in_chans}")
    return image


def tree_patches(
    image: Float[Tensor, "n c h w"], filters: Sequence[tuple[int, int]]
) -> tuple[Float[Tensor, "n leaves k"], int]:
    """First-layer patches in the order of the tree (siblings adjacent), and how many roots the tree has."""
    (n, c, h, w), levels = image.shape, len(filters)
    ph, pw = prod(f[0] for f in filters), prod(f[1] for f in filters)
    if h % ph or w % pw:
        raise BadInput(
            f"an input of {h}x{w} does not divide into patches of {ph}x{pw}, the product of the filter sizes"
        )
    rows, columns = ([size // p, *(f[i] for f in reversed(filters))] for i, size, p in ((0, h, ph), (1, w, pw)))
    nested = image.reshape(n, c, *rows, *columns)
    order = [axis for level in range(levels) for axis in (2 + level, 3 + levels + level)]
    leaves = nested.permute(0, *order, 1, 2 + levels, 3 + 2 * levels)
    return leaves.reshape(n, h * w // prod(filters[0]), c * prod(filters[0])), (h // ph) * (w // pw)


class HierarchicalKernel:
    """The kernel of an infinitely wide hierarchical CNN with ReLU, no bias, and patches that do not overlap.

    Args:
        filter_sizes: s_1 ... s_L, first layer first. In two dimensions a number is the side of a square, a pair
            (height, width).
        kernel: "ntk", training all layers, or "nngp", training the last one.
        dims: 1 for sequences, 2 for images.
        in_chans: channels of the input; a patch is normalised over its positions and channels together.

    `kernel(x, y)` takes rows (n, d) or maps (n, c, d) / (n, c, h, w) and returns the (n, m) matrix in the precision of
    x. First-layer patches are put on the unit sphere. Locally connected nets and weight sharing have the same kernel.
    Raises BadInput: the input does not divide into patches, or a patch is zero.
    """

    def __init__(
        self, filter_sizes: Sequence[Filter] = (2, 2, 2), kernel: Literal["ntk", "nngp"] = "ntk", dims: int = 1,
        in_chans: int = 1,
    ):  # fmt: skip
        if kernel not in SMOOTHNESS:
            raise BadInput(f"kernel='{kernel}' is not known; it is 'ntk' or 'nngp'")
        self.filter_sizes, self.kernel, self.dims, self.in_chans = tuple(filter_sizes), kernel, dims, in_chans
        self.filters = filter_areas(filter_sizes, dims)

    def __repr__(self) -> str:
        return f"HierarchicalKernel(filter_sizes={self.filter_sizes}, kernel='{self.kernel}', dims={self.dims})"

    @property
    def depth(self) -> int:
        """Layers of non-linearities, L."""
        return len(self.filters)

    @property
    def variance(self) -> float:
        """K(x, x), the same for all x: L + 1 for the NTK, 1 for the NNGP."""
        return self.depth + 1.0 if self.kernel == "ntk" else 1.0

    @property
    def limit_scale(self) -> float:
        """The kernel of the finite nets of `hierarchical_nets` tends to this constant times ours: 2^-L / patch size."""
        return 0.5**self.depth / (self.in_chans * prod(self.filters[0]))

    def patches(self, x: Tensor) -> tuple[Float[Tensor, "n leaves k"], int]:
        """Unit first-layer patches in tree order, and the number of roots."""
        leaves, roots = tree_patches(as_image(x, self.dims, self.in_chans), self.filters)
        norms = leaves.norm(dim=-1, keepdim=True)
        if not bool((norms > 0).all()):
            raise BadInput(
                "a first-layer patch is zero (or not a number) and has no place on the sphere; shift the values"
            )
        return leaves / norms, roots

    def __call__(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None) -> Float[Tensor, "n m"]:
        ours, roots = self.patches(x)
        theirs = ours if y is None else self.patches(y)[0]
        if ours.shape[1:] != theirs.shape[1:]:
            raise BadInput(f"x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)} are not inputs of one net")  # type: ignore[union-attr]
        rows = max(1, BLOCK // (theirs.shape[0] * theirs.shape[1]))
        gram = torch.cat([self._climb(block, theirs, roots) for block in ours.split(rows)])
        return gram.fill_diagonal_(self.variance) if y is None else gram

    def _climb(self, x: Tensor, y: Tensor, roots: int) -> Float[Tensor, "n m"]:
        """The recursion of section 3 on (leaves, n, m) cosines: a layer acts on all nodes, then averages siblings."""
        cosine = torch.einsum("nlk,mlk->lnm", x, y)
        theta = cosine
        for siblings in (*(prod(f) for f in self.filters[1:]), roots):
            k0, k1 = arc_cosine(cosine)
            theta = (k0 * theta + k1).unflatten(0, (-1, siblings)).mean(1)
            cosine = k1.unflatten(0, (-1, siblings)).mean(1)
        return theta[0] if self.kernel == "ntk" else cosine[0]

    def effective_dim(self, level: int | None = None) -> int:
        """d_eff(l): free coordinates of one patch of layer l (the last one by default)."""
        level = self.depth if level is None else level
        if not 1 <= level <= self.depth:
            raise BadInput(f"level {level} is outside 1 ... {self.depth}, the layers of the kernel")
        return (self.in_chans * prod(self.filters[0]) - 1) * prod(prod(f) for f in self.filters[1:level])

    def eigenvalue_exponent(self, level: int | None = None) -> float:
        """a(l) in eigenvalue ~ |k|^-a(l) of sector l (theorem 3.1): 2 nu + d_eff(l)."""
        return 2 * SMOOTHNESS[self.kernel] + self.effective_dim(level)


def fully_connected_kernel(dim: int, depth: int, kernel: Literal["ntk", "nngp"] = "ntk") -> HierarchicalKernel:
    """The kernel of a fully connected net on unit inputs: one patch that is the whole input, then filters of 1."""
    return HierarchicalKernel((dim, *[1] * (depth - 1)), kernel)


def predicted_beta(teacher: HierarchicalKernel, student: HierarchicalKernel) -> float:
    """beta in error ~ P^-beta for ridgeless regression of a Gaussian field with the teacher's covariance (section 4).

    With d = d_eff of the teacher's last layer, beta = min(2 nu_teacher, 2 (2 nu_student + d)) / d. The student's own
    depth does not enter: it adapts to the scale of the target. Raises BadInput unless the student's hierarchy begins
    with the teacher's.
    """
    if student.filters[: teacher.depth] != teacher.filters:
        raise BadInput(
            f"the student {student.filter_sizes} does not begin with the teacher's filters {teacher.filter_sizes}"
        )
    dim = teacher.effective_dim()
    return min(2 * SMOOTHNESS[teacher.kernel], 2 * (2 * SMOOTHNESS[student.kernel] + dim)) / dim
