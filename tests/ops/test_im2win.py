"""Im2win: the layout of the paper, F.conv2d's numbers, the memory that the formulas say, and no second copy."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from opsin.errors import BadInput, UnknownName
from opsin.measure.cost import count_macs
from opsin.ops.conv import im2win
from opsin.ops.conv.im2win import (
    LAYERS,
    Im2winConv2d,
    channels_last_windows,
    filters_to_windows,
    im2col_numel,
    im2win_conv2d,
    im2win_numel,
    image_to_windows,
    window_view,
)

GEOMETRIES = [  # channels, filters, kernel, stride, padding, size
    (3, 5, (1, 1), (1, 1), (0, 0), (4, 5)),
    (2, 7, (3, 3), (1, 1), (1, 1), (7, 9)),
    (3, 4, (3, 3), (2, 2), (1, 1), (9, 8)),
    (3, 4, (3, 3), (2, 2), (1, 1), (8, 9)),
    (2, 3, (3, 3), (3, 3), (0, 0), (10, 11)),
    (2, 3, (2, 2), (4, 4), (0, 0), (9, 10)),
    (2, 3, (5, 3), (1, 2), (2, 0), (8, 10)),
    (1, 3, (11, 11), (4, 4), (0, 0), (27, 31)),
    (2, 3, (7, 7), (2, 2), (3, 3), (14, 13)),
    (4, 70, (3, 3), (1, 1), (0, 0), (3, 3)),
]


def operands(channels: int, filters: int, kernel: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(3, channels, *size), torch.randn(filters, channels, *kernel) / 3, torch.randn(filters)


@pytest.mark.parametrize(("channels", "filters", "kernel", "stride", "padding", "size"), GEOMETRIES)
def test_numbers_and_gradients_of_a_convolution(channels, filters, kernel, stride, padding, size):
    tensors = [t.requires_grad_() for t in operands(channels, filters, kernel, size)]
    ours = im2win_conv2d(*tensors, stride, padding, "plain")
    expected = F.conv2d(*tensors, stride, padding)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.allclose(im2win.im2col_conv2d(*tensors, stride, padding), expected, atol=1e-5)
    weight = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), tensors) for y in (ours, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    without = im2win_conv2d(*tensors[:2], None, stride, padding, "plain")
    assert torch.allclose(without, F.conv2d(*tensors[:2], None, stride, padding), atol=1e-5)


@pytest.mark.parametrize(("channels", "filters", "kernel", "stride", "padding", "size"), GEOMETRIES)
def test_the_kernel(channels, filters, kernel, stride, padding, size):
    x, weight, bias = operands(channels, filters, kernel, size)
    expected = F.conv2d(x, weight, bias, stride, padding)
    assert torch.allclose(im2win_conv2d(x, weight, bias, stride, padding, "triton"), expected, atol=1e-4)
    without = im2win_conv2d(x, weight, None, stride, padding, "triton")
    assert torch.allclose(without, F.conv2d(x, weight, None, stride, padding), atol=1e-4)


def test_the_kernel_over_several_tiles_and_its_gradients():
    x, weight, bias = (t.requires_grad_() for t in operands(9, 67, (3, 3), (9, 8)))
    ours, expected = im2win_conv2d(x, weight, bias, backend="triton"), F.conv2d(x, weight, bias)
    assert torch.allclose(ours, expected, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (ours, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-4)


def test_the_layout_of_the_paper():
    x, weight, _ = operands(2, 3, (3, 2), (7, 6))
    windows = image_to_windows(x, 3, 2)
    assert windows.shape == (3, 2, 3, 6, 3) and windows.is_contiguous()
    assert all(windows[1, 1, i, w, h] == x[1, 1, 2 * i + h, w] for i in range(3) for w in range(6) for h in range(3))
    run = windows[1, 1, 2].flatten()[1 * 2 * 3 : 1 * 2 * 3 + 6]  # the window of output (2, 1) at stride 2
    assert torch.equal(run, x[1, 1, 4:7, 2:4].T.flatten()), "columns first"
    view = window_view(windows, 2, 2)
    assert view.data_ptr() == windows.data_ptr() and torch.equal(view[1, 1, 2, 1].flatten(), run)
    ours = torch.einsum("ncijut,mcut->nmij", view, filters_to_windows(weight))
    assert torch.allclose(ours, F.conv2d(x, weight, stride=2), atol=1e-5)
    assert torch.equal(channels_last_windows(x, 3, 2), windows.permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize("name", LAYERS)
def test_memory_of_the_published_layers(name):
    layer = LAYERS[name]
    kernel, stride = (layer.kernel,) * 2, (layer.stride,) * 2
    x = torch.empty(2, layer.channels, layer.size, layer.size, device="meta")
    windows = im2win_numel(x.shape, kernel, stride)
    assert windows == image_to_windows(x, layer.kernel, layer.stride).numel()
    assert windows == channels_last_windows(x, layer.kernel, layer.stride).numel()
    copied = im2col_numel(x.shape, kernel, stride)
    assert copied == F.unfold(x, kernel, stride=stride).numel()
    assert copied / windows == pytest.approx(layer.kernel * layer.out_size / layer.size)
    assert windows < copied


class Largest(TorchDispatchMode):
    """The most values in one storage made inside the block."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@torch.no_grad()
