"""Swin Transformer: attention inside windows, which are shifted in every second block so that they talk to each other.

Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv:2103.14030. With
windows of M x M tokens the cost is linear in the pixels, 4 hw C^2 + 2 M^2 hw C (eq. 2), and each window computes

    softmax(q k^T / sqrt(d) + B + mask) v                                    (eq. 4)

where B depends on the offset of two tokens. A shift is a cyclic roll by half a window; the mask keeps those tokens
apart that the roll alone brought together. Stages are joined by merging 2 x 2 tokens.

Swin-MLP (from the authors' repository) puts a linear map over the positions of a window, one per head, in place of the
attention, and shifts by padding.

Names of parameters follow timm's; `remap` takes the original checkpoints.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones import Backbone, FeatureInfo
from opsin.errors import BadInput
from opsin.layers import Attention, DropPath, Mlp, PatchEmbed, drop_path_rates, init_weights_
from opsin.layers.relative_position import relative_position_index, resize_table
from opsin.layers.windows import Shift, merge, pad_to_windows, partition, shift_for


class WindowAttention(Attention):
    """Attention among the tokens of each window, with a learned bias per offset and head (eq. 4)."""

    no_weight_decay = ("relative_position_bias_table",)

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int]):
        super().__init__(dim, num_heads)
        self.window = window
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(*window), persistent=False)

    def set_window(self, window: tuple[int, int]) -> None:
        """Interpolates the table to another window."""
        table = self.relative_position_bias_table
        resized = resize_table(table.data, self.window, window)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.relative_position_index = relative_position_index(*window, device=table.device)
        self.window = window

    def position_bias(self) -> Float[Tensor, "1 heads t t"]:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]

    def forward(
        self, x: Float[Tensor, "n windows t c"], mask: Float[Tensor, "windows t t"] | None = None
    ) -> Float[Tensor, "n windows t c"]:
        n, windows, t, c = x.shape
        bias = self.position_bias()
        if mask is None:
            return super().forward(x.flatten(0, 1), bias).view(n, windows, t, c)
        q, k, v = (rearrange(z, "(n w) h t d -> n (w h) t d", n=n) for z in self.heads(x.flatten(0, 1)))
        bias = (bias + mask[:, None]).flatten(0, 1).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=self.scale)
        return self.proj(rearrange(x, "n (w h) t d -> n w t (h d)", w=windows))


class SwinBlock(nn.Module):
    """x + windows' attention(LN x), then x + MLP(LN x) (eq. 3)."""

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int], mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def set_window(self, window: tuple[int, int]) -> None:
        self.attn.set_window(window)

    def forward(self, x: Float[Tensor, "n h w c"], shift: Shift | None = None) -> Float[Tensor, "n h w c"]:
        x = x + self.drop_path(self.attend(self.norm1(x), shift))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Float[Tensor, "n h w c"], shift: Shift | None) -> Float[Tensor, "n h w c"]:
        """Attention in the windows of the rolled map, rolled back."""
        height, width = x.shape[1:3]
        x = pad_to_windows(x, self.attn.window)
        size = (x.shape[1], x.shape[2])
        if shift is None:
            x = merge(self.attn(partition(x, self.attn.window)), self.attn.window, size)
        else:
            x = x.roll((-shift.rows, -shift.columns), (1, 2))
            x = merge(self.attn(partition(x, self.attn.window), shift.mask), self.attn.window, size)
            x = x.roll((shift.rows, shift.columns), (1, 2))
        return x[:, :height, :width]

    def reference(self, x: Float[Tensor, "n h w c"], shift: Shift) -> Float[Tensor, "n h w c"]:
        """`attend` with a shift, written out: the map is framed, and border windows attend to what they hold of it.

        For maps whose sides are multiples of the window.
        """
        height, width = x.shape[1:3]
        (a, b), window = self.attn.window, self.attn.window
        top, left = (-shift.rows % a, -shift.columns % b)
        frame = (left, shift.columns, top, shift.rows)
        inside = F.pad(x.new_ones(1, height, width), frame)[..., None]
        x = F.pad(x, (0, 0, *frame))
        absent = partition(inside, window)[0, :, None, :, 0].expand(-1, a * b, -1) == 0
        x = self.attn(partition(x, window), torch.zeros_like(absent, dtype=x.dtype).masked_fill(absent, -1e9))
        x = merge(x, window, (height + top + shift.rows, width + left + shift.columns))
        return x[:, top : top + height, left : left + width]


