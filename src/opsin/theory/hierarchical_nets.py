"""Finite hierarchical nets in the NTK parametrisation, and the tangent kernel of any network.

One layer is  h = ReLU(W patch / sqrt(k))  with k inputs per patch and W ~ N(0, 1), the read-out <beta, h> / sqrt(|h|)
with beta ~ N(0, 1) over channels and positions. Width to infinity, the tangent kernel of both nets here tends to
`limit_scale` times the `HierarchicalKernel` of the same filters, on inputs whose first patches have unit norm.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.theory.wide_cnn_learnability import Filter, as_image, filter_areas


class LocalLayer(nn.Module):
    """A ReLU layer on non-overlapping patches, each position with weights of its own."""

    def __init__(self, in_chans: int, width: int, positions: int, filter_size: tuple[int, int]):
        super().__init__()
        self.filter_size = filter_size
        self.weight = nn.Parameter(torch.randn(positions, width, in_chans * filter_size[0] * filter_size[1]))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h2 w2"]:
        (n, c, h, w), (fh, fw) = x.shape, self.filter_size
        patches = x.reshape(n, c, h // fh, fh, w // fw, fw).permute(2, 4, 0, 1, 3, 5).flatten(0, 1).flatten(2)
        z = self._apply_weight(patches) / patches.shape[-1] ** 0.5
        return z.relu().permute(1, 2, 0).reshape(n, -1, h // fh, w // fw)

    def _apply_weight(self, patches: Float[Tensor, "p n k"]) -> Float[Tensor, "p n o"]:
        return torch.bmm(patches, self.weight.mT)


class SharedLayer(LocalLayer):
    """The same layer with one filter bank for all positions: a convolution whose stride is its size."""

    def __init__(self, in_chans: int, width: int, positions: int, filter_size: tuple[int, int]):
        super().__init__(in_chans, width, 1, filter_size)

    def _apply_weight(self, patches: Float[Tensor, "p n k"]) -> Float[Tensor, "p n o"]:
        return patches @ self.weight[0].T


class _HierarchicalNet(nn.Module):
    """Layers down to one position per root of the tree, then a linear read-out over channels and positions.

    Args: size, the input's length (dims=1) or (height, width); the rest as in `HierarchicalKernel`; width, channels of
    every layer.
    """

    layer: type[LocalLayer]

    def __init__(
        self, size: int | tuple[int, int], filter_sizes: Sequence[Filter] = (2, 2, 2), width: int = 512, dims: int = 1,
        in_chans: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.dims, self.in_chans = dims, in_chans
        h, w = size if isinstance(size, tuple) else (1 if dims == 1 else size, size)
        layers, channels = [], in_chans
        for fh, fw in filter_areas(filter_sizes, dims):
            h, w = h // fh, w // fw
            layers.append(self.layer(channels, width, h * w, (fh, fw)))
            channels = width
        self.layers = nn.Sequential(*layers)
        self.beta = nn.Parameter(torch.randn(channels * h * w))

    def forward(self, x: Tensor) -> Float[Tensor, " n"]:
        h = self.layers(as_image(x, self.dims, self.in_chans)).flatten(1)
        return h @ self.beta / self.beta.numel() ** 0.5


class LocNet(_HierarchicalNet):
    """Locally connected: every position has weights of its own."""

    layer = LocalLayer


class ConvNet(_HierarchicalNet):
    """Convolutional: all positions share weights. Its limit is the same kernel, as the read-out has no pooling."""

    layer = SharedLayer


def empirical_ntk(
    net: nn.Module, x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."] | None = None
) -> Float[Tensor, "n m"]:
    """<d f(x) / d w, d f(y) / d w> over all parameters of a net with one output per sample."""
    names, values = zip(*net.named_parameters(), strict=True)

    def output(weights: tuple[Tensor, ...], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), sample[None]).squeeze()

    def jacobian(samples: Tensor) -> tuple[Tensor, ...]:
        detached = tuple(value.detach() for value in values)
        return torch.func.vmap(torch.func.grad(output), (None, 0))(detached, samples)

    ours = jacobian(x)
    theirs = ours if y is None else jacobian(y)
    products = [a.flatten(1) @ b.flatten(1).T for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(products).sum(0)
