"""The fully connected conditional random field: every pixel asks all others, most of all near ones of its colour.

Kraehenbuehl & Koltun 2011, arXiv:1210.5644, as DeepLab (arXiv:1606.00915, section 3.3) uses it. The energy of a
labelling x of pixels at places p with colours I is

    E(x) = sum_i -log P_i(x_i) + sum_{i<j} [x_i != x_j] k_ij
    k_ij = w_a exp(-|p_i - p_j|^2 / 2 s_a^2 - |I_i - I_j|^2 / 2 s_b^2) + w_g exp(-|p_i - p_j|^2 / 2 s_g^2)

and mean field repeats Q <- softmax(log P + sum_m w_m K_m Q). Each kernel is normalised, D^-1/2 K D^-1/2 with D = K 1,
and includes i = j. The first is applied by a permutohedral lattice, the second, which is separable, exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import BadInput
from opsin.tasks.permutohedral import Permutohedral

Filter = Callable[[Float[Tensor, "n k"]], Float[Tensor, "n k"]]
FLOOR = 1e-5  # probabilities below count as this, so that no label is impossible


class ExactGaussian:
    """sum_j exp(-|f_i - f_j|^2 / 2) v_j by the matrix of all pairs: the definition, for up to some thousand pixels."""

    def __init__(self, features: Float[Tensor, "n d"]):
        self.matrix = torch.cdist(features, features).square().div(-2).exp()

    def __call__(self, values: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return self.matrix @ values


class GridGaussian:
    """The same for positions on a grid of pixels: two small matrices, one per axis. Exact."""

    def __init__(self, height: int, width: int, sigma: float, like: Tensor):
        self.rows, self.columns = (_axis_matrix(length, sigma, like) for length in (height, width))

    def __call__(self, values: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        shape = (len(self.rows), len(self.columns), values.shape[1])
        along = torch.einsum("xv,yvk->yxk", self.columns, values.view(shape))
        return torch.einsum("yu,uxk->yxk", self.rows, along).reshape(values.shape)


def _axis_matrix(length: int, sigma: float, like: Tensor) -> Float[Tensor, "l l"]:
    place = torch.arange(length, device=like.device, dtype=like.dtype) / sigma
    return (place[:, None] - place).square().div(-2).exp()


class Normalised:
    """D^-1/2 K D^-1/2 of a filter K, with D = K 1."""

    def __init__(self, kernel: Filter, ones: Float[Tensor, "n 1"]):
        self.kernel, self.scale = kernel, kernel(ones).clamp_min(1e-20).rsqrt()

    def __call__(self, values: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return self.kernel(values * self.scale) * self.scale


def bilateral_features(image: Float[Tensor, "3 h w"], s_a: float, s_b: float) -> Float[Tensor, "n 5"]:
    """Positions over s_a and colours (0 to 255) over s_b, per pixel."""
    _, height, width = image.shape
    rows, columns = torch.meshgrid(
        torch.arange(height, device=image.device), torch.arange(width, device=image.device), indexing="ij"
    )
    places = torch.stack((columns, rows)).to(image) / s_a
    return torch.cat((places, image / s_b)).flatten(1).T.contiguous()


@dataclass(frozen=True)
class DenseCRF:
    """Sharpens a segmentation along the edges of its image.

    w_a, s_a, s_b: weight, spatial and colour sigma of the appearance kernel (pixels; grey levels of 0 to 255).
    w_g, s_g: weight and sigma of the smoothness kernel. The defaults go with the ResNet-101 models.
    iterations: of mean field; 0 returns the probabilities.
    bilateral: how the appearance kernel is applied, `Permutohedral` or `ExactGaussian`.
    """

    w_a: float = 4.0
    s_a: float = 67.0
    s_b: float = 3.0
    w_g: float = 3.0
    s_g: float = 1.0
    iterations: int = 10
    bilateral: Callable[[Float[Tensor, "n d"]], Filter] = Permutohedral

    @torch.no_grad()
    def __call__(self, logits: Float[Tensor, "k h w"], image: Float[Tensor, "3 h w"]) -> Float[Tensor, "k h w"]:
        """The marginals Q of one image, from logits at its resolution and its colours in [0, 1].

        Raises BadInput where the two differ in size, or the image has not three channels.
        """
        if image.ndim != 3 or image.shape[0] != 3 or image.shape[1:] != logits.shape[1:]:
            raise BadInput(
                f"the CRF takes logits and a colour image of one size, not {tuple(logits.shape)} and "
                f"{tuple(image.shape)}; up-sample the logits first"
            )
        classes, height, width = logits.shape
        kernels = self.kernels((image.float() * 255).round())
        evidence = logits.float().softmax(0).clamp(min=FLOOR).log().flatten(1).T.contiguous()
        q = evidence.softmax(1)
        for _ in range(self.iterations):
            message = evidence.clone()
            for weight, kernel in kernels:
                message.add_(kernel(q), alpha=weight)
            q = message.softmax(1)
        return q.T.reshape(classes, height, width)

    def kernels(self, image: Float[Tensor, "3 h w"]) -> list[tuple[float, Filter]]:
        """The two normalised kernels with their weights, for an image of colours 0 to 255."""
        ones = image.new_ones(image[0].numel(), 1)
        appearance = self.bilateral(bilateral_features(image, self.s_a, self.s_b))
        smoothness = GridGaussian(*image.shape[1:], self.s_g, image)
        return [(self.w_a, Normalised(appearance, ones)), (self.w_g, Normalised(smoothness, ones))]
