"""The two-layer perceptron of transformer-like blocks."""

from jaxtyping import Float
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, activation, Linear on the last axis."""

    def __init__(self, dim: int, hidden: int, act: type[nn.Module] = nn.GELU, bias: bool = True, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
