"""Orthogonal convolutions: the identity and the bounds against explicit matrices, and where kernels exist."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.errors import BadInput
from opsin.ops.conv.orthogonal_conv import OrthogonalConv
from opsin.ops.conv.orthogonality import (
    case_of,
    existence,
    free_orthogonal_kernel,
    isometry_bounds,
    layer_matrix,
    middle_orthogonal_kernel,
    orthogonality_loss,
    singular_values,
    spectral_error,
    spectral_factor,
)
from opsin.recipes.orthogonality import Orthogonality

# filters, channels, taps, stride, outputs per axis: rows, columns and square ones, odd and even, with S N >= 2k - 1
CASES = [
    (2, 3, 3, 1, 6), (3, 2, 3, 1, 6), (2, 2, 3, 1, 5), (4, 2, 3, 2, 5), (9, 2, 3, 2, 5), (8, 2, 3, 2, 4),
    (3, 2, 5, 3, 4), (20, 2, 3, 2, 4), (5, 2, 4, 2, 5), (3, 2, 1, 2, 4),
]  # fmt: skip


def random_kernel(filters: int, channels: int, taps: int, axes: int) -> Tensor:
    return torch.randn(filters, channels, *[taps] * axes, dtype=torch.float64)


def matrix_error(weight: Tensor, side: int, stride: int, padding: str = "circular") -> Tensor:
    """T T^t - I or T^t T - I from the explicit matrix."""
    matrix = layer_matrix(weight, [side] * (weight.ndim - 2), stride, padding)
    rows = case_of(*weight.shape[:2], stride, weight.ndim - 2) == "rows"
    gram = matrix @ matrix.T if rows else matrix.T @ matrix
    return gram - torch.eye(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_identity_and_spectral_bound(case, axes):
    filters, channels, taps, stride, outputs = case
    weight = random_kernel(filters, channels, taps, axes)
    error = matrix_error(weight, stride * outputs, stride)
    loss = orthogonality_loss(weight, stride)
    assert float(error.square().sum()) == pytest.approx(float(outputs**axes * loss), rel=1e-11)
    spectral = float(torch.linalg.matrix_norm(error, 2))
    assert spectral**2 <= spectral_factor(weight.shape, stride) * float(loss) * (1 + 1e-12)
    assert spectral_error(weight, [stride * outputs] * axes, stride) == pytest.approx(spectral, rel=1e-10)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_singular_values_of_the_explicit_matrix(case, axes):
    filters, channels, taps, stride, outputs = case
    weight, size = random_kernel(filters, channels, taps, axes), [stride * outputs, stride * (outputs + 1)][:axes]
    expected = torch.linalg.svdvals(layer_matrix(weight, size, stride))
    ours = singular_values(weight, size, stride)
    assert ours.shape == (*(side // stride for side in size), min(filters, channels * stride**axes))
    assert torch.allclose(ours.flatten().sort(descending=True).values, expected, atol=1e-10)


def test_identity_needs_circular_padding_and_room():
    weight = random_kernel(2, 3, 3, 2)
    loss = float(orthogonality_loss(weight))
    exact = [
        float(matrix_error(weight, side, 1, p).square().sum()) / side**2 for side, p in ((5, "circular"), (6, "zero"))
    ]
    assert exact[0] == pytest.approx(loss) and abs(exact[1] / loss - 1) > 0.05
    tight = float(matrix_error(weight, 4, 1).square().sum()) / 16  # 4 < 2k - 1: filters meet around the torus
    assert abs(tight / loss - 1) > 0.01


def test_trap_orthonormal_filters_are_not_an_orthogonal_convolution():
    """What torch's parametrisation gives, and the padding of 1 that is usual for k = 3 sees less than all overlaps."""
    weight = nn.init.orthogonal_(torch.empty(4, 4, 3, 3, dtype=torch.float64))
    flat = weight.flatten(1)
    assert torch.allclose(flat @ flat.T, torch.eye(4, dtype=torch.float64)) and orthogonality_loss(weight) > 0.1
    far = torch.zeros(1, 1, 1, 5, dtype=torch.float64)
    far[..., 0] = far[..., 4] = 0.5**0.5
    assert float(orthogonality_loss(far[0])) == pytest.approx(0.5)  # overlaps at a shift of four
    near = nn.functional.conv1d(far[0], far[0], padding=1)
    assert float(near.square().sum()) == pytest.approx(1.0)  # and padding 1 sees none