class SwinMlpBlock(nn.Module):
    """A linear map over the positions of each window, its own per head, in place of the attention."""

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int], mlp_ratio: float, drop_path: float):
        super().__init__()
        self.window, self.num_heads = window, num_heads
        features = num_heads * window[0] * window[1]
        self.norm1 = nn.LayerNorm(dim)
        self.spatial_mlp = nn.Conv1d(features, features, 1, groups=num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def set_window(self, window: tuple[int, int]) -> None:
        """Raises BadInput where the window changes: its size is in the weights."""
        if window != self.window:
            raise BadInput(f"Swin-MLP keeps its window of {self.window} tokens, {window} needs a new network")

    def forward(self, x: Float[Tensor, "n h w c"], shift: Shift | None = None) -> Float[Tensor, "n h w c"]:
        x = x + self.drop_path(self.mix(self.norm1(x), shift))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mix(self, x: Float[Tensor, "n h w c"], shift: Shift | None) -> Float[Tensor, "n h w c"]:
        """The map over positions; a shift frames the map with zeros, so that it stays in its border windows alone."""
        height, width = x.shape[1:3]
        top, left = (-shift.rows % self.window[0], -shift.columns % self.window[1]) if shift else (0, 0)
        x = pad_to_windows(F.pad(x, (0, 0, left, 0, top, 0)), self.window)
        windows = partition(x, self.window)
        heads = rearrange(windows, "n w t (g d) -> (n w) (g t) d", g=self.num_heads)
        mixed = rearrange(self.spatial_mlp(heads), "(n w) (g t) d -> n w t (g d)", n=len(x), g=self.num_heads)
        x = merge(mixed, self.window, (x.shape[1], x.shape[2]))
        return x[:, top : top + height, left : left + width]


class PatchMerging(nn.Module):
    """Halves a map: 2 x 2 tokens, column by column, to one of `dim` channels."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim_in)
        self.reduction = nn.Linear(4 * dim_in, dim, bias=False)

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h2 w2 c2"]:
        x = rearrange(pad_to_windows(x, (2, 2)), "n (h a) (w b) c -> n h w (b a c)", a=2, b=2)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Patch merging (not in the first stage), then blocks, of which the odd ones see shifted windows."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], window: tuple[int, int]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.window = window

    def set_window(self, window: tuple[int, int]) -> None:
        for block in self.blocks:
            block.set_window(window)
        self.window = window

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h2 w2 c2"]:
        x = self.downsample(x)
        shift = shift_for((x.shape[1], x.shape[2]), self.window, x.device)
        for number, block in enumerate(self.blocks):
            x = block(x, shift if number % 2 else None)
        return x


class SwinTransformer(Backbone):
    """Swin for classification, or its pyramid at strides 4, 8, 16, 32, the last map normalised.

    Args:
        dim: channels of the first stage; depths and num_heads per stage.
        window_size: tokens; a stage whose map is smaller takes the map as its window.
        image_size: pixels, one number or (height, width); decides those smaller windows. Other sizes work too: maps
            are padded to multiples of the window.
        block: SwinBlock, or SwinMlpBlock for Swin-MLP; drop_path: the last block's rate.
    """

    def __init__(
        self, dim: int = 96, depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7, patch_size: int = 4, image_size: int | tuple[int, int] = 224, mlp_ratio: float = 4.0,
        num_classes: int = 1000, in_chans: int = 3, drop_path: float = 0.0,
        block: type[SwinBlock] | type[SwinMlpBlock] = SwinBlock,
    ):  # fmt: skip
        super().__init__()
        dims = [dim * 2**i for i in range(len(depths))]
        self.num_classes, self.num_features, self.window_size = num_classes, dims[-1], window_size
        self.feature_info = [FeatureInfo(d, patch_size * 2**i) for i, d in enumerate(dims)]
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, nn.LayerNorm)
        self.layers = nn.ModuleList()
        windows = self._windows(image_size, window_size)
        for i, rates in enumerate(drop_path_rates(drop_path, depths)):
            downsample = PatchMerging(dims[i - 1], dims[i]) if i else nn.Identity()
            blocks = [block(dims[i], num_heads[i], windows[i], mlp_ratio, rate) for rate in rates]
            self.layers.append(Stage(downsample, blocks, windows[i]))
        self.norm = nn.LayerNorm(dims[-1])
        fc = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.head = nn.Sequential(OrderedDict(fc=fc))
        init_weights_(self.layers)
        init_weights_(self.head)

    def _windows(self, image_size: int | tuple[int, int], window_size: int) -> list[tuple[int, int]]:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        strides = [info.stride for info in self.feature_info]
        return [(min(window_size, -(-height // s)), min(window_size, -(-width // s))) for s in strides]

    def set_input_size(self, image_size: int | tuple[int, int], window_size: int | None = None) -> None:
        """Chooses the windows as at construction; where they change, the bias tables are interpolated (bicubic)."""
        self.window_size = window_size or self.window_size
        for stage, window in zip(self.layers, self._windows(image_size, self.window_size), strict=True):
            stage.set_window(window)

    def embed(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n h2 w2 c"]:
        """The tokens of the patches: where a pre-trainer puts its mask tokens."""
        return self.patch_embed(x)

    def encode(self, tokens: Float[Tensor, "n h w c"]) -> list[Float[Tensor, "n _c _h _w"]]:
        """The rest of the network on (possibly masked) tokens: the maps of `features`."""
        maps = []
        for stage in self.layers:
            tokens = stage(tokens)
            maps.append(tokens)
        maps[-1] = self.norm(maps[-1])
        return [x.permute(0, 3, 1, 2) for x in maps]

    def features(self, x: Float[Tensor, "n k h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        return self.encode(self.embed(x))

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.head(x.mean((2, 3)))


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the original checkpoints, which merge patches at the end of a stage, to ours; timm's pass unchanged."""
    state = {name: t for name, t in state.items() if not name.endswith(("relative_position_index", "attn_mask"))}
    if "layers.0.downsample.reduction.weight" not in state:
        return state
    moved = {
        re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name): tensor
        for name, tensor in state.items()
    }
    return {re.sub(r"^head\.", "head.fc.", name): tensor for name, tensor in moved.items()}


TINY, SMALL = dict(dim=96), dict(dim=96, depths=(2, 2, 18, 2))
BASE = dict(dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
LARGE = dict(dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48))
LARGER_INPUT = dict(window_size=12, image_size=384)
MLP_TINY = dict(block=SwinMlpBlock, window_size=8, image_size=256)
VARIANTS = {
    "swin_tiny_patch4_window7_224": TINY,
    "swin_small_patch4_window7_224": SMALL,
    "swin_base_patch4_window7_224": BASE,
    "swin_base_patch4_window12_384": BASE | LARGER_INPUT,
    "swin_large_patch4_window7_224": LARGE,
    "swin_large_patch4_window12_384": LARGE | LARGER_INPUT,
    "swin_mlp_tiny_c24": MLP_TINY | dict(num_heads=(4, 8, 16, 32)),
    "swin_mlp_tiny_c12": MLP_TINY | dict(num_heads=(8, 16, 32, 64)),
    "swin_mlp_tiny_c6": MLP_TINY | dict(num_heads=(16, 32, 64, 128)),
    "swin_mlp_base": BASE | dict(block=SwinMlpBlock),
}
