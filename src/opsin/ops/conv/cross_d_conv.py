"""Cross-D convolution: a 2-D convolution that owns a 3-D kernel and applies a slice of it, moved for each image.

Yavuz and Yang 2024, "Cross-D Conv: Cross-Dimensional Transferable Knowledge Base via Fourier Shifting Operation",
arXiv:2411.02441. What is learned on images becomes, kernel by kernel, the initial state of a network for volumes. A
small head reads an axis k and an angle theta off the image; with f the frequencies of the kernel W,

    R = I + theta [k]_x,    W' = IFFT(FFT(W) exp(-2 pi i 1^T R f)),    y = x * (middle slice of W')

As 1^T R f = s^T f with s = R^T 1 = 1 + theta (1 x k), the change of phase is a circular shift of the kernel by the
vector s, fractional where s is: theta = 0 rolls it by one voxel along all three axes. Such a shift is linear in W and
separates into the axes, so here one small matrix per image takes all kernels to their slices, and nothing is
transformed once per image and kernel. A true rotation of the kernel is the same with another matrix.

Names of parameters follow the official repository, convergedmachine/Cross-D-Conv.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.replace import with_layers_replaced
from opsin.layers.volumetric import cube, pixels_of_padding, volumetric

HIDDEN = 16  # channels inside the head
LARGEST_ANGLE = torch.pi / 4
Pair = int | tuple[int, int]


def skew(axis: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 3"]:
    """[k]_x, the matrix of v -> k x v."""
    return torch.linalg.cross(
        axis[:, :, None].expand(-1, -1, 3), torch.eye(3).to(axis).expand(axis.shape[0], 3, 3), dim=1
    )


def shift_of(axis: Float[Tensor, "n 3"], angle: Float[Tensor, " n"]) -> Float[Tensor, "n 3"]:
    """s = R^T (1, 1, 1) of R = I + theta [k]_x: voxels along depth, height and width."""
    return 1 + angle[:, None] * torch.linalg.cross(torch.ones_like(axis), axis)


def fractional_shift(size: int, shift: Float[Tensor, " n"]) -> Float[Tensor, "n 2 out in"]:
    """The matrix that moves a period of `size` samples by `shift`, real and imaginary part.

    It is FFT, phase and inverse FFT in one: mean over f of exp(2 pi i f (out - in - shift)). For an odd size, whose
    frequencies come in pairs, the imaginary part is 0.
    """
    place = torch.arange(size, device=shift.device, dtype=shift.dtype)
    frequencies = (place - size * (2 * place >= size).to(shift.dtype)) / size
    angle = 2 * torch.pi * frequencies * (place[:, None] - place - shift[:, None, None])[..., None]
    return torch.stack((angle.cos().mean(-1), angle.sin().mean(-1)), 1)


class CrossDConv2d(nn.Module):
    """(N, C, H, W) -> (N, C', H', W') with kernels that are slices of 3-D ones, shifted as each image says.

    A 1x1 kernel has no frequencies and no slices: it is a plain convolution, without a head. The official layer takes a
    bias and dilation and uses neither; here both work, and the default has no bias.

    Args:
        dim, out_dim: C and C' (default C).
        kernel_size: of the slice; the kernel's depth is its larger side. Odd, if the map shall keep its size.
        stride, padding, dilation, groups, bias: as of `nn.Conv2d`; padding is 'same' by default.
    """

    def __init__(
        self, dim: int, out_dim: int | None = None, kernel_size: Pair = 3, stride: Pair = 1,
        padding: Pair | None = None, dilation: Pair = 1, groups: int = 1, bias: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.dim, self.out_dim, self.stride, self.groups = dim, out_dim or dim, cube(stride)[1:], groups
        self.kernel_size, self.dilation = cube(kernel_size), cube(dilation)[1:]
        same = tuple(d * (k // 2) for d, k in zip(self.dilation, self.kernel_size[1:]))
        self.padding = same if padding is None else cube(padding)[1:]
        self.weights_3d = nn.Parameter(torch.empty(self.out_dim, dim // groups, *self.kernel_size))
        nn.init.kaiming_normal_(self.weights_3d, mode="fan_out", nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(self.out_dim)) if bias else None
        if max(self.kernel_size) > 1:
            self.rotation_params = nn.Sequential(
                nn.Conv2d(dim, HIDDEN, 1, bias=False), nn.BatchNorm2d(HIDDEN), nn.ReLU(), nn.Conv2d(HIDDEN, 4, 1)
            )

    def pose(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n 3"], Float[Tensor, " n"]]:
        """The axis k (unit length) and the angle theta of each image, in float32."""
        maps = self.rotation_params(x).flatten(2).float()
        r = (maps.softmax(2) * maps).sum(2)
        axis = r[:, :3] / (r[:, :3].norm(dim=1, keepdim=True) + 1e-8)
        return axis, LARGEST_ANGLE * r[:, 3].tanh()

    def slicer(self, axis: Float[Tensor, "n 3"], angle: Float[Tensor, " n"]) -> Float[Tensor, "n voxel pixel"]:
        """The matrix from a kernel's voxels to the pixels of the middle slice of the shifted kernel."""
        shifts = zip(self.kernel_size, shift_of(axis, angle).unbind(1))
        depth, height, width = (fractional_shift(size, shift).unbind(1) for size, shift in shifts)
        middle = [part[:, self.kernel_size[0] // 2, :, None, None, None, None] for part in depth]
        rows = [part.mT[:, None, :, None, :, None] for part in height]
        columns = [part.mT[:, None, None, :, None, :] for part in width]
        plane = _product(rows, columns)  # n, 1, height and width of the voxel, height and width of the pixel
        return _product(middle, plane)[0].flatten(4).flatten(1, 3)

    def kernels(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o i kh kw"]:
        """The 2-D kernels of each image: one product of all kernels with all matrices."""
        matrix = self.slicer(*self.pose(x))
        slices = self.weights_3d.flatten(2).flatten(0, 1).float() @ matrix.transpose(0, 1).flatten(1)
        shape = (*self.weights_3d.shape[:2], x.shape[0], *self.kernel_size[1:])
        return slices.view(shape).permute(2, 0, 1, 3, 4).to(self.weights_3d.dtype)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        if max(self.kernel_size) == 1:
            return self._conv(x, self.weights_3d[:, :, 0], self.groups)
        kernels = self.kernels(x)
        if torch.compiler.is_compiling():
            return self._products(x, kernels)
        y = self._conv(x.flatten(0, 1)[None], kernels.flatten(0, 1), x.shape[0] * self.groups)
        return y[0].unflatten(0, (x.shape[0], self.out_dim))

    def _products(self, x: Float[Tensor, "n c h w"], kernels: Float[Tensor, "n o i kh kw"]) -> Tensor:
        """The same as products of unfolded patches, for graphs, where the number of groups must be a constant."""
        places = zip(x.shape[2:], self.kernel_size[1:], self.stride, self.padding, self.dilation)
        size = [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in places]
        patches = F.unfold(x, self.kernel_size[1:], self.dilation, self.padding, self.stride)
        y = kernels.flatten(2).unflatten(1, (self.groups, -1)) @ patches.unflatten(1, (self.groups, -1))
        y = y.flatten(1, 2).unflatten(2, size)
        return y if self.bias is None else y + self.bias[:, None, None]

    def _conv(self, x: Tensor, kernels: Tensor, groups: int) -> Tensor:
        """All images as groups of one convolution, or, with as many groups as the layer has, a plain one."""
        bias = None if self.bias is None else self.bias.repeat(len(kernels) // self.out_dim)
        return F.conv2d(x, kernels, bias, self.stride, self.padding, self.dilation, groups)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """Image by image: move the whole kernel, take its middle slice, convolve."""
        if max(self.kernel_size) == 1:
            return self._conv(x, self.weights_3d[:, :, 0], self.groups)
        images = []
        for image, axis, angle in zip(x.split(1), *self.pose(x)):
            kernel = self.moved(axis, angle)[:, :, self.kernel_size[0] // 2]
            images.append(self._conv(image, kernel.to(x.dtype), self.groups))
        return torch.cat(images)

    def moved(self, axis: Float[Tensor, " 3"], angle: Float[Tensor, ""]) -> Float[Tensor, "o i kd kh kw"]:
        """The definition: the kernel after the change of phase."""
        rotation = torch.eye(3).to(axis) + angle * skew(axis[None])[0]
        grid = [torch.fft.fftfreq(size, device=axis.device) for size in self.kernel_size]
        frequencies = torch.stack(torch.meshgrid(*grid, indexing="ij"))
        phase = -2 * torch.pi * torch.einsum("ij,jdhw->dhw", rotation, frequencies)
        spectrum = torch.fft.fftn(self.weights_3d.float(), dim=(-3, -2, -1))
        return torch.fft.ifftn(spectrum * torch.polar(torch.ones_like(phase), phase), dim=(-3, -2, -1)).real

    def to_conv3d(self) -> nn.Conv3d:
        """The 3-D convolution whose weight is the kernel, bit for bit."""
        conv = nn.Conv3d(
            self.dim, self.out_dim, self.kernel_size, cube(self.stride), cube(self.padding), cube(self.dilation),
            self.groups, self.bias is not None, device=self.weights_3d.device, dtype=self.weights_3d.dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(self.weights_3d)
            if self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv

    @classmethod
    def from_conv3d(cls, conv: nn.Conv3d) -> "CrossDConv2d":
        """The way back: a fresh head around the kernel of a 3-D convolution.

        Raises BadInput where the kernel's depth is not its larger side, or padding is not by zeros.
        """
        padding = pixels_of_padding(conv)
        settings = (conv.kernel_size, conv.stride, conv.dilation, padding)
        if any(cube(size[1:]) != tuple(size) for size in settings):
            raise BadInput("a Cross-D convolution takes a 3-D convolution that is as deep as its larger side")
        new = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size[1:], conv.stride[1:], padding[1:],
            conv.dilation[1:], conv.groups, conv.bias is not None,
        ).to(conv.weight)  # fmt: skip
        with torch.no_grad():
            new.weights_3d.copy_(conv.weight)
            if conv.bias is not None:
                new.bias.copy_(conv.bias)
        return new

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.out_dim}, kernel_size={self.kernel_size}, stride={self.stride}, groups={self.groups}"


class RotatedConv2d(CrossDConv2d):
    """The ablation: the kernel is truly rotated about its centre, by trilinear interpolation, zero outside."""

    def slicer(self, axis: Float[Tensor, "n 3"], angle: Float[Tensor, " n"]) -> Float[Tensor, "n voxel pixel"]:
        grid = self._grid(axis)
        sources = grid[self.kernel_size[0] // 2].flatten(0, 1) @ rotation_of(axis, angle)  # n, pixel, 3: R^T p
        distance = sources[:, None] - grid.flatten(0, 2)[:, None]
        return (1 - distance.abs()).clamp_min(0).prod(-1)

    def moved(self, axis: Float[Tensor, " 3"], angle: Float[Tensor, ""]) -> Float[Tensor, "o i kd kh kw"]:
        sources = self._grid(axis) @ rotation_of(axis[None], angle[None])[0]
        places = (2 * sources / torch.tensor(self.kernel_size).to(axis)).flip(-1)[None]
        weights = self.weights_3d.float().flatten(0, 1)[None]
        return F.grid_sample(weights, places, align_corners=False)[0].view_as(self.weights_3d)

    def _grid(self, like: Tensor) -> Float[Tensor, "kd kh kw 3"]:
        """Each voxel's place, seen from the centre."""
        axes = [torch.arange(size, device=like.device, dtype=like.dtype) - (size - 1) / 2 for size in self.kernel_size]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def rotation_of(axis: Float[Tensor, "n 3"], angle: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    """Rodrigues' formula: I + sin(theta) [k]_x + (1 - cos(theta)) [k]_x^2."""
    k, theta = skew(axis), angle[:, None, None]
    return torch.eye(3).to(axis) + theta.sin() * k + (1 - theta.cos()) * k @ k


def _product(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of complex numbers as real and imaginary parts, which every exporter takes."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def convert(network: nn.Module, layer: type[CrossDConv2d] = CrossDConv2d) -> nn.Module:
    """A copy of a network for images with every `nn.Conv2d` replaced by a fresh Cross-D convolution."""

    def rule(conv: nn.Module) -> nn.Module | None:
        if not isinstance(conv, nn.Conv2d):
            return None
        return layer(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, pixels_of_padding(conv), conv.dilation,
            conv.groups, conv.bias is not None,
        )  # fmt: skip

    return with_layers_replaced(network, rule)[0]


def to_3d(network: nn.Module) -> nn.Module:
    """The network for volumes (n, c, d, h, w): every Cross-D convolution as a 3-D one with its kernel.

    Norms keep their statistics. Raises BadInput for layers that have no form for volumes, such as a plain Conv2d.
    """
    return volumetric(network, lambda module: module.to_conv3d() if isinstance(module, CrossDConv2d) else None)


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints: the head's first bias goes into the norm behind it, heads of 1x1 kernels are dropped."""
    mapped = dict(state)
    for name in [n for n in state if n.endswith("rotation_params.0.bias")]:
        mapped[name.replace("0.bias", "1.running_mean")] = state[name.replace("0.bias", "1.running_mean")] - state[name]
        del mapped[name]
        prefix = name.removesuffix("rotation_params.0.bias")
        if state[prefix + "weights_3d"].shape[2:].numel() == 1:
            mapped = {n: t for n, t in mapped.items() if not n.startswith(prefix + "rotation_params.")}
    return mapped
