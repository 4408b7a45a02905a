"""The graph convolutional network, the yardstick for deeper ones: every layer transforms, then averages once.

    H_{l+1} = ReLU(A^ H_l W_l)

Depth and number of transformations are the same thing here, which is what decoupled networks take apart.
"""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from opsin.science.graphs import propagate
from opsin.science.mlp import DropLinear


class Gcn(nn.Module):
    """`layers` graph convolutions of width `hidden`, dropout before each.

    forward(features, adjacency): features (n, f), dense or sparse; the normalised adjacency (n, n), sparse.
    """

    def __init__(
        self, in_features: int = 1433, hidden: int = 64, num_classes: int = 7, layers: int = 2, dropout: float = 0.5
    ):
        super().__init__()
        widths = (in_features, *[hidden] * (layers - 1), num_classes)
        self.layers = nn.ModuleList(DropLinear(a, b, dropout) for a, b in pairwise(widths))

    def forward(self, features: Float[Tensor, "n f"], adjacency: Float[Tensor, "n n"]) -> Float[Tensor, "n k"]:
        x = features
        for layer in self.layers[:-1]:
            x = propagate(adjacency, layer(x)).relu()
        return propagate(adjacency, self.layers[-1](x))
