"""Multi-head self-attention over all positions (Vaswani et al. 2017, arXiv:1706.03762): the global baseline."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.ops.attention.heads import heads_of


class SelfAttention(nn.Module):
    """(N, C, H, W) -> the same; by default heads of about 32 channels (see `heads_of`).

    Raises BadInput where the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int | None = None, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = heads_of(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = rearrange(self.qkv(tokens), "n x (three heads d) -> three n heads x d", three=3, heads=self.num_heads)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "n heads x d -> n x (heads d)")
        return self.proj(out).transpose(1, 2).unflatten(2, x.shape[2:])
