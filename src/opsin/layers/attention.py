"""Multi-head self-attention over a sequence of tokens (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

softmax(scale * q k^T + bias) v,   scale = head_dim ** -0.5
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """(N, T, C) -> the same.

    `scale` is read at every call: dividing it by T is a softmax temperature of T. `attention_map` gives the weights
    that `forward` applies.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Float[Tensor, "n t c"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, heads, T, C / heads)."""
        n, t, c = x.shape
        return self.qkv(x).view(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def attention_map(
        self, x: Float[Tensor, "n t c"], bias: Float[Tensor, "#n #heads t t"] | None = None
    ) -> Float[Tensor, "n heads t t"]:
        """The softmax weights; row i says where token i looks."""
        q, k, _ = self.heads(x)
        logits = self.scale * (q @ k.transpose(-2, -1))
        return (logits if bias is None else logits + bias).softmax(-1)

    def forward(
        self, x: Float[Tensor, "n t c"], bias: Float[Tensor, "#n #heads t t"] | None = None
    ) -> Float[Tensor, "n t c"]:
        q, k, v = self.heads(x)
        bias = None if bias is None else bias.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.proj(x.transpose(1, 2).flatten(2))
