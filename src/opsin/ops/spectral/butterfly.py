"""Block FFTs with matrices that may be learned: FlashButterfly, arXiv:2302.06646, section 4.

The FFT of a power of two is the Monarch decomposition with factors of at most 16, the sizes that matrix units take.
Since a transform is then a handful of small matrices (2, 4, 8 and 16 square), those can become parameters: at the start
the exact DFT, later any map of that structure at the same cost.
"""

from typing import Literal

import torch
from jaxtyping import Complex
from torch import Tensor, nn

from opsin.errors import BadInput
from opsin.ops.spectral.monarch import Pair, complex_product, conjugate, inverse_permutation, roots, transform


def block_length(least: int) -> int:
    """The next power of two."""
    return 1 << max(0, least - 1).bit_length()


def block_factors(n: int, factor: int) -> tuple[int, ...]:
    """n as so many factors of `factor` as go into it, and what is left."""
    factors = []
    while n > factor:
        factors.append(factor)
        n //= factor
    return (*factors, n)


class BlockFFT(nn.Module):
    """The FFT along the last axis by products with small DFT matrices, trained or not.

    Args:
        factor: the largest matrix, a power of 2.
        learned: "fixed" for the exact FFT; "replaced" makes the matrices parameters; "additive" adds a parameter of
            0.01 N(0, 1) to each.
        dropout: rate of elements of what is learned. activation: applied to real and imaginary parts after each matrix.
    Parameters `mat_2`, `mat_4`, ... are (n, n, 2), real and imaginary. Raises BadInput: factor no power of 2.
    """

    def __init__(
        self, factor: int = 16, learned: Literal["fixed", "replaced", "additive"] = "replaced", dropout: float = 0.0,
        activation: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        if factor < 2 or factor != block_length(factor):
            raise BadInput(f"factor={factor} is no power of 2; block FFTs are made of matrices of 2, 4, 8, 16 ...")
        self.factor, self.learned = factor, learned
        self.drop, self.activation = nn.Dropout(dropout), activation
        sizes = [2**i for i in range(1, factor.bit_length())] if learned != "fixed" else []
        for n in sizes:
            self.register_parameter(f"mat_{n}", nn.Parameter(self._start(n)))

    def _start(self, n: int) -> Tensor:
        if self.learned == "additive":
            return 0.01 * torch.randn(n, n, 2)
        return torch.stack(roots(n, n, n, torch.empty(0).device, torch.get_default_dtype()), -1)

    @property
    def kernel_parameters(self) -> tuple[str, ...]:
        """The matrices train at the kernels' rate and are not decayed."""
        return tuple(name for name, _ in self.named_parameters(recurse=False))

    def no_weight_decay(self) -> tuple[str, ...]:
        return self.kernel_parameters

    def matrix(self, n: int, like: Tensor) -> Pair:
        """The n-point matrix, exact or learned."""
        exact = roots(n, n, n, like.device, like.dtype)
        if self.learned == "fixed" or n == 1:
            return exact
        learned = self.drop(getattr(self, f"mat_{n}")).to(like.dtype).unbind(-1)
        return (exact[0] + learned[0], exact[1] + learned[1]) if self.learned == "additive" else learned

    def _step(self, n: int, x: Pair, keep: int | None = None) -> Pair:
        rows = x[0].shape[-2]
        re, im = self.matrix(n, x[0])
        y = complex_product((re[:keep, :rows], im[:keep, :rows]), x, torch.matmul)
        return y if self.activation is None else (self.activation(y[0]), self.activation(y[1]))

    def forward(self, x: Tensor, n: int) -> Complex[Tensor, "*b n"]:
        """The transform of x (real or complex, zero-padded to n) in natural order. Raises BadInput: n no power of 2."""
        if n != block_length(n) or n < x.shape[-1]:
            raise BadInput(
                f"a block FFT of {x.shape[-1]} positions has a power of 2 as its size, at least that; not {n}"
            )
        factors = block_factors(n, self.factor)
        pair = (x.real, x.imag) if x.is_complex() else (x, None)
        re, im = transform(pair, factors, step=self._step)
        order = inverse_permutation(factors).to(re.device)
        return torch.complex(re[..., order], im[..., order])

    def inverse(self, x: Complex[Tensor, "*b n"]) -> Complex[Tensor, "*b n"]:
        """The conjugate transform over n: the inverse while the matrices are exact."""
        pair = conjugate((x.real, x.imag))
        return self(torch.complex(*pair), x.shape[-1]).conj() / x.shape[-1]
