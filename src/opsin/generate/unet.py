"""The ADM U-Net: residual blocks that a noise embedding modulates, self-attention at low resolution, a skip per block.

Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233, in the form of Karras et
al. 2022 (arXiv:2206.00364, table 8), whose names parameters follow. Every encoder block leaves its output on a stack;
every decoder block but those that begin a level takes one off and concatenates it. Those concatenations are modules of
their own (`SkipConcat`), so that a trick can reach one skip without touching the network.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput


class SkipConcat(nn.Module):
    """Where a skip joins the decoder: (decoder map, skip) to their concatenation."""

    def forward(self, x: Float[Tensor, "n c h w"], skip: Float[Tensor, "n d h w"]) -> Float[Tensor, "n c+d h w"]:
        return torch.cat((x, skip), 1)


class NoiseEmbedding(nn.Module):
    """Cosines and sines of a number at geometrically spaced frequencies, from 1 down to 1 / max_positions."""

    def __init__(self, dim: int, max_positions: float = 10_000.0):
        super().__init__()
        self.dim, self.max_positions = dim, max_positions

    def forward(self, noise: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        half = self.dim // 2
        frequencies = self.max_positions ** (-torch.arange(half, device=noise.device, dtype=torch.float32) / half)
        angles = noise.float()[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), 1)


def group_norm(dim: int) -> nn.GroupNorm:
    """32 groups, or fewer where that leaves less than four channels in each."""
    return nn.GroupNorm(max(1, min(32, dim // 4)), dim, eps=1e-5)


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts by adding nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class Down(nn.Module):
    """Half the resolution: the mean of 2x2."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h/2 w/2"]:
        return F.avg_pool2d(x, 2)


