"""The permutohedral lattice: Gaussian filtering in any number of dimensions, in time linear in the points.

Adams, Baek & Davis 2010, "Fast High-Dimensional Filtering Using the Permutohedral Lattice". To compute, for all i,

    out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j

the features are lifted into the hyperplane x_0 + ... + x_d = 0 and each value is shared between the d + 1 corners of
the simplex around its feature (splat), the corners are blurred with (1/2, 1, 1/2) along each of d + 1 directions, and
values are read back with the same shares (slice). Here a corner's integer coordinates are packed into one number, so
that the hash table becomes sorting, and a neighbour's number differs by a constant; nothing loops over points.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsin.errors import BadInput


class Permutohedral:
    """The lattice of some features, to be applied to many values.

    features: (n, d), in units of the standard deviation. Raises BadInput where they spread over so many standard
    deviations that corners cannot be numbered.
    """

    def __init__(self, features: Float[Tensor, "n d"]):
        corners, shares = enclosing_simplex(features.double())
        numbers, steps = _pack(corners)
        found, self.corner = torch.unique(numbers, return_inverse=True)  # (m,), (n, d + 1)
        self.size = len(found)
        self.shares = shares.to(features.dtype)
        self.neighbours = [_neighbours(found, step) for step in steps]
        self.scale = 1 / (1 + 2.0 ** -features.shape[1])

    def __call__(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """The filtered values, approximately the sum above."""
        lattice = values.new_zeros(self.size + 1, values.shape[1])  # the last row stays zero: it is what is not there
        for corner, share in zip(self.corner.T, self.shares.T):
            lattice.index_add_(0, corner, values * share[:, None])
        for before, after in self.neighbours:
            blurred = lattice[before].add_(lattice[after]).mul_(0.5)
            lattice[:-1] += blurred
        out = torch.zeros_like(values)
        for corner, share in zip(self.corner.T, self.shares.T):
            out.addcmul_(lattice[corner], share[:, None])
        return out.mul_(self.scale)


def enclosing_simplex(features: Float[Tensor, "n d"]) -> tuple[Int[Tensor, "n e d"], Float[Tensor, "n e"]]:
    """Per feature the d + 1 corners of its simplex (first d of their d + 1 coordinates), and its share in each.

    Corners have coordinates that are congruent modulo d + 1; corner k is the one whose remainder is k.
    """
    d = features.shape[1]
    lifted = _lift(features)
    # the nearest point whose coordinates are multiples of d + 1, and the order of what is left over
    origin = (lifted / (d + 1)).round() * (d + 1)
    excess = origin.sum(1, keepdim=True) / (d + 1)
    rank = (lifted - origin).argsort(dim=1, descending=True).argsort(dim=1) + excess.round().long()
    wrapped = (rank < 0).long() - (rank > d).long()  # brings the point back into the hyperplane
    rank, origin = rank + wrapped * (d + 1), origin + wrapped * (d + 1)

    left = ((lifted - origin) / (d + 1)).gather(1, rank.argsort(dim=1))  # in descending order
    shares = torch.empty_like(left)
    shares[:, 1:] = (left[:, :-1] - left[:, 1:]).flip(1)
    shares[:, 0] = 1 - (left[:, 0] - left[:, -1])
    remainder = torch.arange(d + 1, device=features.device)[:, None]
    moved = torch.where(rank[:, None, :d] > d - remainder, remainder - (d + 1), remainder)
    return origin[:, None, :d].long() + moved, shares


def _lift(features: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
    """Into the hyperplane of zero sum, scaled so that splat, blur and slice together have a variance of one (p. 5)."""
    d = features.shape[1]
    axis = torch.arange(1, d + 1, device=features.device, dtype=features.dtype)
    scaled = features * (d + 1) * (2 / 3 / (axis * (axis + 1))).sqrt()
    tail = scaled.flip(1).cumsum(1).flip(1)  # tail_i = sum of scaled_j over j >= i
    zero = torch.zeros_like(tail[:, :1])
    return torch.cat((tail, zero), 1) - torch.cat((zero, axis * scaled), 1)


def _pack(corners: Int[Tensor, "n e d"]) -> tuple[Int[Tensor, "n e"], list[int]]:
    """One number per corner, without collisions, and the difference to its neighbour along each of d + 1 directions."""
    d = corners.shape[-1]
    low = corners.amin((0, 1)) - (d + 1)
    extent = (corners.amax((0, 1)) + (d + 1) - low + 1).tolist()
    weights, product = [], 1
    for width in extent:
        weights.append(product)
        product *= width
    if product >= 2**63:
        raise BadInput("the features span too many standard deviations for the lattice; use larger sigmas")
    weight = torch.tensor(weights, device=corners.device)
    steps = [(d + 1) * w - sum(weights) for w in (*weights, 0)]
    return ((corners - low) * weight).sum(-1), steps


def _neighbours(found: Int[Tensor, " m"], step: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """The rows of the corners one step after and one step before each; m where there is none."""
    count = len(found)
    place = torch.searchsorted(found, found + step).clamp_(max=count - 1)
    exists = found[place] == found + step
    after = torch.where(exists, place, count)
    before = torch.full_like(after, count)
    before[place[exists]] = exists.nonzero()[:, 0]
    return after, before
