"""Where Triton kernels are launched: on the device of their tensors, in both directions."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from opsin.ops import kernels
from opsin.ops.attention.neighborhood import neighborhood_attention
from opsin.ops.conv.im2win import im2win_conv2d
from opsin.ops.spectral.flashfftconv import fft_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention() -> torch.Tensor:
    q = torch.randn(1, 9, 1, 8, device=DEVICE, requires_grad=True)
    return neighborhood_attention(q, q, q, 3, backend="triton")


def spectral() -> torch.Tensor:
    u, k = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((1, 2, 128), (2, 128)))
    return fft_conv(u, k, backend="triton")


def convolution() -> torch.Tensor:
    x, weight = (torch.randn(*shape, device=DEVICE) for shape in ((1, 2, 5, 5), (3, 2, 3, 3)))
    return im2win_conv2d(x, weight, backend="triton")


LAUNCHES = [
    ("attention.neighborhood_triton", ("_forward", "_backward_queries", "_backward_keys"), attention),
    ("spectral.flashfftconv_triton", ("convolution_kernel", "convolution_kernel", "taps_kernel"), spectral),
    ("conv.im2win_triton", ("_window_product",), convolution),
]


def test_the_device_of_a_tensor_becomes_the_current_one(monkeypatch):
    monkeypatch.setattr(kernels.cuda, "device", lambda device: f"on {device}")
    assert kernels.launching_on(SimpleNamespace(is_cuda=True, device="cuda:1")) == "on cuda:1"
    with kernels.launching_on(torch.ones(2)) as nothing:
        assert nothing is None


@pytest.mark.parametrize(("place", "names", "run"), LAUNCHES, ids=lambda p: p if isinstance(p, str) else "")
def test_every_launch_is_on_the_device_of_its_tensors(place, names, run, monkeypatch):
    pytest.importorskip("triton")
    module = import_module(f"opsin.ops.{place}")
    held: list[torch.device] = []
    launched: list[tuple[str, list[torch.device]]] = []

    @contextmanager
    def guard(x: torch.Tensor) -> Iterator[None]:
        held.append(x.device)
        yield
        held.pop()

    class Watched:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int, ...]):
            launched.append((self.name, list(held)))
            return self.kernel[grid]

    monkeypatch.setattr(module, "launching_on", guard)
    for name in set(names):
        monkeypatch.setattr(module, name, Watched(name))
    y = run()
    if y.requires_grad and len(names) > 1:
        y.sum().backward()
    assert launched == [(name, [y.device]) for name in names]
