"""T2T-ViT: neighbouring tokens are joined step by step, so that a transformer's tokens know their surroundings.

Yuan et al. 2021, "Tokens-to-Token ViT", arXiv:2101.11986. Instead of one patch per token, an image is unfolded into
overlapping windows three times, and between the unfoldings the tokens attend to each other in few channels (section
3.1). At that length softmax attention would be dear, so a kernel takes its place, linear in the tokens:

    exp(q.k) ~ phi(q).phi(k),   phi(x) = exp(W x - |x|^2 / 2) / sqrt(m),   rows of W orthogonal
    y = phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K))

Then a deep and narrow ViT. With `norm="unified"` every layer norm is a UnifiedNorm (Yang et al. 2022,
arXiv:2208.01313). Names of parameters follow the official repository, yitu-opensource/T2T-ViT.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones import Backbone, FeatureInfo
from opsin.errors import BadInput
from opsin.layers import Attention, DropPath, Mlp, drop_path_rates, init_weights_
from opsin.ops.normact.unified_norm import UnifiedNorm

Norm = Callable[[int], nn.Module]
NORMS: dict[str, Norm] = {"layer": nn.LayerNorm, "unified": lambda dim: UnifiedNorm(dim, channels_last=True)}

VARIANTS = {
    "t2t_vit_7": dict(dim=256, depth=7, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_10": dict(dim=256, depth=10, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_12": dict(dim=256, depth=12, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_14": dict(dim=384, depth=14, num_heads=6),
    "t2t_vit_14_un": dict(dim=384, depth=14, num_heads=6, norm="unified"),
    "t2t_vit_19": dict(dim=448, depth=19, num_heads=7),
    "t2t_vit_24": dict(dim=512, depth=24, num_heads=8),
}


class TokenPerformer(nn.Module):
    """(N, T, dim) -> (N, T, out): linear attention with one head and half as many random features as channels."""

    def __init__(self, dim: int, out: int, norm: Norm, drop: float = 0.1):
        super().__init__()
        features = out // 2
        self.norm1, self.kqv = norm(dim), nn.Linear(dim, 3 * out)
        self.proj, self.dp = nn.Linear(out, out), nn.Dropout(drop)
        self.norm2 = norm(out)
        self.mlp = nn.Sequential(nn.Linear(out, out), nn.GELU(), nn.Linear(out, out), nn.Dropout(drop))
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(features, out)) * math.sqrt(features))

    def phi(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t m"]:
        """Positive features whose products approximate exp(x.y)."""
        x, w = x.float(), self.w.float()
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(w))

    def attention(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c2"]:
        """The values, plus what they become by attention: the input is too wide to be added."""
        k, q, v = self.kqv(x).chunk(3, -1)
        k, q = self.phi(k), self.phi(q)
        context = k.transpose(1, 2) @ v.float()
        y = q @ context / (q @ k.sum(1)[..., None] + 1e-8)
        return v + self.dp(self.proj(y.to(v.dtype)))

    def forward(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c2"]:
        x = self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """(N, in_chans, H, W) -> (N, dim, H/16, W/16): unfold by 4, 2 and 2 with overlap, attending in between."""

    def __init__(self, in_chans: int, dim: int, token_dim: int, norm: Norm):
        super().__init__()
        self.attention1 = TokenPerformer(49 * in_chans, token_dim, norm)
        self.attention2 = TokenPerformer(9 * token_dim, token_dim, norm)
        self.project = nn.Linear(9 * token_dim, dim)

    def forward(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n c h2 w2"]:
        x = self.step(x, self.attention1, 7, 4)
        x = self.step(x, self.attention2, 3, 2)
        return self.step(x, self.project, 3, 2)

    def step(self, x: Float[Tensor, "n c h w"], layer: nn.Module, kernel: int, stride: int) -> Float[Tensor, "n d u v"]:
        """Overlapping windows become tokens, and what the layer makes of them a map again."""
        pad = (kernel - stride + 1) // 2
        rows, columns = ((side + 2 * pad - kernel) // stride + 1 for side in x.shape[2:])
        tokens = layer(F.unfold(x, kernel, padding=pad, stride=stride).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, norm: Norm):
        super().__init__()
        self.norm1, self.attn = norm(dim), Attention(dim, num_heads, qkv_bias=False)
        self.norm2, self.mlp = norm(dim), Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def sinusoids(positions: int, dim: int) -> Float[Tensor, "1 t c"]:
    """sin and cos of position / 10000^(2i / dim), interleaved."""
    wave = torch.arange(positions)[:, None] / 10000 ** (torch.arange(dim, dtype=torch.float64) // 2 * 2 / dim)
    return torch.where(torch.arange(dim) % 2 == 0, wave.sin(), wave.cos()).float()[None]


class T2TViT(Backbone):
    """T2T-ViT for classification, or four maps of stride 16 from the quarters of its depth.

    Args:
        token_dim: channels between the unfoldings; image_size: pixels, one number or (height, width). Other sizes work
            too: positions are interpolated.
        norm: "layer", or "unified" for UnifiedNorm in the place of all layer norms.
    Raises BadInput where the norm is neither.
    """

    no_weight_decay = ("cls_token",)

    def __init__(
        self, dim: int = 384, depth: int = 14, num_heads: int = 6, mlp_ratio: float = 3.0, token_dim: int = 64,
        image_size: int | tuple[int, int] = 224, num_classes: int = 1000, in_chans: int = 3, drop_path: float = 0.0,
        norm: Literal["layer", "unified"] = "layer",
    ):  # fmt: skip
        super().__init__()
        if norm not in NORMS:
            raise BadInput(f"norm='{norm}' is none of {', '.join(NORMS)}, the norms of T2T-ViT")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = (max(1, height // 16), max(1, width // 16))
        self.num_classes, self.num_features = num_classes, dim
        self.taps = sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)})
        self.feature_info = [FeatureInfo(dim, 16) for _ in self.taps]
        self.tokens_to_token = TokensToToken(in_chans, dim, token_dim, NORMS[norm])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sinusoids(1 + self.grid[0] * self.grid[1], dim))
        rates = drop_path_rates(drop_path, (depth,))[0]
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, rate, NORMS[norm]) for rate in rates)
        self.norm = NORMS[norm](dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        init_weights_(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 t c"]:
        """The encoding of class token and patches; those of another grid are interpolated."""
        if grid == self.grid:
            return self.pos_embed
        plane = self.pos_embed[:, 1:].float().transpose(1, 2).unflatten(2, self.grid)
        plane = F.interpolate(plane, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        return torch.cat((self.pos_embed[:, :1], plane.to(self.pos_embed.dtype)), 1)

    def _run(self, x: Float[Tensor, "n k h w"]) -> tuple[list[Float[Tensor, "n t c"]], tuple[int, int]]:
        """Class token and patches after the blocks numbered in `taps`, and the patches' grid."""
        patches = self.tokens_to_token(x)
        grid = (patches.shape[2], patches.shape[3])
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)), 1)
        tokens = tokens + self.positions(grid)
        outputs = []
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens)
            if number in self.taps:
                outputs.append(tokens)
        return outputs, grid

    def features(self, x: Float[Tensor, "n k h w"]) -> list[Float[Tensor, "n c h2 w2"]]:
        maps, grid = self._run(x)
        maps[-1] = self.norm(maps[-1])
        return [y[:, 1:].transpose(1, 2).unflatten(2, grid) for y in maps]

    def forward_features(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n t c"]:
        """Class token and patches after the last block, before the last norm."""
        return self._run(x)[0][-1]

    def forward_head(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n k"]:
        """The class token is all that is read, but in training a norm with batch statistics sees all tokens."""
        pooled = self.norm(x)[:, 0] if self.training else self.norm(x[:, 0])
        return self.head(pooled)