def test_trap_columns_need_the_correction():
    weight = middle_orthogonal_kernel(12, 2, 3, 2)
    assert abs(float(orthogonality_loss(weight, 2))) < 1e-12
    gram = nn.functional.conv2d(weight, weight, stride=2, padding=2)
    gram[:, :, 1, 1] -= torch.eye(12, dtype=torch.float64)
    assert float(gram.square().sum()) == pytest.approx(12 - 2 * 4)


SIZES = [
    (4, 4, 3, 1),
    (8, 4, 3, 1),
    (2, 4, 3, 1),
    (16, 4, 3, 2),
    (5, 2, 5, 2),
    (20, 4, 5, 2),
    (9, 1, 3, 4),
    (1, 1, 3, 1),
]


@pytest.mark.parametrize("make", [free_orthogonal_kernel, middle_orthogonal_kernel])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_orthogonal_kernels_by_construction(make, size):
    """Wherever the theorem says that one exists, here is one; and its matrix is orthogonal."""
    filters, channels, taps, stride = size
    assert existence(*size).exists
    weight = make(*size)
    assert weight.shape == (filters, channels, taps, taps) and abs(float(orthogonality_loss(weight, stride))) < 1e-10
    assert matrix_error(weight, stride * (2 * taps), stride).abs().max() < 1e-10


def test_dense_start_uses_all_taps_and_delta_only_the_centre():
    free, middle = free_orthogonal_kernel(8, 8, 3), middle_orthogonal_kernel(8, 8, 3)
    assert free.abs().amax((0, 1)).min() > 0.02
    middle[:, :, 1, 1] = 0
    assert not middle.any()


