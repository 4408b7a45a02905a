"""The claim: a deep CNN learns a target at the rate of the patch that it depends on, and its own functions slowly.

Exact: the closed form against the tangent kernel of finite nets, arc-cosine kernels, positivity, the tree's symmetry,
the spectrum's exponents. Learned: Gaussian fields of depth 1, 2, 3 on eight numbers (four circles), by the NTK of
depth 3 and by a fully connected net's.
"""

import statistics
from math import pi

import torch
from torch import Tensor

from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.theory.hierarchical_nets import LocNet, empirical_ntk
from opsin.theory.kernel_regression import gram_spectrum, learning_curves, power_law, product_of_spheres
from opsin.theory.wide_cnn_learnability import HierarchicalKernel, fully_connected_kernel, predicted_beta

FILTERS = (2, 2, 2)
DIM, TEST, FIELDS = 8, 2048, 2
SIZES = (128, 256, 512, 1024, 2048)
STUDENT, DENSE = "CNN (2,2,2)", "fully connected"


def monte_carlo_error(width: int, inits: int, x: Tensor) -> float:
    """Relative error (Frobenius) of the mean tangent kernel of finite nets against the closed form."""
    kernel = HierarchicalKernel(FILTERS)
    exact = kernel(x.double())
    mean = torch.stack([empirical_ntk(LocNet(DIM, FILTERS, width), x.float()) for _ in range(inits)]).mean(0)
    return float((mean.double() / kernel.limit_scale - exact).norm() / exact.norm())


def fully_connected_by_hand(x: Tensor, depth: int) -> Tensor:
    """The usual recursion on unit vectors, written without the tree."""
    cosine = (x @ x.T) / x.square().sum(1)[0]
    theta = cosine
    for _ in range(depth):
        angle = torch.arccos(cosine.clamp(-1, 1))
        theta = (1 - angle / pi) * theta + (angle.sin() + (pi - angle) * angle.cos()) / pi
        cosine = (angle.sin() + (pi - angle) * angle.cos()) / pi
    return theta


def circle_exponent(kernel: str, points: int = 1024) -> float:
    """Decay of the distinct eigenvalues (each twice) of depth 1, s = 2, over frequencies 4 ... 60 on one circle."""
    angle = torch.arange(points, dtype=torch.float64) * 2 * pi / points
    circle = torch.stack((angle.cos(), angle.sin()), 1)
    sorted_values = gram_spectrum(HierarchicalKernel((2,), kernel)(circle))[3:61]  # type: ignore[arg-type]
    frequencies = torch.arange(2, 60, 2)  # odd ones beyond 1 vanish: the net has no bias
    return power_law(frequencies[1:], sorted_values[::2][1:])


def exact_properties(experiment: Experiment) -> None:
    torch.manual_seed(0)
    kernel, x = HierarchicalKernel(FILTERS), product_of_spheres(256, DIM, 2)
    error = monte_carlo_error(width=2000, inits=20, x=x[:3])
    experiment.check(
        "closed form against 20 locally connected nets of width 2000 (relative Frobenius error)", error, "<", 0.02
    )
    dense = fully_connected_kernel(DIM, 3)(x)
    error = float((dense - fully_connected_by_hand(x, 3)).abs().max())
    experiment.check("one patch equals the fully connected NTK (max error)", error, "<", 1e-6)
    experiment.check("smallest eigenvalue of the NTK matrix", float(gram_spectrum(kernel(x))[-1]), ">=", 0.0)
    swapped = x.reshape(-1, 2, 2, 2).flip(2).flatten(1)
    error = float((kernel(x) - kernel(swapped)).abs().max())
    experiment.check("siblings swapped in both inputs leave the kernel as it is (max error)", error, "<", 1e-12)
    for name, published in (("ntk", -2.0), ("nngp", -4.0)):
        slope = circle_exponent(name)
        experiment.record(f"decay of the {name} eigenvalues on a circle", slope)
        experiment.check(f"{name} eigenvalue exponent, distance from {published:g}", abs(slope - published), "<", 0.2)


def run(budget: ClaimBudget) -> Evidence:
    draws = range(12 if budget.seconds >= 120 else 3)
    experiment = Experiment(
        "wide_cnn_learnability",
        "The error of a deep CNN kernel falls at a rate set by the patch that the target depends on; functions of the "
        "deep CNN itself are learnt slowly; a fully connected kernel does not adapt.",
        data="Gaussian random fields on products of four circles", baseline="fully connected NTK of the same depth",
        seeds=draws,
    )  # fmt: skip
    exact_properties(experiment)

    student = HierarchicalKernel(FILTERS)
    teachers = {"(2)": HierarchicalKernel(FILTERS[:1]), "(2,2)": HierarchicalKernel(FILTERS[:2]), "(2,2,2)": student}
    students = {STUDENT: student, DENSE: fully_connected_kernel(DIM, 3)}
    curves = []
    for seed in draws:
        generator = torch.Generator().manual_seed(seed)
        x = product_of_spheres(SIZES[-1] + TEST, DIM, 2, generator)
        curves.append(learning_curves(teachers, students, x, SIZES, FIELDS, generator))
    means = {
        pair: [statistics.fmean(draw[pair].errors[i] for draw in curves) for i in range(len(SIZES))]
        for pair in curves[0]
    }
    for (teacher, name), values in means.items():
        experiment.record(f"error of {name} on teacher {teacher} at P = {SIZES}", values)
        experiment.record(f"fitted beta of {name} on teacher {teacher}", -power_law(SIZES, values))
        experiment.record(
            f"its beta over the last octave of P, {name} on {teacher}", -power_law(SIZES[-2:], values[-2:])
        )
    experiment.record("beta predicted", {name: predicted_beta(kernel, student) for name, kernel in teachers.items()})

    for shallow, deep in (("(2)", "(2,2)"), ("(2,2)", "(2,2,2)")):
        for i, size in enumerate(SIZES):
            errors = {t: [draw[t, STUDENT].errors[i] for draw in curves] for t in (shallow, deep)}
            experiment.compare(
                f"P = {size}: error on teacher {deep} over that on {shallow}", errors[deep], errors[shallow], 0.0
            )
        betas = {t: [draw[t, STUDENT].exponent for draw in curves] for t in (shallow, deep)}
        experiment.compare(f"beta of teacher {shallow} over that of {deep}", betas[shallow], betas[deep], 0.0)
    first, last = ([draw[t, STUDENT].exponent for draw in curves] for t in ("(2)", "(2,2,2)"))
    experiment.compare("beta of teacher (2) less that of (2,2,2)", first, last, 0.3)
    ratio = means["(2)", DENSE][-1] / means["(2)", STUDENT][-1]
    experiment.check("fully connected over CNN error on teacher (2) at P = 2048", ratio, ">=", 2.0)
    return experiment.evidence(
        budget,
        notes=f"{len(draws)} draws of points, {FIELDS} fields each, P up to {SIZES[-1]}, {TEST} test points, float64. "
        "The margin of 0.3 between the fitted exponents comes from a pilot of four draws with P up to 1024; theory has "
        "1, 1/2, 1/4 for P to infinity, and the fit over these P is pre-asymptotic.",
    )
