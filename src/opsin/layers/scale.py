"""Layer scale (Touvron et al. 2021, arXiv:2103.17239): a learned gain per channel on a residual branch."""

from jaxtyping import Float
from torch import Tensor, nn, ones


class LayerScale(nn.Module):
    """x * gamma on the last axis; gamma starts at `init`."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(init * ones(dim))

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        return x * self.gamma
