"""PCANet (Chan et al. 2015, arXiv:1404.3606): two stages of principal components, then binary codes and histograms.

stage 1: the top L1 eigenvectors of mean-free k x k patches are the filters; stage 2 repeats that on all L1 maps
the L2 maps of each are cut at 0 and packed into one integer map; histograms of 2^L2 bins over blocks are features
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.filter_design.unsupervised import pca, sampled_patches


def principal_filters(
    maps: Float[Tensor, "n c h w"], size: int, count: int, samples: int, seed: int
) -> Float[Tensor, "m c k k"]:
    """The leading eigenvectors of patches without their own means; zeros around the maps."""
    padded = F.pad(maps, [size // 2] * 4)
    patches = sampled_patches(padded, (size, size), samples, seed)
    return pca(patches - patches.mean(1, keepdim=True), count).unflatten(1, (maps.shape[1], size, size))


def responses(maps: Float[Tensor, "n c h w"], filters: Float[Tensor, "m c k k"]) -> Float[Tensor, "n m h w"]:
    """The filters on patches without their means: on the maps, with filters without theirs."""
    centred = filters - filters.mean((1, 2, 3), keepdim=True)
    return F.conv2d(maps, centred, padding=filters.shape[-1] // 2)


class PCANet:
    """Features of images without labels and without gradients; a linear classifier goes on top.

    Args: filters, L1 and L2 (8 bits at most 16); kernel_size in pixels, odd; block, side of the histograms' blocks in
        pixels; overlap, the share by which neighbouring blocks overlap. Where blocks do not end with the image, another
        one does, and overlaps more.
    """

    def __init__(
        self, filters: tuple[int, int] = (8, 8), kernel_size: int = 7, block: int = 8, overlap: float = 0.5,
        samples: int = 20_000, seed: int = 0,
    ):  # fmt: skip
        if kernel_size % 2 == 0 or not 0 <= overlap < 1 or filters[1] > 16:
            raise BadInput("PCANet needs an odd kernel_size, an overlap in [0, 1) and at most 16 filters in stage 2")
        self.filters, self.kernel_size, self.block = filters, kernel_size, block
        self.step, self.samples, self.seed = max(1, round(block * (1 - overlap))), samples, seed
        self.stages: list[Tensor] = []

    def fit(self, images: Float[Tensor, "n c h w"]) -> "PCANet":
        """Learns both stages' filters."""
        first = principal_filters(images, self.kernel_size, self.filters[0], self.samples, self.seed)
        maps = responses(images, first).flatten(0, 1)[:, None]
        self.stages = [first, principal_filters(maps, self.kernel_size, self.filters[1], self.samples, self.seed + 1)]
        return self

    def codes(self, images: Float[Tensor, "n c h w"]) -> Int[Tensor, "n m h w"]:
        """One integer of L2 bits per position and first-stage filter; the first filter is the highest bit."""
        if not self.stages:
            raise BadInput("PCANet has no filters yet; call fit(images) first")
        maps = responses(images, self.stages[0])
        second = responses(maps.flatten(0, 1)[:, None], self.stages[1])
        bits = 2 ** torch.arange(self.filters[1] - 1, -1, -1, device=images.device)
        return ((second > 0) * bits[:, None, None]).sum(1).unflatten(0, maps.shape[:2])

    def transform(self, images: Float[Tensor, "n c h w"], batch_size: int = 64) -> Float[Tensor, "n features"]:
        """Histograms of all blocks and first-stage filters, L1 x blocks x 2^L2 numbers per image."""
        return torch.cat([self._histograms(self.codes(part)) for part in images.split(batch_size)])

    def _histograms(self, codes: Int[Tensor, "n m h w"]) -> Float[Tensor, "n features"]:
        bins = 2 ** self.filters[1]
        rows, columns = (self._places(side).to(codes.device) for side in codes.shape[2:])
        blocks = codes[:, :, rows[:, None, :, None], columns[:, None, :]]  # (n, m, rows, columns, block, block)
        blocks = blocks.flatten(4).flatten(0, 3)
        ones = torch.ones(blocks.shape, device=codes.device)
        return ones.new_zeros(len(blocks), bins).scatter_add_(1, blocks, ones).view(len(codes), -1)

    def _places(self, side: int) -> Int[Tensor, "blocks block"]:
        """The pixels of every block along one side; the last block ends where the side does."""
        if side < self.block:
            raise BadInput(f"an image side of {side} pixels has no block of {self.block}; take smaller blocks")
        starts = [*range(0, side - self.block, self.step), side - self.block]
        return torch.tensor(starts)[:, None] + torch.arange(self.block)
