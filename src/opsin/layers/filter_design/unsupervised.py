"""Filters learned without labels, from k x k patches of images: eleven rules, one preprocessing, one coding.

Patches are normalised in contrast, (x - mean) / sqrt(var + 10) on the scale of 255, and whitened by ZCA with 0.1 added
to the eigenvalues (Coates, Ng and Lee 2011); k-means is of no use without both. A rule takes patches (n, d) and a
number and gives filters (m, d). Images are coded by the triangle max(0, mean(z) - z_j) of the distances z to the
filters, summed over quadrants.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA, FastICA, MiniBatchDictionaryLearning
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import BadInput, UnknownName

Patches = Float[Tensor, "n d"]
Filters = Float[Tensor, "m d"]
CONTRAST = 10 / 255**2  # added to the variance of a patch with values in [0, 1]


def sampled_patches(
    images: Float[Tensor, "n c h w"], size: tuple[int, int], count: int, seed: int = 0,
    dilation: tuple[int, ...] = (1, 1),
) -> Patches:  # fmt: skip
    """`count` patches at random places of random images, flattened channel by channel."""
    n, _, height, width = images.shape
    down, across = (step * torch.arange(side) for side, step in zip(size, dilation, strict=True))
    top_most, left_most = height - int(down[-1]), width - int(across[-1])  # places, from the first on
    if top_most < 1 or left_most < 1:
        needed = f"{int(down[-1]) + 1}x{int(across[-1]) + 1}"
        raise BadInput(f"images of {height}x{width} have no patches of {needed}; take smaller filters")
    draw = torch.Generator().manual_seed(seed)
    image, top, left = (torch.randint(high, (count,), generator=draw) for high in (n, top_most, left_most))
    rows, columns = top[:, None] + down, left[:, None] + across
    found = images[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (count, k, k, c)
    return found.permute(0, 3, 1, 2).flatten(1)


def contrast_normalised(patches: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    centred = patches - patches.mean(-1, keepdim=True)
    return centred / (patches.var(-1, keepdim=True, correction=0) + CONTRAST).sqrt()


@dataclass(frozen=True)
class Whitening:
    """x -> (x - mean) matrix."""

    mean: Float[Tensor, " d"]
    matrix: Float[Tensor, "d d"]

    @classmethod
    def zca(cls, patches: Patches, epsilon: float = 0.1) -> "Whitening":
        """The symmetric whitening V (D + epsilon)^(-1/2) V^t."""
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - mean).T.cov(correction=0).double())
        return cls(mean, ((vectors * (values.clamp(min=0) + epsilon).rsqrt()) @ vectors.T).to(patches.dtype))

    def __call__(self, patches: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return (patches - self.mean) @ self.matrix


def array(patches: Patches) -> Float[np.ndarray, "n d"]:
    """For libraries that work on processors, in float32 at least."""
    return patches.to("cpu", torch.promote_types(patches.dtype, torch.float32)).numpy()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(filters: Filters) -> Filters:
    return F.normalize(filters, dim=1)


def random(patches: Patches, count: int, seed: int = 0) -> Filters:
    """Gaussian directions: the control."""
    drawn = torch.randn(count, patches.shape[1], generator=generator(seed), dtype=patches.dtype)
    return unit(drawn.to(patches.device))


def pca(patches: Patches, count: int, seed: int = 0) -> Filters:
    """The eigenvectors of the covariance with the largest eigenvalues, at most d."""
    if count > min(patches.shape):
        raise BadInput(f"PCA of {len(patches)} patches of {patches.shape[1]} values has no {count} filters")
    found = PCA(count, random_state=seed).fit(array(patches))
    return torch.from_numpy(np.asarray(found.components_)).to(patches)


def kmeans(patches: Patches, count: int, seed: int = 0, rounds: int = 10) -> Filters:
    """Spherical k-means (Coates and Ng 2012): each patch to its most correlated filter, damped by the old filters."""
    filters = random(patches, count, seed)
    for _ in range(rounds):
        moved = filters.clone()
        for part in patches.split(8192):
            products = part @ filters.T
            place = products.abs().argmax(1)
            moved.index_add_(0, place, products.gather(1, place[:, None]) * part)
        filters = unit(moved)
    return filters


def ica(patches: Patches, count: int, seed: int = 0) -> Filters:
    """FastICA, at most d filters."""
    if count > min(patches.shape):
        raise BadInput(f"ICA of {len(patches)} patches of {patches.shape[1]} values has no {count} filters")
    found = FastICA(count, random_state=seed, whiten="unit-variance", max_iter=200, tol=1e-2).fit(array(patches))
    return unit(torch.from_numpy(np.asarray(found.components_)).to(patches))


def descended(
    loss: Callable[[Filters, Patches], Tensor], patches: Patches, count: int, seed: int, steps: int, lr: float
) -> Filters:
    """Filters after Adam on minibatches of a loss."""
    draw, filters = generator(seed), random(patches, count, seed).requires_grad_()
    optimiser = torch.optim.Adam([filters], lr)
    for _ in range(steps):
        rows = torch.randint(len(patches), (256,), generator=draw)
        optimiser.zero_grad()
        loss(filters, patches[rows]).backward()
        optimiser.step()
    return filters.detach()


def rica(patches: Patches, count: int, seed: int = 0, sparsity: float = 0.1, steps: int = 300) -> Filters:
    """Reconstruction ICA (Le et al. 2011): |W^t W x - x|^2 + sparsity sum log cosh(W x), overcomplete if wished."""

    def loss(w: Filters, x: Patches) -> Tensor:
        code = x @ w.T
        log_cosh = code.abs() + F.softplus(-2 * code.abs()) - np.log(2)
        return ((code @ w - x).square().sum(1) + sparsity * log_cosh.sum(1)).mean()

    return unit(descended(loss, patches, count, seed, steps, 0.01))


def sparse_coding(patches: Patches, count: int, seed: int = 0, sparsity: float = 1.0) -> Filters:
    """A dictionary learned with lasso codes, online (Mairal et al. 2009)."""
    learner = MiniBatchDictionaryLearning(count, alpha=sparsity, max_iter=5, batch_size=256, random_state=seed)
    return unit(torch.from_numpy(np.asarray(learner.fit(array(patches)).components_)).to(patches))


def autoencoder(patches: Patches, count: int, seed: int = 0, noise: float = 0.0, steps: int = 300) -> Filters:
    """A tied auto-encoder W^t relu(W (x + noise)), on patches what a convolutional one is on images."""
    draw = generator(seed + 1)

    def loss(w: Filters, x: Patches) -> Tensor:
        seen = x + noise * torch.randn(x.shape, generator=draw, dtype=x.dtype).to(x) if noise else x
        return (F.relu(seen @ w.T) @ w - x).square().sum(1).mean()

    return unit(descended(loss, patches, count, seed, steps, 0.01))


def denoising(patches: Patches, count: int, seed: int = 0) -> Filters:
    """The auto-encoder that sees its input under noise of half the patches' deviation."""
    return autoencoder(patches, count, seed, noise=0.5 * float(patches.std()))


