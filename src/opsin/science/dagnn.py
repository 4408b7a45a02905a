"""DAGNN: transform once, propagate many hops, and let every node weigh its own hops.

Liu, Gao & Ji 2020, "Towards Deeper Graph Neural Networks", arXiv:2007.09296. What hurts deep graph networks is less
that averaging over neighbours makes nodes alike than that every layer averages *and* transforms. So (section 5.1)

    Z   = MLP(X)                                     class scores, (n, c)
    H_l = A^^l Z,   l = 0..K                         one multiplication by A^ per hop
    out = sum_l sigmoid(H_l w + b) H_l               a gate per node and hop; w is shared, gates do not sum to one

Time is linear in K and in the edges; the parameters do not depend on K. `opsin.science.graphs` has the smoothness
metric and the closed forms of what infinitely many hops lead to.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.science.graphs import Graph, NodeRun, fit_nodes, propagate
from opsin.science.mlp import DropLinear

VARIANTS = {
    "dagnn_cora": dict(in_features=1433, num_classes=7, hops=10, dropout=0.8),
    "dagnn_citeseer": dict(in_features=3703, num_classes=6, hops=10, dropout=0.5),
    "dagnn_pubmed": dict(in_features=500, num_classes=3, hops=20, dropout=0.8),
    "dagnn_arxiv": dict(in_features=128, num_classes=40, hops=16, dropout=0.2, hidden=256, batch_norm=True),
}
WEIGHT_DECAY = {"cora": 5e-3, "citeseer": 2e-2, "pubmed": 5e-3}  # as published, per graph


class AdaptiveHops(nn.Module):
    """sum_l sigmoid(w . A^^l z + b) A^^l z over l = 0..hops (eqs. 8 to 12)."""

    def __init__(self, channels: int, hops: int):
        super().__init__()
        self.hops = hops
        self.proj = nn.Linear(channels, 1)

    def hop_features(self, z: Float[Tensor, "n c"], adjacency: Float[Tensor, "n n"]) -> Float[Tensor, "n l c"]:
        """z, A^ z, A^^2 z, ... up to `hops`."""
        maps = [z]
        for _ in range(self.hops):
            maps.append(propagate(adjacency, maps[-1]))
        return torch.stack(maps, 1)

    def gates(self, maps: Float[Tensor, "n l c"]) -> Float[Tensor, "n l 1"]:
        """How much of each hop a node keeps, in (0, 1)."""
        return self.proj(maps).sigmoid()

    def forward(self, z: Float[Tensor, "n c"], adjacency: Float[Tensor, "n n"]) -> Float[Tensor, "n c"]:
        maps = self.hop_features(z, adjacency)
        return (self.gates(maps) * maps).sum(1)


class Dagnn(nn.Module):
    """Deep adaptive graph neural network.

    forward(features, adjacency) -> logits of every node. features: (n, f), dense or sparse COO; adjacency: the
    symmetric normalised one with self-loops, sparse (`graphs.symmetric_adjacency`).
    Args: hops, K; dropout, before both linear layers; batch_norm, after the first (as on ogbn-arxiv).
    """

    def __init__(
        self, in_features: int = 1433, num_classes: int = 7, hops: int = 10, hidden: int = 64, dropout: float = 0.8,
        batch_norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.lin1 = DropLinear(in_features, hidden, dropout)
        self.norm = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
        self.lin2 = DropLinear(hidden, num_classes, dropout)
        self.prop = AdaptiveHops(num_classes, hops)

    def transform(self, features: Float[Tensor, "n f"]) -> Float[Tensor, "n c"]:
        """Z, the class scores of each node by itself."""
        return self.lin2(self.norm(self.lin1(features)).relu())

    def forward(self, features: Float[Tensor, "n f"], adjacency: Float[Tensor, "n n"]) -> Float[Tensor, "n c"]:
        return self.prop(self.transform(features), adjacency)


def fit(model: nn.Module, graph: Graph, *, seed: int = 0, epochs: int = 1000, patience: int = 100) -> NodeRun:
    """Trains as published: Adam, learning rate 0.01, the graph's own weight decay, early stop on validation loss."""
    decay = WEIGHT_DECAY.get(graph.name, 5e-3)
    return fit_nodes(model, graph, weight_decay=decay, epochs=epochs, patience=patience, seed=seed)
