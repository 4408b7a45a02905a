"""From networks of images to networks of volumes: swapping layers, and two ways to reuse flat kernels.

Inflation (Carreira and Zisserman 2017, arXiv:1705.07750, "I3D") repeats a k x k kernel along the depth and divides by
k, so that a volume of equal slices gives what one slice gave. ACS convolution (Yang et al. 2019, arXiv:1911.10477) lets
a third of the flat kernels look at each of the three kinds of planes, and adds no weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.replace import Swap, with_layers_replaced


def volumetric(model: nn.Module, convolution: Callable[[nn.Conv2d], nn.Module] | Swap) -> nn.Module:
    """The network for (n, c, d, h, w): `convolution` makes the 3-D layers, norms and pools follow with their state.

    Raises BadInput for a layer of images that has no form for volumes. Shapes that a `forward` has written out, like
    `x.mean((2, 3))`, are the network's own matter.
    """

    def rule(module: nn.Module) -> nn.Module | None:
        new = convolution(module)
        if new is not None:
            return new
        if type(module) in PLAIN:
            return PLAIN[type(module)](module)
        if type(module).__name__.endswith("2d"):
            raise BadInput(f"a layer of the type {type(module).__name__} has no form for volumes; take it out first")
        return None

    return with_layers_replaced(model, rule)[0]


def cube(size: Any) -> tuple[int, ...]:
    """(height, width), or one number for both, to (depth, height, width); the depth is the larger side."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    return (max(pair), *pair)


def _norm(norm: nn.BatchNorm2d) -> nn.BatchNorm3d:
    new = nn.BatchNorm3d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.load_state_dict(norm.state_dict(), assign=True)
    return new


def _max_pool(pool: nn.MaxPool2d) -> nn.MaxPool3d:
    places = (cube(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    return nn.MaxPool3d(*places, ceil_mode=pool.ceil_mode)


def _avg_pool(pool: nn.AvgPool2d) -> nn.AvgPool3d:
    places = (cube(size) for size in (pool.kernel_size, pool.stride, pool.padding))
    return nn.AvgPool3d(*places, pool.ceil_mode, pool.count_include_pad)


PLAIN: dict[type, Callable[[Any], nn.Module]] = {
    nn.BatchNorm2d: _norm,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: lambda pool: nn.AdaptiveAvgPool3d(cube(pool.output_size)),
    nn.AdaptiveMaxPool2d: lambda pool: nn.AdaptiveMaxPool3d(cube(pool.output_size)),
    nn.Dropout2d: lambda drop: nn.Dropout3d(drop.p),
}


def pixels_of_padding(conv: nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """Zeros before each axis. Raises BadInput for other padding, and for 'same' padding of an even kernel."""
    if conv.padding_mode != "zeros":
        raise BadInput(f'padding_mode="{conv.padding_mode}" has no form here; only zero padding is converted')
    if conv.padding == "same":
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        if any(span % 2 for span in spans):
            raise BadInput("'same' padding of an even kernel has no middle; give the padding in pixels")
        return tuple(span // 2 for span in spans)
    return (0,) * len(conv.kernel_size) if conv.padding == "valid" else tuple(conv.padding)


def inflated(conv: nn.Module) -> nn.Conv3d | None:
    """I3D: the flat kernel repeated along the depth and divided by its size. None for other layers."""
    if not isinstance(conv, nn.Conv2d):
        return None
    new = nn.Conv3d(
        conv.in_channels, conv.out_channels, cube(conv.kernel_size), cube(conv.stride), cube(pixels_of_padding(conv)),
        cube(conv.dilation), conv.groups, conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    depth = new.kernel_size[0]
    with torch.no_grad():
        new.weight.copy_(conv.weight[:, :, None].expand_as(new.weight) / depth)
        if conv.bias is not None:
            new.bias.copy_(conv.bias)
    return new


class ACSConv3d(nn.Module):
    """(n, c, d, h, w): a third of the flat kernels on each of the planes (h, w), (d, w) and (d, h); weights as in 2-D.

    Raises BadInput unless the convolution keeps its map but for the stride (odd kernel, 'same' padding), ungrouped.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        k, d = conv.kernel_size[0], conv.dilation[0]
        square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.dilation))
        if not square or k % 2 == 0 or conv.groups > 1 or pixels_of_padding(conv) != (d * (k // 2),) * 2:
            raise BadInput(
                "an ACS convolution takes the kernels of a square, odd, 'same' padded, ungrouped convolution"
            )
        self.stride, self.dilation, self.weight, self.bias = conv.stride[0], d, conv.weight, conv.bias

    def forward(self, x: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n c2 d2 h2 w2"]:
        pad = self.dilation * (self.weight.shape[-1] // 2)
        planes = []
        for axis, part in enumerate(self.weight.tensor_split(3)):
            padding = [0 if axis == i else pad for i in range(3)]
            planes.append(F.conv3d(x, part.unsqueeze(2 + axis), None, self.stride, padding, self.dilation))
        y = torch.cat(planes, 1)
        return y if self.bias is None else y + self.bias[:, None, None, None]


def acs(conv: nn.Module) -> ACSConv3d | None:
    """The rule that makes ACS convolutions of all convolutions. None for other layers."""
    return ACSConv3d(conv) if isinstance(conv, nn.Conv2d) else None