class Up(nn.Module):
    """Twice the resolution: each pixel four times."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 2*h 2*w"]:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class UNetBlock(nn.Module):
    """x + conv1(silu((1 + scale) norm1(conv0(silu(norm0 x))) + shift)), then self-attention where heads > 0.

    (scale, shift) are linear in the embedding. `resample` acts before conv0 and on the shortcut.
    """

    def __init__(
        self, dim_in: int, dim: int, emb_dim: int, heads: int = 0, dropout: float = 0.0,
        resample: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.resample = resample or nn.Identity()
        self.norm0 = group_norm(dim_in)
        self.conv0 = nn.Conv2d(dim_in, dim, 3, padding=1)
        self.affine = nn.Linear(emb_dim, 2 * dim)
        self.norm1 = group_norm(dim)
        self.conv1 = zero_init(nn.Conv2d(dim, dim, 3, padding=1))
        self.skip = nn.Conv2d(dim_in, dim, 1) if dim != dim_in else nn.Identity()
        if heads:
            self.norm2 = group_norm(dim)
            self.qkv = nn.Conv2d(dim, 3 * dim, 1)
            self.proj = zero_init(nn.Conv2d(dim, dim, 1))

    def forward(self, x: Float[Tensor, "n c h w"], emb: Float[Tensor, "n e"]) -> Float[Tensor, "n d h2 w2"]:
        y = self.conv0(self.resample(F.silu(self.norm0(x))))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        y = F.silu(torch.addcmul(shift, self.norm1(y), scale + 1))
        y = self.conv1(F.dropout(y, self.dropout, self.training))
        y = y + self.skip(self.resample(x))
        return y + self._attend(y) if self.heads else y

    def _attend(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(n, self.heads, c // self.heads, 3, h * w)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).unbind(0)  # each (n, heads, h w, c / heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(2, 3).reshape(n, c, h, w))


class UNet(nn.Module):
    """The network F(x; noise, label) inside a preconditioned denoiser.

    Args:
        image_size: the resolution it is trained at; others work if they divide by 2^(levels - 1).
        channels, channel_mult: width of level i is channels * channel_mult[i]; num_blocks per level.
        attn_resolutions: sizes of the maps that self-attention sees, with head_dim channels per head.
        num_classes: 0 for no label; label_dropout, the chance of training a sample without its label.
    """

    def __init__(
        self, image_size: int, in_chans: int = 3, num_classes: int = 0, channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4), num_blocks: int = 3, attn_resolutions: Sequence[int] = (32, 16, 8),
        head_dim: int = 64, dropout: float = 0.1, label_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.label_dropout, self.levels = num_classes, label_dropout, len(channel_mult)
        if image_size % 2 ** (self.levels - 1):
            raise BadInput(f"image_size={image_size} cannot be halved {self.levels - 1} times for {channel_mult}")
        emb_dim = 4 * channels

        def block(dim_in: int, dim: int, attends: bool = False, resample: nn.Module | None = None) -> UNetBlock:
            return UNetBlock(dim_in, dim, emb_dim, max(1, dim // head_dim) if attends else 0, dropout, resample)

        self.map_noise = NoiseEmbedding(channels)
        self.map_layer0 = nn.Linear(channels, emb_dim)
        self.map_layer1 = nn.Linear(emb_dim, emb_dim)
        self.map_label = nn.Linear(num_classes, emb_dim, bias=False) if num_classes else None
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

        levels = [(image_size >> i, channels * mult) for i, mult in enumerate(channel_mult)]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips, dim = [], levels[0][1]
        for i, (size, width) in enumerate(levels):
            first = block(dim, dim, resample=Down()) if i else nn.Conv2d(in_chans, dim, 3, padding=1)
            self.enc[f"{size}x{size}_{'down' if i else 'conv'}"] = first
            skips.append(dim)
            for j in range(num_blocks):
                self.enc[f"{size}x{size}_block{j}"] = block(dim, width, size in attn_resolutions)
                dim = width
                skips.append(dim)
        for i, (size, width) in reversed(list(enumerate(levels))):
            if i == self.levels - 1:
                self.dec[f"{size}x{size}_in0"] = block(dim, dim, attends=True)
                self.dec[f"{size}x{size}_in1"] = block(dim, dim)
            else:
                self.dec[f"{size}x{size}_up"] = block(dim, dim, resample=Up())
            for j in range(num_blocks + 1):
                self.dec[f"{size}x{size}_block{j}"] = block(dim + skips.pop(), width, size in attn_resolutions)
                dim = width
        self.joins = nn.ModuleList(SkipConcat() for _ in self.enc)  # innermost first, as the decoder meets them
        self.out_norm = group_norm(dim)
        self.out_conv = zero_init(nn.Conv2d(dim, in_chans, 3, padding=1))

    def skip_points(self) -> list[nn.Module]:
        """The joins that a trick may patch, innermost (lowest resolution) first; one per skip, not per level."""
        return list(self.joins)

    def embed(self, noise: Float[Tensor, " n"], labels: Float[Tensor, "n k"] | None) -> Float[Tensor, "n e"]:
        """The vector that modulates every block."""
        emb = self.map_layer1(F.silu(self.map_layer0(self.map_noise(noise).to(self.map_layer0.weight.dtype))))
        if self.map_label is not None and labels is not None:
            if self.training and self.label_dropout:
                labels = labels * (torch.rand(len(labels), 1, device=labels.device) >= self.label_dropout)
            emb = emb + self.map_label(labels.to(emb.dtype))
        return F.silu(emb)

    def forward(
        self, x: Float[Tensor, "n c h w"], noise: Float[Tensor, " n"], labels: Float[Tensor, "n k"] | None = None
    ) -> Float[Tensor, "n c h w"]:
        """noise: the noise level's number c_noise; labels: one-hot, zero rows for no label.

        Raises BadInput where the size cannot be halved often enough.
        """
        if x.shape[2] % 2 ** (self.levels - 1) or x.shape[3] % 2 ** (self.levels - 1):
            raise BadInput(f"a map of {x.shape[2]}x{x.shape[3]} cannot be halved {self.levels - 1} times")
        emb = self.embed(noise, labels)
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        joins = iter(self.joins)
        for name, block in self.dec.items():
            if "_block" in name:
                x = next(joins)(x, skips.pop())
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))
