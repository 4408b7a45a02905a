"""A video as a network of time: grids of features in time, upsampling convolutions with temporal modulation.

Lee et al. 2023, "Coordinate-Aware Modulation for Neural Fields", arXiv:2311.14993, section 3.2, on the base of FFNeRV
(Lee et al. 2023, arXiv:2212.12294). A time t reads features from grids of several lengths; each block upsamples,

    h = GELU( gamma_t instance_norm(shuffle(conv(h))) + beta_t ),      gamma_t, beta_t per channel, linear in time

Two heads end it: a frame of its own, and flows that fetch what neighbouring frames already show. The two are blended
by learned weights. For compression all weights and grids are trained in k bits: sign(w) floor(|tanh w| n) / n with
n = 2^(k-1) - 1, whose gradient is passed through; heads keep 8 bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from opsin.errors import BadInput, TrainingFailed
from opsin.ops.normact.cam_neural_field import TemporalModulation

VARIANTS = {
    "cam_ffnerv_repr": {},
    "cam_ffnerv_compress": dict(
        dim=48, times=(300, 600), strides=(5, 3, 2, 2, 2), expansion=8, min_width=24, compact=True, bits=6, nodes=30
    ),
}
HEAD_BITS = 8
FULL = 32  # bits that mean no quantisation


def quantised(w: Tensor, bits: int) -> Tensor:
    """w in `bits` bits, as tanh(w) rounded towards zero; the gradient is that of tanh. 32 bits leave it alone."""
    if bits == FULL:
        return w
    levels = 2 ** (bits - 1) - 1
    bounded = w.tanh()
    rounded = (bounded.abs() * levels).floor() / levels * bounded.sign()
    return bounded + (rounded - bounded).detach()


class QuantisedConv2d(nn.Conv2d):
    """A convolution whose weight and bias are used in `bits` bits."""

    def __init__(self, dim_in: int, dim: int, kernel_size: int, bits: int, groups: int = 1):
        super().__init__(dim_in, dim, kernel_size, padding=kernel_size // 2, groups=groups)
        self.bits = bits

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h w"]:
        return self._conv_forward(x, quantised(self.weight, self.bits), quantised(self.bias, self.bits))


class VideoBlock(nn.Module):
    """Upsampling by `stride`, and the modulation in time. A compact block splits its 3x3 convolution in 8 groups."""

    def __init__(self, dim_in: int, dim: int, stride: int, compact: bool, bits: int, nodes: int):
        super().__init__()
        wide = dim * stride**2
        grouped = compact and stride != 5 and dim_in % 8 == 0 and wide % 8 == 0
        self.conv1 = QuantisedConv2d(dim_in, wide, 3, bits, groups=8 if grouped else 1)
        self.conv2 = QuantisedConv2d(wide, wide, 1, bits) if grouped else nn.Identity()
        self.up_scale = nn.PixelShuffle(stride)
        self.norm, self.bits = TemporalModulation(dim, nodes), bits

    def forward(self, x: Float[Tensor, "n c h w"], times: Float[Tensor, " n"]) -> Float[Tensor, "n c2 h2 w2"]:
        x = self.up_scale(self.conv2(self.conv1(x)))
        return F.gelu(self.norm.modulated(x, times, quantised(self.norm.grid, self.bits)))


@dataclass
class Frames:
    """What the network says of some times: frames of its own, flows in pixels of their own map, and the weights."""

    own: Float[Tensor, "n 3 h w"]
    blend: Float[Tensor, "n 2 h w"]  # of the own frame and of the fetched one
    flows: Float[Tensor, "n a 2 h2 w2"]
    shares: Float[Tensor, "n a h w"]  # of the neighbours in the fetched frame

    def blended(self, neighbours: Float[Tensor, "n a 3 h w"]) -> tuple[Tensor, Tensor]:
        """The fetched frame and the final one, given the own frames of the neighbours."""
        warped = warp(neighbours.flatten(0, 1), self.flows.flatten(0, 1)).unflatten(0, neighbours.shape[:2])
        fetched = (warped * self.shares[:, :, None]).sum(1)
        return fetched, self.own * self.blend[:, :1] + fetched * self.blend[:, 1:]


def warp(images: Float[Tensor, "n c h w"], flow: Float[Tensor, "n 2 h2 w2"]) -> Float[Tensor, "n c h w"]:
    """images(p + flow(p)) for a flow (columns, rows) of a coarser map, the border repeated."""
    height, width = images.shape[2:]
    flow = F.interpolate(flow, (height, width), mode="bilinear") * (width / flow.shape[3])
    rows, columns = torch.meshgrid(torch.arange(height).to(flow), torch.arange(width).to(flow), indexing="ij")
    x = 2 * (columns + flow[:, 0]) / max(width - 1, 1) - 1
    y = 2 * (rows + flow[:, 1]) / max(height - 1, 1) - 1
    return F.grid_sample(images, torch.stack((x, y), -1), padding_mode="border", align_corners=True)


class VideoField(nn.Module):
    """Times (n) in [0, 1) to frames of `base` times the product of the strides.

    Args:
        base: (height, width) of the grids' features. dim: their channels, over all lengths. times: the grids' lengths.
        strides: of the blocks. expansion: channels of the first block over dim; then halved by each block, not below
        min_width. compact: blocks with grouped convolutions. bits: of weights and grids, 32 for none; 2 to 8.
        nodes: of the modulation in time. neighbours: frames to fetch from, relative.
    Raises BadInput for bits that are not possible, and lengths that do not divide dim.
    """

    def __init__(
        self, base: tuple[int, int] = (9, 16), dim: int = 156, times: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[int] = (5, 2, 2, 2, 2), expansion: int = 1, min_width: int = 96, compact: bool = False,
        bits: int = FULL, nodes: int = 60, neighbours: Sequence[int] = (-2, -1, 1, 2),
    ):  # fmt: skip
        super().__init__()
        if bits != FULL and not 2 <= bits <= 8:
            raise BadInput(f"bits={bits} is not possible; weights take 2 to 8 bits, or 32 for none")
        if dim % len(times) or len(strides) < 3:
            raise BadInput(f"dim={dim} must be a multiple of the {len(times)} grids, and strides at least 3")
        self.bits, self.neighbours = bits, tuple(neighbours)
        self.size = tuple(side * torch.Size(strides).numel() for side in base)
        self.grids = nn.ParameterList([torch.empty(length, dim // len(times), *base) for length in times])
        for grid in self.grids:
            nn.init.xavier_uniform_(grid)
        self.blocks, dim_in = nn.ModuleList(), dim
        for i, stride in enumerate(strides):
            dim_out = dim * expansion if i == 0 else max(dim_in // 2, min_width)
            self.blocks.append(VideoBlock(dim_in, dim_out, stride, compact, bits, nodes))
            dim_in = dim_out
            if i == len(strides) - 3:
                self.flow_head = QuantisedConv2d(dim_out, 3 * len(neighbours), 1, max(bits, HEAD_BITS))
        self.head = QuantisedConv2d(dim_in, 5, 1, max(bits, HEAD_BITS))

    def forward(self, times: Float[Tensor, " n"]) -> Frames:
        x = torch.cat([at_times(quantised(grid, self.bits), times) for grid in self.grids], 1)
        count = len(self.neighbours)
        for i, block in enumerate(self.blocks):
            x = block(x, times)
            if i == len(self.blocks) - 3:
                coarse = self.flow_head(x)
        own, blend = self.head(x).split((3, 2), 1)
        shares = F.interpolate(coarse[:, 2 * count :], own.shape[2:], mode="nearest").softmax(1)
        flows = coarse[:, : 2 * count].unflatten(1, (count, 2))
        return Frames(own.sigmoid(), blend.softmax(1), flows, shares)

    @torch.no_grad()
    def video(self, length: int, batch: int = 4) -> Float[Tensor, "length 3 h w"]:
        """All frames of a video of this length: first each one's own, then blended with what its neighbours show."""
        index = torch.arange(length, device=self.grids[0].device)
        said = [self(times) for times in (index / length).split(batch)]
        own = torch.cat([frames.own for frames in said])
        parts = zip(said, index.split(batch))
        return torch.cat([frames.blended(neighbours_of(own, i, self.neighbours))[1] for frames, i in parts])


