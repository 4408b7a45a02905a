"""What every backbone must pass, one function per point. Each raises AssertionError that says what is wrong."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from opsin.backbones import Backbone

Build = Callable[..., Backbone]  # build(**overrides) -> a small member


def image(size: int | tuple[int, int], n: int = 2, chans: int = 3) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(n, chans, height, width)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, whatever the scale: fresh networks can have tiny logits."""
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@torch.no_grad()
def pyramid(build: Build, size: int) -> None:
    """Maps are NCHW with the channels and strides of feature_info, the finest first."""
    model = build().eval()
    assert isinstance(model, Backbone)
    maps = model.features(image(size))
    assert len(maps) == len(model.feature_info), "as many maps as levels"
    strides = [info.stride for info in model.feature_info]
    assert strides == sorted(strides), "finest level first"
    for x, info in zip(maps, model.feature_info, strict=True):
        side = -(-size // info.stride)
        assert x.shape == (2, info.channels, side, side), f"a map of {tuple(x.shape)} at {info}"


@torch.no_grad()
def head(build: Build, size: int) -> None:
    """Logits have num_classes columns, num_classes=0 pools, and forward is head after features."""
    x = image(size)
    model = build(num_classes=7).eval()
    assert model(x).shape == (2, 7) and model.num_classes == 7
    assert torch.equal(model(x), model.forward_head(model.forward_features(x))), "forward is head after features"
    pooled = build(num_classes=0).eval()
    assert pooled(x).shape == (2, pooled.num_features), "num_classes=0 gives pooled features"


@torch.no_grad()
def channels(build: Build, size: int) -> None:
    """in_chans is honoured."""
    for count in (1, 4):
        assert build(in_chans=count).eval()(image(size, chans=count)).isfinite().all()


@torch.no_grad()
def odd_sizes(build: Build, size: int) -> None:
    """Sides that are no multiple of anything work, and maps have the size that the stride says, up to a border."""
    model = build().eval()
    for height, width in ((size + 3, size + 13), (size + 21, size - 1)):
        x = image((height, width))
        assert model(x).isfinite().all()
        for y, info in zip(model.features(x), model.feature_info, strict=True):
            for side, pixels in zip(y.shape[2:], (height, width), strict=True):
                assert pixels // info.stride <= side <= -(-pixels // info.stride), f"{side} at {pixels} / {info.stride}"


@torch.no_grad()
def independent_samples(build: Build, size: int) -> None:
    """In eval, an image's logits do not depend on what else is in the batch."""
    model = build().eval()
    x = image(size, n=3)
    other = torch.cat((x[:1], 5 * image(size)))
    together, changed = model(x), model(other)
    assert close(changed[0], together[0]), "other images in the batch change the output"
    assert close(model(x[:1])[0], together[0]), "an image alone gives another output than in a batch"
    assert not torch.equal(together[1], changed[1]), "the output ignores the image"


def gradients(build: Build, size: int) -> None:
    """Logits depend on every parameter. Gains start near 0, so they are opened first."""
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model(image(size)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle, f"no gradient reaches {idle}"


@torch.no_grad()
def bfloat16(build: Build, size: int) -> None:
    """The network runs in bfloat16 and stays near itself in float32."""
    model = build().eval()
    x = image(size)
    exact = model(x)
    rough = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).abs().max() / exact.abs().max().clamp_min(1e-6)
    assert error < 0.2, f"bfloat16 is off by {error:.2f} of the largest logit"


def exports(build: Build, size: int) -> None:
    """torch.export gives a program with the same outputs."""
    model = build().eval()
    x = image(size)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        assert close(program.module()(x), model(x))


@torch.no_grad()
def round_trip(build: Build, size: int) -> None:
    """A second instance with the first one's state is the first one, running statistics included."""
    first = build()
    first.train()
    first(image(size, n=4))
    first.eval()
    second = build().eval()
    state = copy.deepcopy(first.state_dict())
    x = image(size)
    assert not torch.equal(second(x), first(x)), "fresh instances must differ"
    second.load_state_dict(state)
    assert torch.equal(second(x), first(x)), "something that the output depends on is not in the state"


def all_finite(model: nn.Module) -> bool:
    return all(t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point())


def initialised(build: Build, size: int) -> None:
    """Fresh weights are finite, and a few steps on one batch lower the loss."""
    model = build(num_classes=2)
    assert all_finite(model)
    x, y = image(size, n=4), torch.tensor([0, 1, 0, 1])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.9 * losses[0], f"four images are not learned: {losses[0]:.3f} to {losses[-1]:.3f}"


ALWAYS = (
    pyramid, head, channels, independent_samples, gradients, bfloat16, exports, round_trip, initialised,
)  # fmt: skip
