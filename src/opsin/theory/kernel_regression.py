"""Learning with a kernel: random targets, ridgeless regression, learning curves and spectra. Everything in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import BadInput
from opsin.theory import Kernel

JITTER = 1e-10


def product_of_spheres(n: int, dim: int, patch: int, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
    """n points whose consecutive patches of `patch` numbers are uniform on unit spheres."""
    if dim % patch:
        raise BadInput(f"{dim} numbers do not divide into patches of {patch}")
    x = torch.randn(n, dim // patch, patch, dtype=torch.float64, generator=generator)
    return (x / x.norm(dim=-1, keepdim=True)).flatten(1)


def factor(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The Cholesky factor of a positive semi-definite matrix plus the least jitter that does, 1e-10 of its scale or up.

    Raises BadInput where the matrix is not positive semi-definite to 1e-6 of its scale.
    """
    scale = float(gram.diagonal().mean())
    for jitter in (JITTER, 1e-9, 1e-8, 1e-7, 1e-6):
        lower, failed = torch.linalg.cholesky_ex(gram + jitter * scale * torch.eye(len(gram), dtype=gram.dtype))
        if not failed:
            return lower
    raise BadInput(f"a {len(gram)}x{len(gram)} kernel matrix is not positive semi-definite; check its entries")


def gaussian_field(
    gram: Float[Tensor, "n n"], fields: int = 1, generator: torch.Generator | None = None
) -> Float[Tensor, "n f"]:
    """Values of independent Gaussian random fields whose covariance is `gram`: the teacher of section 4."""
    return factor(gram) @ torch.randn(len(gram), fields, dtype=gram.dtype, generator=generator)


def ridgeless_regression(
    gram: Float[Tensor, "p p"], cross: Float[Tensor, "m p"], targets: Float[Tensor, "p f"]
) -> Float[Tensor, "m f"]:
    """Predictions of the interpolating kernel predictor: cross gram^-1 targets."""
    return cross @ torch.cholesky_solve(targets, factor(gram))


@dataclass(frozen=True)
class LearningCurve:
    """Test error over the targets' variance, for each size of the training set."""

    sizes: tuple[int, ...]
    errors: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """beta of the least-squares fit error ~ P^-beta."""
        return -power_law(self.sizes, self.errors)


def learning_curves(
    teachers: Mapping[str, Kernel], students: Mapping[str, Kernel], x: Float[Tensor, "n d"], sizes: Sequence[int],
    fields: int = 1, generator: torch.Generator | None = None,
) -> dict[tuple[str, str], LearningCurve]:  # fmt: skip
    """Every student learns every teacher from the first P points of x, and is tested on those beyond the largest P.

    A teacher draws its fields on all points jointly; the error is averaged over them. Names give (teacher, student).
    """
    known = max(sizes)
    if known >= len(x):
        raise BadInput(f"{len(x)} points leave none for testing beyond the training set of {known}")
    targets = torch.cat([gaussian_field(kernel(x), fields, generator) for kernel in teachers.values()], 1)
    errors: dict[tuple[str, str], list[float]] = {(t, s): [] for t in teachers for s in students}
    for student, kernel in students.items():
        gram = kernel(x, x[:known])
        for size in sizes:
            guess = ridgeless_regression(gram[:size, :size], gram[known:, :size], targets[:size])
            relative = (guess - targets[known:]).square().mean(0) / targets[known:].square().mean(0)
            for teacher, error in zip(teachers, relative.split(fields), strict=True):
                errors[teacher, student].append(float(error.mean()))
    return {pair: LearningCurve(tuple(sizes), tuple(values)) for pair, values in errors.items()}


def gram_spectrum(gram: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Eigenvalues of gram / n, largest first: estimates of the kernel's eigenvalues."""
    return torch.linalg.eigvalsh(gram / len(gram)).flip(0)


def power_law(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> float:
    """The slope of log y over log x."""
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)[0])