@pytest.mark.parametrize("size", [(20, 20), (21, 23)])
def test_windows_are_copied_once_only(size):
    for kernel, stride in (((5, 5), (1, 1)), ((7, 7), (2, 2))):
        op = Im2winConv2d(8, kernel, stride, padding=0, out_dim=2, backend="plain")
        x = torch.randn(2, 8, *size)
        with Largest() as largest:
            op(x)
        assert largest.values == im2win_numel(x.shape, kernel, stride)
        with Largest() as largest:
            op.reference(x)
        assert largest.values == im2col_numel(x.shape, kernel, stride)


def test_only_input_and_filters_wait_for_backward():
    op, x = Im2winConv2d(4), torch.randn(2, 4, 8, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        op(x)
    assert sorted(kept) == sorted((x.numel(), op.weight.numel()))


def test_it_stands_in_for_a_convolution():
    plain = nn.Conv2d(6, 10, 3, 2, 1)
    ours = Im2winConv2d(6, 3, 2, out_dim=10)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 9, 12).contiguous(memory_format=torch.channels_last)
    assert torch.allclose(ours(x), plain(x), atol=1e-5)
    with torch.device("meta"):
        x = torch.empty(2, 6, 9, 12)
        assert count_macs(Im2winConv2d(6, 3, 2, out_dim=10), x) == count_macs(nn.Conv2d(6, 10, 3, 2, 1), x)


def test_autocast_is_obeyed_as_by_a_convolution():
    plain, ours = nn.Conv2d(6, 10, 3, padding=1), Im2winConv2d(6, out_dim=10)
    ours.load_state_dict(plain.state_dict())
    for x in (torch.randn(2, 6, 8, 9), torch.randn(2, 6, 8, 9).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = ours(x), plain(x)
        assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), expected.float(), atol=0.03)
        (gradient,) = torch.autograd.grad(y.float().sum(), ours.weight)
        (other,) = torch.autograd.grad(expected.float().sum(), plain.weight)
        assert gradient.dtype == torch.float32 and torch.allclose(gradient, other, rtol=0.02, atol=0.2)
    tensors = [t.double() for t in (x, *ours.parameters())]
    with torch.autocast("cpu", torch.bfloat16):
        assert im2win_conv2d(*tensors).dtype == F.conv2d(*tensors).dtype == torch.float64
        assert im2win_conv2d(x, ours.weight, backend="triton").dtype == torch.bfloat16


def test_no_images_are_a_batch():
    for backend in ("plain", "triton"):
        op, x = Im2winConv2d(3, out_dim=5, backend=backend), torch.empty(0, 3, 8, 9, requires_grad=True)
        y = op(x)
        assert y.shape == (0, 5, 8, 9)
        y.sum().backward()
        assert x.grad.shape == x.shape and not op.weight.grad.any() and not op.bias.grad.any()


def test_complaints_are_sentences(monkeypatch):
    with pytest.raises(BadInput, match='padding="same" is not in pixels'):
        Im2winConv2d(2, padding="same")
    for shape in ((8, 2, 8), (1, 3, 8, 8)):
        with pytest.raises(BadInput, match=rf"of C = 2 channels, not a tensor of {'x'.join(map(str, shape))}"):
            Im2winConv2d(2)(torch.randn(shape))
    with pytest.raises(BadInput, match="5x5 window does not fit into a map of 4x6"):
        Im2winConv2d(2, 5, padding=0)(torch.randn(1, 2, 4, 6))
    with pytest.raises(UnknownName, match="cuda"):
        Im2winConv2d(2, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="CUDA tensor"):
            Im2winConv2d(2, backend="triton")(torch.randn(1, 2, 4, 6))


def test_the_kernel_takes_nothing_from_behind_the_windows():
    from opsin.ops.conv.im2win_triton import window_product

    x, weight, _ = operands(3, 5, (3, 3), (6, 7))
    windows = image_to_windows(x, 3, 1)
    behind = torch.full((windows.numel() + 4096,), float("nan"))
    inside = behind[: windows.numel()].copy_(windows.flatten()).view_as(windows)
    assert torch.allclose(window_product(inside, filters_to_windows(weight), None, 1), F.conv2d(x, weight), atol=1e-4)
