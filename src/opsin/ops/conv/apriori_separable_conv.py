"""A-priori compressed convolution: the kernels are products of one-way (1-D) filters from the first step of training.

Boukraichi et al. 2023, "A priori compression of convolutional neural networks for wave simulators", arXiv:2304.04964.
A trained network can be decomposed afterwards; here the tensor format is chosen before training. Every pair of output o
and input c owns a kernel on d axes, and that kernel is a sum of few outer products of 1-D filters:

    K_oc = sum_{r<=R} u_ocr (x) v_ocr [(x) w_ocr]          d k R numbers per pair instead of k^d          `PairConv`

which is the paper's format (R = 1). It is not the low-rank factorisation in which pairs share their filters through a
bottleneck of R channels (Jaderberg et al. 2014, Tai et al. 2016), nor the canonical polyadic format over all four axes
(Lebedev et al. 2015); both are here to compare with:

    K_oc = sum_r V_or (x) U_rc                             conv k x 1 to R channels, conv 1 x k         `SharedConv`
    K_oc = sum_r a_or b_cr u_r (x) v_r                     1 x 1, depthwise k x 1 and 1 x k, 1 x 1      `CPConv`

All take one, two or three axes. Factors are drawn so that the kernel that they make has He's variance 2 / (C k^d):
factors that each had it would make kernels with the product of variances, which is far too small.
"""

import math
from collections.abc import Sequence
from string import ascii_lowercase

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput, UnknownName
from opsin.layers.replace import with_layers_replaced
from opsin.ops.conv.depthwise import DepthwiseConv

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
HE = 2.0  # variance of a kernel's entries times its inputs


