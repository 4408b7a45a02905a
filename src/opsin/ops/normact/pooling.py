"""Pooling as a mixer (PoolFormer, Yu et al. 2022, arXiv:2111.11418, eq. 4): the local mean less the token itself."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Pooling(nn.Module):
    """(N, C, H, W) -> the same, without parameters; the block's residual adds the token back. Odd `kernel_size`."""

    def __init__(self, dim: int, kernel_size: int = 3):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        k = self.kernel_size
        return F.avg_pool2d(x, k, stride=1, padding=k // 2, count_include_pad=False) - x