def hebbian(
    update: Callable[[Filters, Patches], Filters], patches: Patches, count: int, seed: int, steps: int, lr: float
) -> Filters:
    """Filters after local updates on minibatches, with a rate that falls to 0."""
    draw, filters = generator(seed), random(patches, count, seed)
    for step in range(steps):
        rows = torch.randint(len(patches), (256,), generator=draw)
        filters = filters + lr * (1 - step / steps) * update(filters, patches[rows])
    return filters


def oja(patches: Patches, count: int, seed: int = 0, steps: int = 1000) -> Filters:
    """dW = y (x - y W), for each filter by itself: all turn to the first principal component."""

    def update(w: Filters, x: Patches) -> Filters:
        y = x @ w.T
        return (y.T @ x - y.square().sum(0)[:, None] * w) / len(x)

    return unit(hebbian(update, patches, count, seed, steps, 0.5 / float(patches.square().sum(1).mean())))


def sanger(patches: Patches, count: int, seed: int = 0, steps: int = 3000) -> Filters:
    """Generalised Hebbian: each filter learns what those before it leave over, hence the principal components."""

    def update(w: Filters, x: Patches) -> Filters:
        y = x @ w.T
        return (y.T @ x - (y.T @ y).tril() @ w) / len(x)

    return unit(hebbian(update, patches, count, seed, steps, 1.0 / float(patches.square().sum(1).mean())))


