"""Translation variant convolution: a depthwise filter of its own at every position, the same for all images.

Chen et al. 2022, "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual Processing",
arXiv:2203.10489. Where images share a layout (faces, scans), what should be looked for depends on the place and not on
the image. Free filters for all places would be too many to learn, so a small network B generates them from a few
learned affinity maps A:

    W = B(A),   A: (1, c_A, h, w),   W: (C, k^2, h, w);        y_c(p) = sum_t W_ct(p) x_c(p + t)

Neither A nor W depends on the input: at inference W is computed once, and the cost is that of a depthwise convolution.
Names of parameters follow the official repository, JierunChen/TVConv.
"""

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.kept import Source
from opsin.layers.precision import without_autocast

CACHED_BYTES = 2**20  # part of a map that all taps pass over before the next part, about a core's own cache


def unfolded_sum(
    x: Float[Tensor, "n c h w"], weight: Float[Tensor, "c t h2 w2"], stride: int
) -> Float[Tensor, "n c h2 w2"]:
    """The definition: k x k patches of the zero-padded input, each multiplied by the filter of its place."""
    channels, taps, *size = weight.shape
    side = round(taps**0.5)
    patches = F.unfold(x, side, padding=side // 2, stride=stride).unflatten(1, (channels, taps))
    return torch.einsum("nctp,ctp->ncp", patches, weight.flatten(2)).unflatten(2, size)


def shifted_sum(
    x: Float[Tensor, "n c h w"], weight: Float[Tensor, "c t h2 w2"], stride: int
) -> Float[Tensor, "n c h2 w2"]:
    """The same as k^2 shifted products, for compilers, which fuse them."""
    phases = _phases(x, weight, stride)
    return reduce(torch.add, (weight[:, tap] * phases[place] for tap, place in _taps(weight, stride)))


class ShiftedSum(torch.autograd.Function):
    """The same with products that add up in place: no patches in memory, and only x and W saved for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "n c h w"], weight: Float[Tensor, "c t h2 w2"], stride: int
    ) -> Float[Tensor, "n c h2 w2"]:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        phases = _phases(x, weight, stride)
        out = x.new_zeros(*x.shape[:2], *weight.shape[2:], dtype=torch.promote_types(x.dtype, torch.float32))
        for part in _parts(out):
            for tap, place in _taps(weight, stride):
                out[:, part].addcmul_(weight[part, tap], phases[:, part][place])
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "n c h2 w2"]) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        phases = _phases(x, weight, ctx.stride)
        grad, grad_phases = grad.contiguous(), torch.zeros_like(phases)
        grad_weight = torch.empty_like(weight)
        for part in _parts(grad):
            for tap, place in _taps(weight, ctx.stride):
                grad_phases[:, part][place].addcmul_(weight[part, tap].to(x.dtype), grad[:, part])
                grad_weight[part, tap] = (grad[:, part] * phases[:, part][place]).sum(0).to(weight.dtype)
        pad, (height, width) = round(weight.shape[1] ** 0.5) // 2, x.shape[2:]
        grad_x = F.pixel_shuffle(grad_phases.flatten(1, 3), ctx.stride)
        return grad_x[:, :, pad : pad + height, pad : pad + width], grad_weight, None


def _phases(x: Float[Tensor, "n c h w"], weight: Tensor, stride: int) -> Float[Tensor, "n c s s h3 w3"]:
    """The zero-padded input split by coordinate modulo stride, so that every tap is a shift by whole positions."""
    side = round(weight.shape[1] ** 0.5)
    ends = []
    for size, out in zip(x.shape[:1:-1], weight.shape[:1:-1]):  # width first, as F.pad wants it
        needed = max(stride * (out - 1) + side, size + side // 2)
        ends += [side // 2, -(-needed // stride) * stride - size - side // 2]
    return F.pixel_unshuffle(F.pad(x, ends).contiguous(), stride).unflatten(1, (-1, stride, stride))


def _taps(weight: Tensor, stride: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Each tap, and where in the phases (n, c, s, s, h, w) its inputs are."""
    side, (height, width) = round(weight.shape[1] ** 0.5), weight.shape[2:]
    for tap in range(side**2):
        (top, row), (left, column) = (divmod(i, stride) for i in divmod(tap, side))
        yield tap, (..., row, column, slice(top, top + height), slice(left, left + width))


def _parts(out: Float[Tensor, "n c h w"]) -> list[slice]:
    """Groups of channels that stay in a processor's cache while all taps pass over them."""
    samples, channels, *_ = out.shape
    if not out.is_cpu:
        return [slice(None)]
    step = max(1, CACHED_BYTES // (samples * out.shape[2:].numel() * out.element_size()))
    return [slice(first, first + step) for first in range(0, channels, step)]


def translation_variant_conv(
    x: Float[Tensor, "n c h w"], weight: Float[Tensor, "c t h2 w2"], bias: Float[Tensor, "c h2 w2"] | None = None,
    stride: int = 1,
) -> Float[Tensor, "n c h2 w2"]:  # fmt: skip
    """One k x k filter per channel and output position, 'same' zero padding; t = k^2 taps, rows first.

    On the meta device the definition runs, so that its multiplications are counted. Raises BadInput where the map that
    comes out is not the one that the filters are for.
    """
    size = tuple((s - 1) // stride + 1 for s in x.shape[2:])
    if size != tuple(weight.shape[2:]):
        h, w = weight.shape[2:]
        raise BadInput(
            f"these position-bound filters are for an output map of {h}x{w}, but an input of {x.shape[2]}x{x.shape[3]} "
            f"at stride {stride} gives {size[0]}x{size[1]}; build the operator with input_size={size}"
        )
    compute = unfolded_sum if x.is_meta else shifted_sum if torch.compiler.is_compiling() else ShiftedSum.apply
    y = compute(x, weight, stride)
    return y if bias is None else y + bias


def generator(affinity: int, hidden: int, outputs: int, inner_layers: int, size: tuple[int, int]) -> nn.Sequential:
    """B: 3x3 convolutions with a norm over the whole map, whose affine part and zero padding tell positions apart."""
    layers: list[nn.Module] = []
    for inputs in (affinity, *[hidden] * inner_layers):
        conv = nn.Conv2d(inputs, hidden, 3, padding=1, bias=False)
        layers.append(nn.Sequential(conv, nn.LayerNorm((hidden, *size)), nn.ReLU()))
    return nn.Sequential(*layers, nn.Conv2d(hidden, outputs, 3, padding=1, bias=False))


class TVConv(nn.Module):
    """(N, C, H, W) -> (N, C, h, w) for the one output size that it was built for.

    In eval mode without gradients the filters are generated once and kept until a parameter changes or is replaced,
    another state is loaded, or training goes on (only writing into `parameter.data` goes unseen: call `cache()` after
    it). `fuse()` leaves the filters alone.

    Args:
        input_size: (h, w) of the OUTPUT map.
        kernel_size: odd. stride: as of a convolution.
        affinity_channels, hidden, inner_layers: c_A, width and inner blocks of the generator (4, 64, 3 in face nets).
        bias: a second generator for an offset per channel and position.
    Raises BadInput: an even kernel, or an input that does not fit.
    """

    def __init__(
        self, dim: int, input_size: tuple[int, int], kernel_size: int = 3, stride: int = 1, affinity_channels: int = 4,
        hidden: int = 16, inner_layers: int = 1, bias: bool = False,
    ):  # fmt: skip
        super().__init__()
        if kernel_size % 2 == 0:
            raise BadInput(f"kernel_size={kernel_size} is even; a TVConv filter has a middle, so take an odd one")
        self.dim, self.stride, size = dim, stride, tuple(input_size)
        self.posi_map = nn.Parameter(torch.ones(1, affinity_channels, *size))
        self.weight_layers = generator(affinity_channels, hidden, kernel_size**2 * dim, inner_layers, size)
        self.bias_layers = generator(affinity_channels, hidden, dim, inner_layers, size) if bias else None
        self.uncache()
        self.register_load_state_dict_post_hook(lambda module, _: module.uncache())

    def generate(self) -> tuple[Float[Tensor, "c t h w"], Float[Tensor, "c h w"] | None]:
        """Filters and bias of every position."""
        weight = self.weight_layers(self.posi_map)[0].unflatten(0, (self.dim, -1))
        return weight, self.bias_layers(self.posi_map)[0] if self.bias_layers is not None else None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        return translation_variant_conv(x, *self._filters(), self.stride)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        """The same from freshly generated filters and unfolded patches."""
        weight, bias = self.generate()
        y = unfolded_sum(x, weight, self.stride)
        return y if bias is None else y + bias

    def _filters(self) -> tuple[Tensor, Tensor | None]:
        if self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            return self.generate()
        if torch.compiler.is_compiling():
            return self.generate() if self.cached_weight is None else (self.cached_weight, self.cached_bias)
        if self.cached_weight is None or not self._source.is_still(self.parameters()):
            self.cache()
        return self.cached_weight, self.cached_bias

    def cache(self) -> None:
        """Generates the filters and keeps them for inference; they are no part of the state."""
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self.posi_map.device.type):
            weight, bias = self.generate()
        self.register_buffer("cached_weight", weight, persistent=False)
        self.register_buffer("cached_bias", bias, persistent=False)
        self._source = Source(self.parameters())

    def uncache(self) -> None:
        """Forgets the kept filters."""
        self.register_buffer("cached_weight", None, persistent=False)
        self.register_buffer("cached_bias", None, persistent=False)
        self._source = Source()

    def train(self, mode: bool = True) -> "TVConv":
        super().train(mode)
        self.uncache() if mode else self.cache()
        return self

    def fuse(self) -> "PositionConv":
        """The inference form: the filters as a buffer, without the generator."""
        with torch.no_grad():
            return PositionConv(*self.generate(), self.stride)

    def extra_repr(self) -> str:
        return f"{self.dim}, size={tuple(self.posi_map.shape[2:])}, stride={self.stride}"


class PositionConv(nn.Module):
    """A TVConv whose filters are generated for good."""

    def __init__(self, weight: Float[Tensor, "c t h w"], bias: Float[Tensor, "c h w"] | None, stride: int):
        super().__init__()
        self.stride = stride
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", bias if bias is None else bias.detach())

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        return translation_variant_conv(x, self.weight, self.bias, self.stride)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        y = unfolded_sum(x, self.weight, self.stride)
        return y if self.bias is None else y + self.bias


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official repository also saves its settings as buffers."""
    settings = {"TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w"}
    return {name: value for name, value in state.items() if name.rpartition(".")[2] not in settings}
