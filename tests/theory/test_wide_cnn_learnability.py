"""The hierarchical kernels against independent formulas, finite nets and the paper's exponents."""

from math import pi

import pytest
import torch

import opsin
from opsin.errors import BadInput
from opsin.theory import Kernel
from opsin.theory.hierarchical_nets import ConvNet, LocNet, empirical_ntk
from opsin.theory.kernel_regression import power_law, product_of_spheres
from opsin.theory.wide_cnn_learnability import HierarchicalKernel, fully_connected_kernel, predicted_beta


def k1(t):
    angle = torch.arccos(t.clamp(-1, 1))
    return (angle.sin() + (pi - angle) * angle.cos()) / pi


def k0(t):
    return 1 - torch.arccos(t.clamp(-1, 1)) / pi


def by_hand(x, y, filters):
    """The recursion for one pair of 1-D inputs, node by node."""
    s = filters[0]
    patches = [(a / a.norm()) @ (b / b.norm()) for a, b in zip(x.split(s), y.split(s), strict=True)]
    nodes = [(c, c) for c in patches]
    for siblings in (*filters[1:], None):
        nodes = [(k1(c), k0(c) * theta + k1(c)) for c, theta in nodes]
        width = siblings or len(nodes)
        groups = [nodes[i : i + width] for i in range(0, len(nodes), width)]
        nodes = [tuple(torch.stack(part).mean() for part in zip(*group, strict=True)) for group in groups]
    return nodes[0]


@pytest.mark.parametrize("filters", [(2,), (3, 2), (2, 3, 2), (4, 3), (12,), (2, 2, 3)])
def test_recursion_node_by_node(filters):
    x, y = torch.randn(4, 12).double(), torch.randn(3, 12).double()
    for kind, part in (("nngp", 0), ("ntk", 1)):
        expected = torch.stack([torch.stack([by_hand(a, b, filters)[part] for b in y]) for a in x])
        torch.testing.assert_close(HierarchicalKernel(filters, kind)(x, y), expected, rtol=0, atol=1e-12)