class FactoredConv(nn.Module):
    """A convolution (N, C, *spatial) -> (N, C', *spatial') whose kernel is made of factors.

    A member implements `kernel()`, the dense kernel that its factors make; that alone defines what it computes.
    Args: kernel_size with one side per axis, or one for all of two axes; stride, padding (zeros), dilation as of a
    convolution. Raises BadInput: not one to three axes, rank below 1, groups that do not divide the channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], rank: int,
        stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
        groups: int = 1, bias: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.kernel_size = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        self.axes = len(self.kernel_size)
        if self.axes not in CONV:
            raise BadInput(f"kernel_size={self.kernel_size} has {self.axes} axes; a convolution has one to three")
        if rank < 1:
            raise BadInput(f"rank={rank} leaves no filter; take 1 or more")
        if in_channels % groups or out_channels % groups:
            raise BadInput(f"groups={groups} does not divide {in_channels} input and {out_channels} output channels")
        self.in_channels, self.out_channels, self.rank, self.groups = in_channels, out_channels, rank, groups
        self.stride, self.padding, self.dilation = (self._per_axis(v) for v in (stride, padding, dilation))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def _per_axis(self, value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * self.axes if isinstance(value, int) else tuple(value)

    def kernel(self) -> Float[Tensor, "o c *k"]:
        """The dense kernel."""
        raise TypeError(f"{type(self).__name__} does not implement kernel()")

    def dense(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n o *t"]:
        """One ordinary convolution with the reconstructed kernel."""
        return CONV[self.axes](x, self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def along(
        self, x: Float[Tensor, "n c *s"], filters: Float[Tensor, "o c k"], axis: int, groups: int = 1
    ) -> Float[Tensor, "n o *t"]:
        """One-way filters along one axis, with the stride, padding and dilation that the layer has there."""
        shape = [1] * self.axes
        shape[axis] = filters.shape[2]
        stride, padding, dilation = (
            tuple(value if a == axis else rest for a, value in enumerate(values))
            for values, rest in ((self.stride, 1), (self.padding, 0), (self.dilation, 1))
        )
        return CONV[self.axes](x, filters.reshape(*filters.shape[:2], *shape), None, stride, padding, dilation, groups)

    def shifted(self, y: Float[Tensor, "n o *t"]) -> Float[Tensor, "n o *t"]:
        """Plus the bias."""
        return y if self.bias is None else y + self.bias.view(-1, *[1] * self.axes)

    def fuse(self) -> nn.Module:
        """The plain convolution with the same kernel, for inference."""
        with torch.no_grad():
            kernel = self.kernel()
            conv = PLAIN[self.axes](
                self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
                self.groups, self.bias is not None, device=kernel.device, dtype=kernel.dtype,
            )  # fmt: skip
            conv.weight.copy_(kernel)
            if self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"


class PairConv(FactoredConv):
    """The paper's format: every (output, input) pair has a kernel of rank R of its own; one convolution.

    Costs what a dense convolution costs and stores d k R numbers per pair. Parameters: `factors`, one
    (o, c / groups, R, k) per axis.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], rank: int = 1,
        stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
        groups: int = 1, bias: bool = True,
    ):  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, rank, stride, padding, dilation, groups, bias)
        inputs = in_channels // groups
        std = (HE / (inputs * math.prod(self.kernel_size) * rank)) ** (0.5 / self.axes)
        self.factors = nn.ParameterList(
            nn.Parameter(std * torch.randn(out_channels, inputs, rank, side)) for side in self.kernel_size
        )

    def kernel(self) -> Float[Tensor, "o c *k"]:
        """sum_r of the outer products; products and sums only, so that no pair is looped over."""
        product = self.factors[0]
        for factor in list(self.factors)[1:]:
            product = product.unsqueeze(-1) * factor.view(*factor.shape[:3], *[1] * (product.ndim - 3), -1)
        return product.sum(2)

    def forward(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n o *t"]:
        return self.dense(x)

    def reference(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n o *t"]:
        """The same filters one after another: a map per (pair, r), which the last axis sums. No kernel is made."""
        out, inputs, rank, _ = self.factors[0].shape
        split = (self.groups, out // self.groups, inputs, rank)
        by_input = [f.unflatten(0, split[:2]).transpose(1, 2).reshape(-1, 1, f.shape[-1]) for f in self.factors]
        groups = self.in_channels
        for axis, filters in enumerate(by_input[:-1]):
            x = self.along(x, filters, axis, groups)
            groups = len(filters)
        if self.axes == 1:
            return self.shifted(self.along(x, self.factors[0].sum(2), 0, self.groups))
        maps = x.unflatten(1, (split[0], split[2], split[1], rank)).transpose(2, 3)
        return self.shifted(self.along(maps.flatten(1, 4), self.factors[-1].flatten(1, 2), self.axes - 1, out))


class SharedConv(FactoredConv):
    """The channel bottleneck: C -> R along the first axis, R -> R along the middle one, R -> C' along the last.

    Parameters: `factors`, one (out, in, k) per axis. No groups.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], rank: int,
        stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
        bias: bool = True,
    ):  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, rank, stride, padding, dilation, 1, bias)
        widths = (in_channels, *[rank] * (self.axes - 1), out_channels)
        gains = (*[1.0] * (self.axes - 1), HE)
        self.factors = nn.ParameterList(
            nn.Parameter(math.sqrt(gain / (inputs * side)) * torch.randn(outputs, inputs, side))
            for inputs, outputs, side, gain in zip(widths, widths[1:], self.kernel_size, gains)
        )

    def kernel(self) -> Float[Tensor, "o c *k"]:
        """The factors multiplied over the channels between them."""
        product = self.factors[0]
        for factor in list(self.factors)[1:]:
            product = torch.einsum("rc...,ork->oc...k", product, factor)
        return product

    def forward(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n o *t"]:
        for axis, factor in enumerate(self.factors):
            x = self.along(x, factor, axis)
        return self.shifted(x)

    def reference(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n o *t"]:
        """One convolution with the reconstructed kernel."""
        return self.dense(x)


class CPConv(FactoredConv):
    """The canonical polyadic format: R terms, each an output vector, an input vector and a filter per axis.

    Parameters: `outputs` (o, R), `inputs` (R, c), `factors`, one (R, k) per axis. No groups.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], rank: int,
        stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
        bias: bool = True,
    ):  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, rank, stride, padding, dilation, 1, bias)
        self.inputs = nn.Parameter(torch.randn(rank, in_channels) / math.sqrt(in_channels))
        self.outputs = nn.Parameter(math.sqrt(HE / rank) * torch.randn(out_channels, rank))
        self.factors = nn.ParameterList(
            nn.Parameter(torch.randn(rank, side) / math.sqrt(side)) for side in self.kernel_size
        )

    def kernel(self) -> Float[Tensor, "o c *k"]:
        """sum_r of the outer products over all axes."""
        sides = ascii_lowercase[: self.axes]
        terms = ",".join(f"z{side}" for side in sides)
        return torch.einsum(f"yz,zx,{terms}->yx{sides}", self.outputs, self.inputs, *self.factors)

    def forward(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n o *t"]:
        ones = [1] * self.axes
        x = CONV[self.axes](x, self.inputs.reshape(*self.inputs.shape, *ones))
        for axis, factor in enumerate(self.factors):
            x = self.along(x, factor[:, None], axis, self.rank)
        return CONV[self.axes](x, self.outputs.reshape(*self.outputs.shape, *ones), self.bias)

    def reference(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n o *t"]:
        """One convolution with the reconstructed kernel."""
        return self.dense(x)


FORMS: dict[str, type[FactoredConv]] = {"pairs": PairConv, "shared": SharedConv, "cp": CPConv}


def equal_rank(form: str, in_channels: int, out_channels: int, kernel_size: Sequence[int]) -> int:
    """The rank at which a form has about as many weights as one outer product per pair. Raises UnknownName (form)."""
    if form not in FORMS:
        raise UnknownName("form of compressed convolution", form, FORMS)
    pairs, sides = in_channels * out_channels, sum(kernel_size)
    if form == "pairs":
        return 1
    if form == "cp":
        return max(1, round(pairs * sides / (in_channels + out_channels + sides)))
    first, *middle, last = kernel_size if len(kernel_size) > 1 else (kernel_size[0], 0)
    linear, square = in_channels * first + out_channels * last, sum(middle)
    root = math.sqrt(linear**2 + 4 * square * pairs * sides)
    return max(1, round(2 * pairs * sides / (linear + root)))


class AprioriSeparableConv(nn.Module):
    """The operator: (N, C, H, W) -> the same at stride 1, 'same' zero padding.

    Args:
        kernel_size: taps per side, odd.
        rank: outer products per pair ("pairs"), or channels of the bottleneck ("shared", "cp"); by default as many as
            give the number of weights of one outer product per pair.
        form: "pairs" as in the paper, "shared" or "cp".
    Raises BadInput (an even kernel, rank), UnknownName (form).
    """

    def __init__(
        self, dim: int, kernel_size: int = 5, rank: int | None = None, form: str = "pairs", stride: int = 1,
        bias: bool = True,
    ):  # fmt: skip
        super().__init__()
        if kernel_size % 2 == 0:
            raise BadInput(f"kernel_size={kernel_size} is even, so that the map would shift; take an odd one")
        sides = (kernel_size, kernel_size)
        terms = equal_rank(form, dim, dim, sides) if rank is None else rank
        self.conv = FORMS[form](dim, dim, sides, terms, stride=stride, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        return self.conv(x)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        """The other evaluation order of the same factors."""
        return self.conv.reference(x)

    def fuse(self) -> nn.Module:
        """The plain convolution."""
        return self.conv.fuse()


def compress_a_priori(model: nn.Module, form: str = "pairs", rank: int | None = None) -> nn.Module:
    """A copy of a network, to be trained, whose convolutions are fresh compressed ones.

    Those with at least two taps on two or more axes and zero padding given in numbers are replaced (for "shared" and
    "cp" also: without groups); biases, strides, dilations and everything else stay. rank: as of the form, or None for
    the same number of weights as one outer product per pair. Raises UnknownName (form), BadInput: nothing to replace.
    """
    if form not in FORMS:
        raise UnknownName("form of compressed convolution", form, FORMS)
    new, count = with_layers_replaced(model, lambda m: _compressed(m, form, rank) if _compressible(m, form) else None)
    if not count:
        raise BadInput(f"{type(model).__name__} has no convolution of two or more axes that could be compressed")
    return new


def _compressible(module: nn.Module, form: str) -> bool:
    if type(module) not in (nn.Conv2d, nn.Conv3d, DepthwiseConv) or isinstance(module.padding, str):
        return False  # other subclasses compute something of their own
    wide = sum(side > 1 for side in module.kernel_size) >= 2 and module.padding_mode == "zeros"
    return wide and (form == "pairs" or module.groups == 1)


def _compressed(conv: nn.Conv2d | nn.Conv3d, form: str, rank: int | None) -> FactoredConv:
    ends = (conv.in_channels, conv.out_channels)
    terms = equal_rank(form, *ends, conv.kernel_size) if rank is None else rank
    groups = {"groups": conv.groups} if form == "pairs" else {}
    new = FORMS[form](
        *ends, conv.kernel_size, terms, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        bias=conv.bias is not None, **groups,
    )  # fmt: skip
    return new.to(conv.weight).train(conv.training)


def pair_ranks(kernel: Float[Tensor, "o c *k"], tolerance: float = 1e-5) -> Int[Tensor, "o c"]:
    """The numerical rank of every pair's kernel: the largest over its unfoldings, one per axis.

    tolerance: singular values below this part of the largest count as zero.
    """
    values = kernel.detach().double()
    unfolded = [values.movedim(axis, 2).flatten(3) for axis in range(2, values.ndim)]
    return torch.stack([torch.linalg.matrix_rank(m, rtol=tolerance) for m in unfolded]).amax(0)
