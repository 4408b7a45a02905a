"""A small random graph with three communities."""

import pytest
import torch

from opsin.science.graphs import Graph


def block_graph(per_class: int = 40, classes: int = 3, seed: int = 0) -> Graph:
    """Dense inside a class, sparse between; features are noisy class indicators."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    chance = torch.where(labels[:, None] == labels, 0.15, 0.01)
    upper = (torch.rand(chance.shape, generator=random) < chance).triu(1)
    edges = (upper | upper.T).nonzero().T.contiguous()
    features = torch.nn.functional.one_hot(labels, 12).float() + torch.randn(len(labels), 12, generator=random)
    order = torch.randperm(len(labels), generator=random)
    return Graph("blocks", features, edges, labels, order[:30], order[30:60], order[60:])


@pytest.fixture
def graph() -> Graph:
    return block_graph()