def at_times(grid: Float[Tensor, "length c h w"], times: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Linear between the nodes of a grid; node i is at time i / length, and the last one holds to the end."""
    place = times * len(grid)
    left = (place + 1e-6).floor().long().clamp(0, len(grid) - 1)
    share = (place - left).clamp(0, 1)[:, None, None, None]
    return torch.lerp(grid[left], grid[(left + 1).clamp_max(len(grid) - 1)], share)


def neighbours_of(own: Float[Tensor, "l 3 h w"], index: Tensor, offsets: Sequence[int]) -> Float[Tensor, "n a 3 h w"]:
    """Frames at these offsets from each index; black beyond the ends."""
    places = index[:, None] + torch.tensor(offsets, device=index.device)
    inside = (places >= 0) & (places < len(own))
    return own[places.clamp(0, len(own) - 1)] * inside[..., None, None, None]


def frame_loss(frame: Tensor, target: Tensor) -> Tensor:
    """0.7 |difference| + 0.3 (1 - SSIM)."""
    similar = ssim(frame, target, data_range=1.0)
    assert isinstance(similar, Tensor)
    return 0.7 * (frame - target).abs().mean() + 0.3 * (1 - similar)


def fit_video(
    field: VideoField, frames: Float[Tensor, "length 3 h w"], *, epochs: int = 300, lr: float = 5e-4, seed: int = 0,
    on_epoch: Callable[[int, float], Any] = lambda *_: None,
) -> VideoField:  # fmt: skip
    """Trains a field on a video in [0, 1], frame by frame, with Adam and a cosine after a fifth of warm-up.

    The own and the fetched frame count a tenth each beside the final one; neighbours are as they were last seen. It
    trains where the field is.
    Raises BadInput where the frames are not of the field's size, TrainingFailed for a loss that is not a number.
    """
    if tuple(frames.shape[2:]) != field.size:
        raise BadInput(f"the field makes frames of {field.size}, and the video has {tuple(frames.shape[2:])}")
    frames, length = frames.to(field.grids[0].device), len(frames)
    optimiser = torch.optim.Adam(field.parameters(), lr, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * length, pct_start=0.2)
    seen, order = torch.zeros_like(frames), torch.Generator().manual_seed(seed)
    field.train()
    for epoch in range(epochs):
        total = 0.0
        for i in torch.randperm(length, generator=order).to(frames.device).split(1):
            said, target = field(i / length), frames[i]
            seen[i] = said.own.detach()
            fetched, final = said.blended(neighbours_of(seen, i, field.neighbours))
            loss = frame_loss(final, target) + 0.1 * (frame_loss(said.own, target) + frame_loss(fetched, target))
            if not loss.isfinite():
                raise TrainingFailed(f"the loss of the video is {loss.item()} in epoch {epoch}; take a smaller lr")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        on_epoch(epoch, total / length)
    return field.eval()


@torch.no_grad()
def coded_bits(field: VideoField) -> tuple[int, float]:
    """Bits of all weights as they are stored, and after ideal entropy coding of each tensor's values."""
    heads = {*field.head.parameters(), *field.flow_head.parameters()}
    stored, coded = 0, 0.0
    for parameter in field.parameters():
        bits = max(field.bits, HEAD_BITS) if parameter in heads else field.bits
        stored += bits * parameter.numel()
        _, counts = quantised(parameter, bits).flatten().unique(return_counts=True)
        shares = counts / counts.sum()
        coded += float(-(shares.log2() * counts).sum())
    return stored, coded
