"""The fused kernels against the definition, in Triton's interpreter where there is no GPU."""

import random

import pytest
import torch
from torch import Tensor

from opsin.errors import BadInput
from opsin.ops.attention.neighborhood import neighborhood_attention
from opsin.ops.attention.neighborhood_attention import NeighborhoodAttention

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# space, kernel, dilation, causal, with a bias: more than one box of queries and of keys in most
CASES = [
    ((70,), (7,), (1,), (False,), False), ((70,), (70,), (1,), (False,), False), ((141,), (5,), (2,), (True,), True),
    ((70,), (6,), (3,), (False,), True), ((12, 11), (3, 5), (1, 2), (False, False), False),
    ((3, 22), (3, 7), (1, 1), (False, False), False),
    ((19, 9), (4, 9), (2, 1), (True, False), False), ((9, 17), (9, 1), (1, 3), (False, True), False),
    ((5, 6, 7), (3, 2, 3), (1, 2, 2), (True, False, False), True),
]  # fmt: skip


def results(backend: str, tensors: list[Tensor], options: tuple, bias: Tensor | None, weight: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    y = neighborhood_attention(*tensors, *options, bias=bias, backend=backend)
    return [y, *torch.autograd.grad((y * weight).sum(), tensors if bias is None else [*tensors, bias])]


def inputs(space: tuple[int, ...], sizes: tuple[int, ...] = (8, 8, 8), **options) -> list[Tensor]:
    return [torch.randn(2, *space, 2, size, device=DEVICE, requires_grad=True, **options) for size in sizes]


@pytest.mark.parametrize(("space", "kernel", "dilation", "causal", "biased"), CASES)
def test_values_and_gradients_are_those_of_the_definition(space, kernel, dilation, causal, biased):
    tensors, weight = inputs(space), torch.randn(2, *space, 2, 8, device=DEVICE)
    bias = torch.randn(2, *(2 * k - 1 for k in kernel), device=DEVICE, requires_grad=True) if biased else None
    ours, dense = (results(b, tensors, (kernel, dilation, causal), bias, weight) for b in ("triton", "dense"))
    for name, a, b in zip(("out", "q", "k", "v", "bias"), ours, dense):
        assert torch.allclose(a, b, atol=1e-4), f"{name}: {float((a - b).abs().max())}"


@pytest.mark.slow
def test_random_rules():
    draw = random.Random(0)
    for _ in range(12):
        axes = draw.randint(1, 3)
        kernel, dilation = [draw.randint(1, 5) for _ in range(axes)], [draw.randint(1, 3) for _ in range(axes)]
        space = tuple(k * d + draw.randint(0, 14 if axes < 3 else 3) for k, d in zip(kernel, dilation))
        causal = [draw.random() < 0.4 for _ in range(axes)]
        bias = torch.randn(2, *(2 * k - 1 for k in kernel), device=DEVICE, requires_grad=True)
        tensors, weight = inputs(space), torch.randn(2, *space, 2, 8, device=DEVICE)
        ours, dense = (results(b, tensors, (kernel, dilation, causal), bias, weight) for b in ("triton", "dense"))
        for a, b in zip(ours, dense, strict=True):
            assert torch.allclose(a, b, atol=1e-4), (space, kernel, dilation, causal)


def test_values_wider_than_keys_and_strided_inputs():
    q, k, _ = torch.randn(2, 9, 8, 3, 2, 20, device=DEVICE).unbind(3)
    v = torch.randn(2, 9, 8, 2, 2, 36, device=DEVICE)[:, :, :, 1].transpose(1, 2).contiguous().transpose(1, 2)
    tensors = [t.detach().requires_grad_() for t in (q, k, v)]
    assert not tensors[0].is_contiguous() and tensors[0].stride(-1) == 1
    weight = torch.randn(2, 9, 8, 2, 36, device=DEVICE)
    for a, b in zip(*(results(name, tensors, (3,), None, weight) for name in ("triton", "dense")), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_scale_of_its_own_and_large_logits():
    """The running maximum: logits in the hundreds neither overflow nor lose the smaller boxes."""
    q, k, v = (30 * t for t in inputs((90,)))
    for scale in (1.0, -0.3):
        ours, dense = (neighborhood_attention(q, k, v, 80, scale=scale, backend=b) for b in ("triton", "dense"))
        assert ours.isfinite().all() and torch.allclose(ours, dense, atol=1e-3)


def test_half_precision_sums_in_float32():
    tensors = [t.detach().half().requires_grad_() for t in inputs((12, 11), (16, 16, 16))]
    weight = torch.randn(2, 12, 11, 2, 16, device=DEVICE).half()
    ours = results("triton", tensors, (5,), None, weight)
    exact = [t.detach().float().requires_grad_() for t in tensors]
    for a, b in zip(ours, results("dense", exact, (5,), None, weight.float()), strict=True):
        assert a.dtype == torch.float16 and float((a.float() - b).detach().norm() / b.detach().norm()) < 3e-3


def test_backward_keeps_no_logits():
    """What is saved does not depend on the window: q, k, v, the output, and a number per token and head."""
    tensors = inputs((16, 16))
    for kernel in (3, 9):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            neighborhood_attention(*tensors, kernel, backend="triton")
        assert sorted(sizes) == [1024, *[8192] * 4]


def test_the_operator_by_its_option():
    op = NeighborhoodAttention(16, 2, kernel_size=3, rel_pos_bias=True, backend="triton").to(DEVICE)
    x = torch.randn(1, 16, 9, 7, device=DEVICE)
    assert torch.allclose(op(x), op.reference(x), atol=1e-5)


def test_what_cannot_run_says_so(monkeypatch):
    q = torch.randn(1, 8, 1, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(BadInput, match="float64"):
        neighborhood_attention(q, q, q, 3, backend="triton")
    with pytest.raises(BadInput, match="300 channels"):
        neighborhood_attention(*[torch.randn(1, 8, 1, 300, device=DEVICE)] * 3, 3, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BadInput, match="CUDA tensor"):
        neighborhood_attention(*[q.cpu().float()] * 3, 3, backend="triton")