def test_created_from_the_catalogue_and_a_kernel():
    kernel = opsin.create("wide_cnn_learnability", filter_sizes=(2, 2), kernel="nngp")
    assert isinstance(kernel, Kernel)
    assert kernel(torch.randn(5, 8)).shape == (5, 5)
    assert kernel(torch.randn(5, 8), torch.randn(2, 8)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_positive_semidefinite_symmetric_and_constant_on_the_diagonal(kind):
    x = product_of_spheres(200, 12, 3)
    kernel = HierarchicalKernel((3, 2, 2), kind)
    gram = kernel(x)
    assert torch.linalg.eigvalsh(gram)[0] > -1e-9
    torch.testing.assert_close(gram, gram.T)
    torch.testing.assert_close(kernel(x, x).diagonal(), torch.full((200,), kernel.variance).double(), atol=1e-6, rtol=0)


def test_one_patch_is_the_fully_connected_kernel():
    x = torch.nn.functional.normalize(torch.randn(6, 10).double())
    cosine = theta = x @ x.T
    for _ in range(4):
        theta, cosine = k0(cosine) * theta + k1(cosine), k1(cosine)
    torch.testing.assert_close(fully_connected_kernel(10, 4)(x), theta, atol=1e-6, rtol=0)


def test_depth_one_adds_up_over_patches_but_depth_two_does_not():
    x, y = product_of_spheres(5, 8, 2), product_of_spheres(4, 8, 2)
    patches = [HierarchicalKernel((2,))(a, b) for a, b in zip(x.split(2, 1), y.split(2, 1), strict=True)]
    mean = torch.stack(patches).mean(0)
    torch.testing.assert_close(HierarchicalKernel((2,))(x, y), mean)
    assert (HierarchicalKernel((2, 2))(x, y) - mean).abs().max() > 0.1


def test_siblings_may_swap_cousins_may_not():
    x = product_of_spheres(20, 8, 2)
    kernel = HierarchicalKernel((2, 2, 2))
    siblings = x.reshape(20, 2, 2, 2).flip(2).flatten(1)
    cousins = x.reshape(20, 4, 2)[:, [0, 2, 1, 3]].flatten(1)
    torch.testing.assert_close(kernel(siblings), kernel(x), atol=1e-12, rtol=0)
    assert (kernel(cousins) - kernel(x)).abs().max() > 1e-3


def test_images_of_height_one_are_sequences_and_trees_of_images_nest():
    x = torch.randn(3, 1, 1, 8).double()
    flat = HierarchicalKernel((2, 2))(x.flatten(1))
    torch.testing.assert_close(HierarchicalKernel(((1, 2), (1, 2)), dims=2)(x), flat)
    image = torch.randn(3, 2, 8, 8).double()
    blocks = image.reshape(3, 2, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(3, 4, 2, 4, 4)
    of_blocks = [HierarchicalKernel((2, 2), dims=2, in_chans=2)(block) for block in blocks.unbind(1)]
    whole = HierarchicalKernel((2, 2), dims=2, in_chans=2)(image)
    torch.testing.assert_close(whole, torch.stack(of_blocks).mean(0))
    grey = image[:, :1]
    torch.testing.assert_close(
        HierarchicalKernel((2, 2), dims=2)(grey.flatten(1)), HierarchicalKernel((2, 2), dims=2)(grey)
    )


def test_blocks_change_nothing(monkeypatch):
    x, y = product_of_spheres(33, 8, 2), product_of_spheres(7, 8, 2)
    whole = HierarchicalKernel()(x, y)
    monkeypatch.setattr("opsin.theory.wide_cnn_learnability.BLOCK", 60)
    torch.testing.assert_close(HierarchicalKernel()(x, y), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("net", [LocNet, ConvNet])
def test_finite_nets_have_this_limit(net):
    x = product_of_spheres(4, 8, 2).float()
    kernel = HierarchicalKernel((2, 2, 2))
    mean = torch.stack([empirical_ntk(net(8, (2, 2, 2), width=256), x) for _ in range(16)]).mean(0)
    assert (mean / kernel.limit_scale - kernel(x)).norm() / kernel(x).norm() < 0.08


def test_finite_nets_on_images():
    x = torch.randn(3, 2, 4, 4)
    patches = x.reshape(3, 2, 2, 2, 2, 2)
    x = (patches / patches.square().sum((1, 3, 5), keepdim=True).sqrt()).reshape_as(x)
    kernel = HierarchicalKernel((2, 2), dims=2, in_chans=2)
    nets = [ConvNet(4, (2, 2), width=256, dims=2, in_chans=2) for _ in range(20)]
    mean = torch.stack([empirical_ntk(net, x) for net in nets]).mean(0)
    assert (mean / kernel.limit_scale - kernel(x)).norm() / kernel(x).norm() < 0.06


def test_the_random_output_has_the_nngp_covariance():
    x = product_of_spheres(3, 8, 2).float()
    kernel = HierarchicalKernel((2, 2, 2), "nngp")
    outputs = torch.stack([LocNet(8, (2, 2, 2), width=64)(x).detach() for _ in range(2500)])
    assert (outputs.T @ outputs / 2500 / kernel.limit_scale - kernel(x)).abs().max() < 0.1


def test_shared_layer_is_a_strided_convolution_and_the_local_one_has_weights_per_position():
    net = ConvNet(8, (2, 2), width=5)
    x = torch.randn(3, 1, 1, 8)
    weight = net.layers[0].weight
    convolved = torch.nn.functional.conv2d(x, weight[0].reshape(5, 1, 1, 2), stride=(1, 2)) / 2**0.5
    torch.testing.assert_close(net.layers[0](x), convolved.relu())
    assert weight.shape == (1, 5, 2) and LocNet(8, (2, 2), width=5).layers[0].weight.shape == (4, 5, 2)


def test_empirical_ntk_of_a_linear_net():
    net = torch.nn.Linear(4, 1)
    x, y = torch.randn(3, 4), torch.randn(2, 4)
    torch.testing.assert_close(empirical_ntk(net, x, y), x @ y.T + 1)


def circle(points):
    angle = torch.arange(points).double() * 2 * pi / points
    return torch.stack((angle.cos(), angle.sin()), 1)


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_eigenvalues_fall_as_predicted(kind):
    kernel, points = HierarchicalKernel((2, 2), kind), circle(64)
    one = torch.fft.fft(HierarchicalKernel((2,), kind)(circle(512))[0]).real / 512
    frequencies = torch.arange(4, 60, 2)
    assert -power_law(frequencies, one[frequencies]) == pytest.approx(kernel.eigenvalue_exponent(1), abs=0.15)
    torus = torch.cat((points.repeat_interleave(64, 0), points.repeat(64, 1)), 1)
    two = torch.fft.fft2(kernel(torus[:1], torus).reshape(64, 64)).real / 64**2
    frequencies = torch.arange(4, 16, 2)
    assert -power_law(frequencies, two[frequencies, frequencies]) == pytest.approx(
        kernel.eigenvalue_exponent(2), abs=0.35
    )


def test_dimensions_and_rates():
    kernel = HierarchicalKernel((3, 2, 2))
    assert [kernel.effective_dim(level) for level in (1, 2, 3)] == [2, 4, 8]
    assert [kernel.eigenvalue_exponent(level) for level in (1, 2, 3)] == [3, 5, 9]
    assert HierarchicalKernel((2, 3), "nngp", dims=2, in_chans=3).eigenvalue_exponent() == 3 + 11 * 9
    student = HierarchicalKernel((2, 2, 2))
    rates = [predicted_beta(HierarchicalKernel((2,) * depth), student) for depth in (1, 2, 3)]
    assert rates == [1, 1 / 2, 1 / 4]
    with pytest.raises(BadInput, match="begin with"):
        predicted_beta(HierarchicalKernel((4, 2)), student)
    with pytest.raises(BadInput, match="level 3"):
        HierarchicalKernel((2, 2)).effective_dim(3)


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        (dict(filter_sizes=(2, 3)), (4, 8), "divide"),
        (dict(filter_sizes=()), (4, 8), "hierarchy"),
        (dict(filter_sizes=(2,), kernel="rbf"), (4, 8), "'ntk' or 'nngp'"),
        (dict(filter_sizes=(2,), dims=2), (4, 8), "square"),
        (dict(filter_sizes=(2,), dims=2), (4, 3, 8, 8), "in_chans=1"),
    ],
)
def test_what_does_not_fit_is_named(options, shape, words):
    with pytest.raises(BadInput, match=words):
        HierarchicalKernel(**options)(torch.randn(shape))


def test_a_zero_patch_is_named():
    x = torch.randn(2, 8)
    x[1, 2:4] = 0
    with pytest.raises(BadInput, match="patch is zero"):
        HierarchicalKernel((2, 2))(x)
    with pytest.raises(BadInput, match="inputs of one net"):
        HierarchicalKernel((2, 2))(x[:1], torch.randn(3, 12))
