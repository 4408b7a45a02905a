"""What sequence layers with a global kernel have in common: the layer around the kernel, the network, and their maps.

From the S4 line of work (Gu et al. 2021, arXiv:2111.00396, section 3.4), as long convolutions (arXiv:2302.06646) and
structured global convolutions (arXiv:2210.09298) use it:

    y = k * u + D u   (c kernels per feature),    out = GLU(W dropout(GELU(y)))

Only where the kernel comes from differs, so a member of the family says that in `kernels()` and nothing else.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.kept import Kept, may_keep
from opsin.layers.precision import without_autocast
from opsin.ops.spectral.fourier import (
    fast_length,
    filtered,
    long_conv,
    needed_length,
    reference_conv,
    response,
)  # fmt: skip


def two_sided(k: Float[Tensor, "two_c h t"]) -> Float[Tensor, "c h s"]:
    """Joins kernels of both directions to one of 2t - 1 taps, lags -(t - 1) to t - 1.

    The first half of the channels looks back, lag 0 included; the second looks ahead from lag -1 on, nearest tap
    first. Its last tap meets nothing. With n = 2t this is the published pad(k0, (0, t)) + pad(flip(k1), (t, 0)).
    """
    back, ahead = k.chunk(2)
    return torch.cat((ahead[..., :-1].flip(-1), back), -1)


class GlobalConvLayer(nn.Module):
    """(B, H, L) -> (B, H, L) for L up to `length`.

    Args:
        dim: features H. length: the longest input, in positions.
        channels: kernels per feature, c. bidirectional: one kernel for each direction of time.
        dropout: rate after the GELU; tie_dropout: one mask for all positions of a feature.
    """

    kernel_parameters: tuple[str, ...] = ()  # names of the parameters that the kernel is made of
    kernel_options: tuple[str, ...] = ()  # names of the attributes that it depends on, too

    def __init__(
        self, dim: int, length: int, channels: int = 1, bidirectional: bool = False, dropout: float = 0.0,
        tie_dropout: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.dim, self.length, self.channels, self.bidirectional = dim, length, channels, bidirectional
        self.D = nn.Parameter(torch.randn(channels, dim))
        self.dropout = nn.Dropout1d(dropout) if tie_dropout else nn.Dropout(dropout)
        self.output_linear = nn.Sequential(nn.Linear(channels * dim, 2 * dim), nn.GLU(1))
        self._kept = Kept()

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def kernels(self) -> Float[Tensor, "dc h t"]:
        """The kernels, those of the second direction behind those of the first, `length` taps each."""
        raise TypeError(f"{type(self).__name__} does not implement kernels()")

    def taps(self, length: int) -> Float[Tensor, "c h t"]:
        """The kernels for an input of this length, in the order of their lags."""
        k = self.kernels()[..., :length]
        return two_sided(k) if self.bidirectional else k

    def convolve(self, u: Float[Tensor, "b h l"]) -> Float[Tensor, "b c h l"]:
        """k * u with all kernels; their response is kept in eval mode without gradients."""
        length = u.shape[-1]
        start = length - 1 if self.bidirectional else 0
        if not may_keep(self, u):
            return long_conv(u[:, None], self.taps(length), start)
        n = fast_length(needed_length(length, length + start, start))
        key = (length, *(getattr(self, name) for name in self.kernel_options))
        k_f = self._kept(key, self._sources(), lambda: response(self.taps(length), n))
        return filtered(u[:, None], k_f, start, n)

    def _sources(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    def forward(self, u: Float[Tensor, "b h l"]) -> Float[Tensor, "b h l"]:
        self._check(u)
        return self._mixed(self._convolved(u), u)

    def _convolved(self, u: Float[Tensor, "b h l"]) -> Float[Tensor, "b c h l"]:
        with without_autocast(u.device.type):  # spectra are complex, and kernels squashed near to their precision
            return self.convolve(u)

    def reference(self, u: Float[Tensor, "b h l"]) -> Float[Tensor, "b h l"]:
        """The same with the plain composition of FFTs."""
        length = u.shape[-1]
        start = length - 1 if self.bidirectional else 0
        return self._mixed(reference_conv(u[:, None], self.taps(length), start), u)

    def _mixed(self, y: Float[Tensor, "b c h l"], u: Float[Tensor, "b h l"]) -> Float[Tensor, "b h l"]:
        y = torch.addcmul(y, u[:, None], self.D[:, :, None]).flatten(1, 2)
        linear, glu = self.output_linear
        return glu(F.conv1d(self.dropout(F.gelu(y)), linear.weight[:, :, None], linear.bias))

    def _check(self, u: Tensor) -> None:
        if u.ndim != 3 or u.shape[1] != self.dim or u.shape[2] > self.length:
            raise BadInput(
                f"this layer takes (batch, {self.dim}, up to {self.length} positions), not {tuple(u.shape)}; "
                f"build it with length={u.shape[-1]}"
            )

    def no_weight_decay(self) -> tuple[str, ...]:
        """Kernels are not decayed."""
        return self.kernel_parameters

    def extra_repr(self) -> str:
        return f"{self.dim}, length={self.length}, channels={self.channels}, bidirectional={self.bidirectional}"


class RasterOperator(nn.Module):
    """A sequence layer on maps of one size: rows one after another, (N, C, H, W) -> the same."""

    def __init__(self, layer: nn.Module, input_size: Sequence[int]):
        super().__init__()
        self.layer, self.input_size = layer, tuple(input_size)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        self._check(x)
        return self.layer(x.flatten(2)).unflatten(2, self.input_size)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The layer's definition on the same sequence."""
        self._check(x)
        return self.layer.reference(x.flatten(2)).unflatten(2, self.input_size)

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[2:]) != self.input_size:
            (h, w), (height, width) = self.input_size, x.shape[2:]
            raise BadInput(
                f"the kernels of this operator are for maps of {h}x{w}, and this one is {height}x{width}; "
                f"build it with input_size=({height}, {width})"
            )


