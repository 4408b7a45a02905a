"""Self-attention inside windows of s x s tokens that do not overlap: local, and linear in the map.

The windowed half of Swin (Liu et al. 2021, arXiv:2103.14030) without its shift and bias, and the locally-grouped
attention of Twins (Chu et al. 2021, arXiv:2104.13840, section 3.2). A baseline. Sides that the window does not divide
are filled up with zeros, which are attended to as in Twins. Names of parameters follow timm's `twins`.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers import init_weights_
from opsin.layers.windows import merge, pad_to_windows, partition
from opsin.ops.attention.heads import heads_of


class WindowAttention(nn.Module):
    """(N, C, H, W) -> the same.

    Args: num_heads, by default of about 32 channels (see `heads_of`); window_size, tokens per side of a window.
    Raises BadInput where the heads do not divide the channels, or the window is empty.
    """

    def __init__(self, dim: int, num_heads: int | None = None, window_size: int = 4):
        super().__init__()
        self.num_heads, self.window = heads_of(dim, num_heads), (window_size, window_size)
        if window_size < 1:
            raise BadInput(f"window_size={window_size} is empty; a window has at least one token per side")
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        init_weights_(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        height, width = x.shape[2:]
        padded = pad_to_windows(x.permute(0, 2, 3, 1), self.window)
        mixed = merge(self.attend(partition(padded, self.window)), self.window, padded.shape[1:3])
        return self.proj(mixed[:, :height, :width]).permute(0, 3, 1, 2)

    def attend(self, windows: Float[Tensor, "n windows t c"]) -> Float[Tensor, "n windows t c"]:
        """Attention inside every window, before the last projection."""
        q, k, v = rearrange(self.qkv(windows), "n w t (three h d) -> three (n w) h t d", three=3, h=self.num_heads)
        return rearrange(short_attention(q, k, v), "(n w) h t d -> n w t (h d)", w=windows.shape[1])

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Attention over the whole map under the mask of pairs that share a window."""
        height, width = x.shape[2:]
        padded = pad_to_windows(x.permute(0, 2, 3, 1), self.window)
        rows, columns = (torch.arange(s, device=x.device) // w for s, w in zip(padded.shape[1:3], self.window))
        number = (rows[:, None] * (columns[-1] + 1) + columns).flatten()
        q, k, v = rearrange(self.qkv(padded), "n h w (three g d) -> three n g (h w) d", three=3, g=self.num_heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=number[:, None] == number)
        mixed = rearrange(mixed, "n g (h w) d -> n h w (g d)", h=padded.shape[1])
        return self.proj(mixed[:, :height, :width]).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window[0]}"


def short_attention(
    q: Float[Tensor, "n h t d"], k: Float[Tensor, "n h s d"], v: Float[Tensor, "n h s d"]
) -> Float[Tensor, "n h t d"]:
    """Attention to few tokens: fused, but for half precision on a CPU, where the fused backward is far slower."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
