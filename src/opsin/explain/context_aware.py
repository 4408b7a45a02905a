"""Context-aware saliency (Goferman, Zelnik-Manor and Tal 2012, IEEE TPAMI 34(10)) of a one-channel map.

A patch is salient where even the patches most like it differ from it, or are far away:

    d(i, j) = d_value(i, j) / (1 + c d_pos(i, j)),  c = 3                                (eq. 1)
    S_i^r   = 1 - exp(-(1/K) sum over the K most similar patches j of d(i, j))           (eq. 3)

with the candidates j taken at scales r, r/2 and r/4, the mean over scales r, and a context term that keeps what is
close to the most salient places: S_i <- mean_r S_i^r (1 - d_foci^r(i))                        (eq. 5)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

PATCH, STRIDE, NEIGHBOURS, POSITION_WEIGHT, FOCUS = 7, 3, 64, 3.0, 0.8


def patches(image: Float[Tensor, "h w"]) -> tuple[Float[Tensor, "p k"], Float[Tensor, "p 2"], tuple[int, int]]:
    """All 7x7 patches with half overlap, their centres as shares of the larger side, and the grid's size."""
    height, width = image.shape
    padded = F.pad(image[None, None], [PATCH // 2] * 4, mode="replicate")
    values = F.unfold(padded, PATCH, stride=STRIDE)[0].T
    rows, columns = torch.arange(0, height, STRIDE), torch.arange(0, width, STRIDE)
    centres = torch.cartesian_prod(rows, columns).float() / max(height, width)
    return values, centres, (len(rows), len(columns))


def resized(image: Float[Tensor, "h w"], scale: float) -> Float[Tensor, "h2 w2"]:
    """The map at another size, at least one patch large."""
    size = [max(PATCH, round(scale * side)) for side in image.shape]
    return F.interpolate(image[None, None], size=size, mode="bilinear", antialias=True)[0, 0]


def distances(a: Float[Tensor, "p k"], b: Float[Tensor, "q k"]) -> Float[Tensor, "p q"]:
    """Euclidean, from differences: exact where vectors are equal, as most patches of a sparse map are."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def saliency_at(image: Float[Tensor, "h w"], scale: float, chunk: int = 1024) -> Float[Tensor, "a b"]:
    """S^r on the grid of patches at one scale (eq. 1-3); compared in chunks of rows, so memory is bounded."""
    own, own_place, grid = patches(resized(image, scale))
    others = [patches(resized(image, share)) for share in (scale, scale / 2, scale / 4)]
    values = torch.cat([value for value, _, _ in others])
    places = torch.cat([place for _, place, _ in others])
    top = max(float(distances(value, values).max()) for value in own.split(chunk))
    salient = []
    for value, place in zip(own.split(chunk), own_place.split(chunk), strict=True):
        apart = distances(value, values) / max(top, 1e-6)
        distance = apart / (1 + POSITION_WEIGHT * distances(place, places))
        nearest = distance.topk(min(NEIGHBOURS, len(values)), largest=False).values
        salient.append(1 - torch.exp(-nearest.mean(1)))
    return torch.cat(salient).view(grid)


def normalised(x: Tensor) -> Tensor:
    """Shifted and scaled to [0, 1]; zeros where it is constant."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else torch.zeros_like(x)


def distance_to(foci: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """Distance of every pixel to the nearest true pixel, as a share of the larger side."""
    from scipy.ndimage import distance_transform_edt

    return torch.from_numpy(distance_transform_edt(~foci.cpu().numpy())).float() / max(foci.shape)


def context_aware_saliency(
    image: Float[Tensor, "h w"], scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3), side: int = 250
) -> Float[Tensor, "h w"]:
    """Saliency in [0, 1] at the map's own size.

    scales: R, as shares of the image. side: larger sides are first reduced to this many pixels (patches are compared
    all with all).
    """
    height, width = image.shape
    small = resized(image.float(), min(1.0, side / max(height, width)))
    if small.max() - small.min() < 1e-6:
        return torch.zeros(height, width)
    size = tuple(small.shape)
    single = []
    for scale in scales:
        grid = saliency_at(small, scale)[None, None]
        single.append(normalised(F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0, 0]))
    in_context = torch.stack([s * (1 - distance_to(s > FOCUS)) for s in single]).mean(0)
    out = F.interpolate(in_context[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    return normalised(out)
