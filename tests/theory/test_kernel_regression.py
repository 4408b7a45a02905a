"""Gaussian fields, ridgeless regression, learning curves and power laws."""

import pytest
import torch

from opsin.errors import BadInput
from opsin.theory.kernel_regression import (
    factor,
    gaussian_field,
    gram_spectrum,
    learning_curves,
    power_law,
    product_of_spheres,
    ridgeless_regression,
)
from opsin.theory.wide_cnn_learnability import HierarchicalKernel, fully_connected_kernel


def test_points_lie_on_their_spheres():
    x = product_of_spheres(50, 12, 3)
    torch.testing.assert_close(x.reshape(50, 4, 3).norm(dim=2), torch.ones(50, 4).double())
    assert x.mean().abs() < 0.1
    with pytest.raises(BadInput, match="patches of 5"):
        product_of_spheres(3, 12, 5)


def test_fields_have_the_covariance():
    gram = HierarchicalKernel((2, 2))(product_of_spheres(6, 4, 2))
    fields = gaussian_field(gram, 40_000)
    assert (fields @ fields.T / 40_000 - gram).abs().max() < 0.1


def test_factor_takes_singular_matrices_and_refuses_indefinite_ones():
    v = torch.randn(8, 2).double()
    torch.testing.assert_close(factor(v @ v.T) @ factor(v @ v.T).T, v @ v.T, atol=1e-5, rtol=0)
    with pytest.raises(BadInput, match="positive semi-definite"):
        factor(torch.eye(3).double() - 2 * torch.ones(3, 3).double() / 3 * 1.5)


def test_regression_interpolates_and_agrees_with_the_formula():
    x = product_of_spheres(40, 8, 2)
    gram = HierarchicalKernel()(x)
    targets = torch.randn(30, 2).double()
    guess = ridgeless_regression(gram[:30, :30], gram[:, :30], targets)
    torch.testing.assert_close(guess[:30], targets, atol=1e-6, rtol=0)
    torch.testing.assert_close(guess, gram[:, :30] @ torch.linalg.inv(gram[:30, :30]) @ targets, atol=1e-6, rtol=0)


def test_spectrum_of_a_known_matrix():
    torch.testing.assert_close(
        gram_spectrum(torch.diag(torch.tensor([1.0, 4.0, 2.0]))), torch.tensor([4.0, 2.0, 1.0]) / 3
    )
    assert power_law([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_the_deep_cnn_adapts_to_a_local_target_and_the_dense_net_does_not():
    teachers = {"local": HierarchicalKernel((2,)), "global": HierarchicalKernel((2, 2, 2))}
    students = {"cnn": HierarchicalKernel((2, 2, 2)), "dense": fully_connected_kernel(8, 3)}
    x = product_of_spheres(600, 8, 2)
    curves = learning_curves(teachers, students, x, (50, 100, 200, 400), fields=8)
    local, whole, dense = curves["local", "cnn"], curves["global", "cnn"], curves["local", "dense"]
    assert all(a < b for a, b in zip(local.errors, whole.errors, strict=True))
    assert local.exponent > whole.exponent + 0.2
    assert dense.errors[-1] > 1.8 * local.errors[-1]


def test_test_points_are_required():
    with pytest.raises(BadInput, match="none for testing"):
        learning_curves({}, {}, torch.randn(64, 8), (64,))