class LayerNorm1d(nn.LayerNorm):
    """Layer norm over the features of (B, H, L)."""

    def forward(self, x: Float[Tensor, "b h l"]) -> Float[Tensor, "b h l"]:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


NORMS = {"layer": LayerNorm1d, "batch": nn.BatchNorm1d}


class SequenceClassifier(nn.Module):
    """(B, L, inputs) -> (B, classes): a linear encoder, residual layers with norms, a pool, a linear decoder.

    Args:
        layers: modules (B, dim, L) -> (B, dim, L), in their order.
        prenorm: norms stand before the layers instead of behind the sums.
        dropout: rate of whole features behind each layer.
        pool: "mean" of all positions, or the "last" one.
    Names of parameters follow HazyResearch/safari, standalone_long_convs.py.
    """

    def __init__(
        self, layers: Iterable[nn.Module], inputs: int, classes: int, dim: int, dropout: float = 0.0,
        prenorm: bool = False, norm: Literal["layer", "batch"] = "layer", pool: Literal["mean", "last"] = "mean",
    ):  # fmt: skip
        super().__init__()
        if norm not in NORMS or pool not in ("mean", "last"):
            raise BadInput(f'norm is "layer" or "batch" and pool "mean" or "last", not {norm!r} and {pool!r}')
        self.prenorm, self.pool = prenorm, pool
        self.encoder = nn.Linear(inputs, dim)
        self.conv_layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(NORMS[norm](dim) for _ in self.conv_layers)
        self.dropouts = nn.ModuleList(nn.Dropout1d(dropout) for _ in self.conv_layers)
        self.decoder = nn.Linear(dim, classes)

    def forward(self, x: Float[Tensor, "b l i"]) -> Float[Tensor, "b k"]:
        x = self.encoder(x).transpose(1, 2)
        for layer, norm, dropout in zip(self.conv_layers, self.norms, self.dropouts, strict=True):
            branch = dropout(layer(norm(x) if self.prenorm else x))
            x = x + branch if self.prenorm else norm(x + branch)
        return self.decoder(x.mean(2) if self.pool == "mean" else x[:, :, -1])


def pixels(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n l c"]:
    """Images as sequences of pixels, row by row."""
    return images.flatten(2).transpose(1, 2)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, kernel_lr: float = 1e-3
) -> list[dict[str, Any]]:  # fmt: skip
    """Two groups for an optimiser: everything else, and the kernels with their own rate and no decay."""
    layers = [module for module in model.modules() if hasattr(module, "kernel_parameters")]
    names = [(layer, name) for layer in layers for name in layer.kernel_parameters]
    kernels = [layer.get_parameter(name) for layer, name in names]
    ids = {id(p) for p in kernels}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    return [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": kernels, "lr": kernel_lr, "weight_decay": 0.0},
    ]
