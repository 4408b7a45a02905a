"""HyperZZW: kernels that a slow network draws are multiplied with the activations, and then applied to them.

Zhang 2024, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv:2401.17948. Attention
makes weights out of activations by dot products of all pairs. Here a small network of coordinates (`SlowNet`) draws a
hyper-kernel W, which one elementwise product with the activations Z makes depend on the image; these context weights
meet the activations again, at a cost that is linear in the number of positions:

    global   y(p) = (K_g(p) z(p)) v(p),                            K_g as large as the map
    local    y(p) = sum_q (K_l(q) z(p + q)) v(p + q),              K_l of k x k taps per channel

The second is a depthwise convolution of z v with K_l, which is how it is computed. Neither sums over the whole map: an
output sees the k x k window, and what is beyond only through the mean and variance of its channels. The paper claims
full context in one layer; its network, the card `terminator`, multiplies matrices instead.

The author's repository holds no code. Chosen here, for want of the paper's word: activations are standardised per
image and channel first, without which their products explode; the second factor v is a 1x1 convolution of the first, as
in a public copy of the early code, where the factors come from different branches, and because Z Z alone forgets signs;
the paper's bottleneck, a 1x1 convolution, joins both branches; frequencies, depth and width of the slow network; and
the variance that kernels start with.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.slow_net import SlowNet


def standardise(x: Float[Tensor, "n c h w"], eps: float = 1e-5) -> Float[Tensor, "n c h w"]:
    """Mean 0 and variance 1 per image and channel, without parameters; a map of one position becomes 0."""
    variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def global_zzw(
    kernel: Float[Tensor, "c h w"], z: Float[Tensor, "n c h w"], v: Float[Tensor, "n c h w"]
) -> Float[Tensor, "n c h w"]:
    """Two elementwise products: the context weights K z, applied to v."""
    return kernel.to(z.dtype) * z * v


def local_zzw(
    kernel: Float[Tensor, "c k k"], z: Float[Tensor, "n c h w"], v: Float[Tensor, "n c h w"]
) -> Float[Tensor, "n c h w"]:
    """In every window the context weights K z, applied to v; zeros around the map."""
    return F.conv2d(z * v, kernel.to(z.dtype)[:, None], padding=kernel.shape[-1] // 2, groups=len(kernel))


def windowed_zzw(
    kernel: Float[Tensor, "c k k"], z: Float[Tensor, "n c h w"], v: Float[Tensor, "n c h w"]
) -> Float[Tensor, "n c h w"]:
    """The same as it is defined: a kernel of its own for every window of every image."""
    side = kernel.shape[-1]
    windows, values = (F.unfold(t, side, padding=side // 2).unflatten(1, (len(kernel), side**2)) for t in (z, v))
    context = kernel.flatten(1)[:, :, None] * windows
    return (context * values).sum(2).view(z.shape)


class HyperZZW(nn.Module):
    """(N, C, H, W) -> the same.

    Args:
        kernel_size: taps per side of the local kernel, odd.
        hidden, num_layers, omega: of both slow networks, see `SlowNet`.
    Raises BadInput: an even kernel.
    """

    def __init__(self, dim: int, kernel_size: int = 7, hidden: int = 32, num_layers: int = 2, omega: float = 0.25):
        super().__init__()
        if kernel_size % 2 == 0:
            raise BadInput(f"kernel_size={kernel_size} is even; a local hyper-kernel is centred, so take an odd one")
        self.kernel_size = kernel_size
        self.slow_global = SlowNet(dim, 2, hidden, num_layers, omega)
        self.slow_local = SlowNet(dim, 2, hidden, num_layers, omega, fan_in=kernel_size**2)
        self.value = nn.Conv2d(dim, dim, 1)
        self.bottleneck = nn.Conv2d(2 * dim, dim, 1)
        for conv in (self.value, self.bottleneck):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            nn.init.zeros_(conv.bias)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self.mix(standardise(x))

    def mix(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The operator on activations that are standardised."""
        v = self.value(z)
        wide = global_zzw(self.slow_global(z.shape[2:]), z, v)
        near = local_zzw(self.slow_local((self.kernel_size,) * 2), z, v)
        return self.bottleneck(torch.cat((wide, near), 1))

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """From freshly generated kernels, with the context weights of every window written out."""
        z = standardise(x)
        v = self.value(z)
        wide = (self.slow_global.generate(x.shape[2:]) * z) * v
        near = windowed_zzw(self.slow_local.generate((self.kernel_size,) * 2), z, v)
        return self.bottleneck(torch.cat((wide, near), 1))
