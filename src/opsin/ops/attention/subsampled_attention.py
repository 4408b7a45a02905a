"""Global attention whose keys and values come from a map that a strided convolution has made small.

The spatial reduction of PVT (Wang et al. 2021, arXiv:2102.12122, eq. 1-3), as the global sub-sampled attention of Twins
(Chu et al. 2021, arXiv:2104.13840, section 3.2) has it. A baseline: s x s tokens become one key, and the cost falls by
s^2. Names of parameters follow timm's `twins`.
"""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers import init_weights_
from opsin.ops.attention.heads import heads_of


class SubsampledAttention(nn.Module):
    """(N, C, H, W) -> the same.

    Sides that `sr_ratio` does not divide are filled up with zeros before the reduction. Where a side is shorter than
    two ratios, the convolution moves by half of the side, so that there is still something to choose from.

    Args:
        num_heads: by default of about 32 channels (see `heads_of`).
        sr_ratio: tokens per side that become one key; 1 for attention to all tokens.
    Raises BadInput where the heads do not divide the channels, or the ratio is below 1.
    """

    def __init__(self, dim: int, num_heads: int | None = None, sr_ratio: int = 4):
        super().__init__()
        if sr_ratio < 1:
            raise BadInput(f"sr_ratio={sr_ratio} reduces nothing; it is the side of what becomes one key, at least 1")
        self.num_heads, self.sr_ratio = heads_of(dim, num_heads), sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if sr_ratio > 1 else None
        init_weights_(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        tokens = x.permute(0, 2, 3, 1)
        q = rearrange(self.q(tokens), "n y x (h d) -> n h (y x) d", h=self.num_heads)
        k, v = rearrange(self.kv(self.reduced(x)), "n y x (two h d) -> two n h (y x) d", two=2, h=self.num_heads)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)")
        return self.proj(mixed).unflatten(1, tokens.shape[1:3]).permute(0, 3, 1, 2)

    def reduced(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n h2 w2 c"]:
        """The tokens that keys and values are made of."""
        if self.sr is None or self.norm is None:
            return x.permute(0, 2, 3, 1)
        steps = [min(self.sr_ratio, max(1, side // 2)) for side in x.shape[2:]]
        needed = [(-(-side // step) - 1) * step + self.sr_ratio for side, step in zip(x.shape[2:], steps, strict=True)]
        padded = F.pad(x, (0, max(0, needed[1] - x.shape[3]), 0, max(0, needed[0] - x.shape[2])))
        return self.norm(F.conv2d(padded, self.sr.weight, self.sr.bias, steps).permute(0, 2, 3, 1))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, sr_ratio={self.sr_ratio}"
