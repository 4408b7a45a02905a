"""Low-bit trainable matrices: full-precision master weights seen through a few codes.

The codes are those that minimise the mean absolute error on a standard normal variable: every code is the median of its
bin, and every boundary lies midway between two codes (binary adapters, arXiv:2307.16867, section 4.2). With
mean m and standard deviation s of the whole matrix:

    W_eff = q((W - m) / (s + 1e-5)) s + m,   dq/dw = 1 (straight through)
"""

from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput

BITS = (1, 2, 4, 8)


@cache
def codebook(bits: int) -> tuple[float, ...]:
    """The 2^bits codes for N(0, 1) in rising order, by alternating midpoints and medians until they stand still.

    Symmetric, and +-0.67449 for one bit. Raises BadInput for other numbers of bits than 1, 2, 4, 8.
    """
    if bits not in BITS:
        raise BadInput(f"adapters are stored in 1, 2, 4 or 8 bits, not {bits}")
    count = 2**bits
    codes = norm.ppf((np.arange(count) + 0.5) / count)
    for _ in range(500):
        middles = (codes[1:] + codes[:-1]) / 2
        shares = np.concatenate(([0.0], norm.cdf(middles), [1.0]))
        codes = norm.ppf((shares[1:] + shares[:-1]) / 2)
    return tuple(float(code) for code in (codes - codes[::-1]) / 2)


def code_indices(weight: Tensor, bits: int) -> tuple[Int[Tensor, "o i"], Tensor, Tensor]:
    """Which code each weight takes (ties go up), with the matrix's mean and standard deviation."""
    mean, std = weight.mean(), weight.std()
    codes = torch.tensor(codebook(bits), dtype=weight.dtype, device=weight.device)
    boundaries = (codes[1:] + codes[:-1]) / 2
    return torch.bucketize(((weight - mean) / (std + 1e-5)).detach(), boundaries, right=True), mean, std


class QLinear(nn.Linear):
    """A linear layer without bias whose weights are `bits`-bit codes in the forward pass, and full in the optimiser."""

    def __init__(self, dim_in: int, dim_out: int, bits: int = 1):
        super().__init__(dim_in, dim_out, bias=False)
        codebook(bits)
        self.bits = bits

    def effective_weight(self) -> Float[Tensor, "o i"]:
        """The quantised matrix; gradients reach the master weights straight through, and through mean and deviation."""
        index, mean, std = code_indices(self.weight, self.bits)
        codes = torch.tensor(codebook(self.bits), dtype=self.weight.dtype, device=self.weight.device)
        w = (self.weight - mean) / (std + 1e-5)
        quantised = codes[index] + (w - w.detach())
        return quantised * std + mean

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return F.linear(x, self.effective_weight())

    def frozen(self) -> nn.Linear:
        """A plain linear layer with the quantised weights."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight.data.copy_(self.effective_weight().detach())
        return plain.to(self.weight.device)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"