def minimised(filters: int, channels: int, taps: int, stride: int, steps: int = 300) -> float:
    weight = nn.init.xavier_normal_(torch.empty(filters, channels, taps, taps)).requires_grad_()
    optimiser = torch.optim.Adam([weight], 0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = orthogonality_loss(weight, stride)
        loss.backward()
        optimiser.step()
    return float(loss.detach())


@pytest.mark.parametrize("size", [(6, 2, 1, 2), (5, 1, 2, 3), (12, 1, 2, 3), (5, 1, 1, 2)], ids=str)
def test_where_none_exists(size):
    """Rows with M > C k^d, and columns with S > k: says so, refuses to build one, and no descent finds one."""
    assert not existence(*size).exists and minimised(*size) > 0.05
    with pytest.raises(BadInput, match="no orthogonal kernel exists"):
        middle_orthogonal_kernel(*size)


def test_descent_finds_one_where_one_exists():
    assert minimised(4, 8, 3, 1) < 1e-3 and minimised(12, 2, 3, 2) < 1e-3


def test_other_paddings():
    assert existence(4, 8, 3, padding="zero").trivial and not existence(4, 8, 3).trivial
    assert existence(4, 8, 3, padding="valid").exists and not existence(8, 4, 3, padding="valid").exists
    assert existence(8, 4, 1, padding="valid").exists
    with pytest.raises(BadInput, match="stride=2 is not covered"):
        existence(8, 4, 3, 2, padding="zero")
    dense, middle = free_orthogonal_kernel(3, 3, 3), middle_orthogonal_kernel(3, 3, 3)
    assert matrix_error(dense, 6, 1, "zero").norm() > 0.5 and matrix_error(middle, 6, 1, "zero").norm() < 1e-12
    matrix = layer_matrix(free_orthogonal_kernel(6, 3, 3), (8, 8), 1, "valid")
    assert (
        len(matrix) > 192 and torch.linalg.matrix_norm(matrix.T @ matrix - torch.eye(192), 2) > 0.5
    )  # corners are nearly lost


def test_a_small_regulariser_bounds_the_isometry_at_every_size():
    weight = free_orthogonal_kernel(4, 4, 3) + 1e-4 * random_kernel(4, 4, 3, 2)
    low, high = isometry_bounds(weight)
    assert 0.9 < low < 1 < high < 1.1
    for side in (5, 8, 31):
        values = singular_values(weight, (side, side))
        assert low <= float(values.min()) and float(values.max()) <= high


@pytest.mark.parametrize("padding", ["circular", "zero", "valid"])
@pytest.mark.parametrize(("taps", "stride"), [(1, 1), (3, 1), (3, 2), (5, 3)])
def test_layer_is_the_definition(padding, taps, stride):
    op, x = OrthogonalConv(3, 5, taps, stride, padding, "glorot").double(), torch.randn(2, 3, 8, 11).double()
    assert torch.allclose(op(x), op.reference(x), atol=1e-10)
    matrix = layer_matrix(op.weight.detach(), (8, 11), stride, padding)
    assert torch.allclose(op(x).flatten(1), x.flatten(1) @ matrix.T, atol=1e-10)


def test_layer_keeps_norms_and_reports():
    op, x = opsin.create("orthogonal_conv", dim=6), torch.randn(2, 6, 9, 7)
    assert torch.allclose(op(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-4)
    assert (op.singular_values((9, 7)) - 1).abs().max() < 1e-5
    assert op.existence().exists and float(op.penalty().detach()) < 1e-8
    low, high = op.isometry_bounds()
    assert low > 0.98 and high < 1.02


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="kernel_size=4 is even"):
        OrthogonalConv(4, kernel_size=4)
    with pytest.raises(BadInput, match="init='xavier'"):
        OrthogonalConv(4, init="xavier")
    with pytest.raises(BadInput, match="too small for kernel_size=7"):
        OrthogonalConv(4, kernel_size=7)(torch.randn(1, 4, 2, 9))
    with pytest.raises(BadInput, match="padding='zero' has no singular values"):
        OrthogonalConv(4, padding="zero").singular_values((8, 8))
    with pytest.raises(BadInput, match="multiple of the stride 2"):
        singular_values(torch.randn(4, 4, 3, 3), (7, 7), 2)


def test_recipe_takes_what_can_be_orthogonal():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 3, dilation=2), nn.Conv2d(8, 16, 1, stride=2),
        nn.Conv2d(8, 16, 1), OrthogonalConv(4, 4), nn.Conv1d(2, 4, 5, stride=2), nn.Linear(3, 3),
    )  # fmt: skip
    assert list(Orthogonality().layers(net)) == [net[0], net[4], net[5], net[6]]
    assert list(Orthogonality(min_kernel_size=2).layers(net)) == [net[0], net[5], net[6]]
    expected = sum(orthogonality_loss(net[i].weight, s) for i, s in ((0, 1), (4, 1), (5, 1), (6, 2)))
    assert torch.allclose(Orthogonality().penalty(net), expected)
    net[0].weight.requires_grad_(False)
    assert net[0] not in list(Orthogonality().layers(net))
    with pytest.raises(BadInput, match="no convolution that could be orthogonal"):
        Orthogonality().penalty(nn.Linear(3, 3))
    with pytest.raises(BadInput, match="0 or more"):
        Orthogonality(-1)


def test_recipe_adds_its_gradient():
    net, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.randn(3, 2, 4, 4)
    twin = copy.deepcopy(net)
    net(x).square().sum().backward()
    Orthogonality(0.3).on_after_backward(None, net)
    (twin(x).square().sum() + 0.3 * orthogonality_loss(twin[0].weight)).backward()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)
    before = net[0].weight.grad.clone()
    Orthogonality(0).on_after_backward(None, net)
    assert torch.equal(net[0].weight.grad, before)
    net.zero_grad()
    for _ in range(4):  # the losses of batches that are accumulated are divided, too
        Orthogonality(0.3).on_after_backward(SimpleNamespace(accumulate_grad_batches=4), net)
    expected = torch.autograd.grad(0.3 * orthogonality_loss(net[0].weight), net[0].weight)[0]
    assert torch.allclose(net[0].weight.grad, expected, atol=1e-5)
