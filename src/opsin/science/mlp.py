"""A linear layer behind dropout whose input may be sparse: bags of words are 99 % zeros."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class DropLinear(nn.Linear):
    """Dropout of rate `dropout`, then a linear layer; x is (n, in), dense or sparse COO."""

    def __init__(self, in_features: int, out_features: int, dropout: float):
        super().__init__(in_features, out_features)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        if not x.is_sparse:
            return super().forward(F.dropout(x, self.dropout, self.training))
        x = x.coalesce()
        values = F.dropout(x.values(), self.dropout, self.training)
        kept = torch.sparse_coo_tensor(x.indices(), values, x.shape, is_coalesced=True, check_invariants=False)
        return torch.sparse.mm(kept, self.weight.T) + self.bias