def competitive(patches: Patches, count: int, seed: int = 0, steps: int = 1000, rank: int = 2) -> Filters:
    """Krotov and Hopfield 2019: the winner learns the patch, the `rank`-th unlearns it a little."""
    rank = min(rank, count)

    def update(w: Filters, x: Patches) -> Filters:
        y = x @ w.T
        order = y.topk(rank, 1).indices
        g = torch.zeros_like(y).scatter_(1, order[:, -1:], -0.4).scatter_(1, order[:, :1], 1.0)
        change = g.T @ x - (g * y).sum(0)[:, None] * w
        return change / change.abs().max().clamp(min=1e-12)

    return unit(hebbian(update, unit(patches), count, seed, steps, 0.05))


LEARNERS: dict[str, Callable[..., Filters]] = {
    "random": random, "pca": pca, "kmeans": kmeans, "ica": ica, "rica": rica, "sparse_coding": sparse_coding,
    "autoencoder": autoencoder, "denoising": denoising, "oja": oja, "sanger": sanger, "competitive": competitive,
}  # fmt: skip


@dataclass(frozen=True)
class LearnedFilters:
    """Filters (m, c, k, k) with the preprocessing of patches that they were learned under."""

    filters: Float[Tensor, "m c k k"]
    whitening: Whitening | None

    def prepared(self, patches: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        patches = contrast_normalised(patches)
        return patches if self.whitening is None else self.whitening(patches)

    def triangle(self, images: Float[Tensor, "n c h w"], stride: int = 1) -> Float[Tensor, "n m h2 w2"]:
        """max(0, mean(z) - z_j) of the distances z_j of every patch to the filters."""
        size = self.filters.shape[-1]
        patches = self.prepared(F.unfold(images, size, stride=stride).mT)
        z = torch.cdist(patches, self.filters.flatten(1))
        rows = (images.shape[2] - size) // stride + 1
        return F.relu(z.mean(2, keepdim=True) - z).mT.unflatten(2, (rows, -1))

    def encode(
        self, images: Float[Tensor, "n c h w"], stride: int = 1, batch_size: int = 128
    ) -> Float[Tensor, "n features"]:
        """The triangle code summed over quadrants, 4 m numbers per image."""
        parts = [quadrants(self.triangle(part, stride)) for part in images.split(batch_size)]
        return torch.cat(parts)


def quadrants(maps: Float[Tensor, "n m h w"]) -> Float[Tensor, "n features"]:
    """Sums over the four quarters of a map; the first ones are larger where a side is odd."""
    top, left = ((side + 1) // 2 for side in maps.shape[2:])
    parts = (maps[:, :, rows, columns] for rows in (slice(top), slice(top, None)) for columns in (
        slice(left), slice(left, None)
    ))  # fmt: skip
    return torch.cat([part.sum((2, 3)) for part in parts], 1)


def learn_filters(
    images: Float[Tensor, "n c h w"], method: str = "kmeans", count: int = 64, kernel_size: int = 6,
    whiten: bool = True, samples: int = 20_000, seed: int = 0,
) -> LearnedFilters:  # fmt: skip
    """Filters of k x k pixels from images in [0, 1].

    Args: method, one of LEARNERS; samples, patches to learn from; whiten, by ZCA after contrast normalisation.
    Raises UnknownName; BadInput where the images are too small, or the method cannot give so many filters.
    """
    if method not in LEARNERS:
        raise UnknownName("method", method, LEARNERS)
    patches = contrast_normalised(sampled_patches(images, (kernel_size, kernel_size), samples, seed))
    whitening = Whitening.zca(patches) if whiten else None
    found = LEARNERS[method](patches if whitening is None else whitening(patches), count, seed)
    return LearnedFilters(found.unflatten(1, (images.shape[1], kernel_size, kernel_size)), whitening)
