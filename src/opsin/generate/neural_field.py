"""Neural fields with coordinate-aware modulation: a photo or a signal as a small network of its coordinates.

Lee et al. 2023, "Coordinate-Aware Modulation for Neural Fields", arXiv:2311.14993. Every hidden layer is

    h = act( gamma(X) norm(W h + b) + beta(X) ),        norm over the features of one coordinate, without gains

where gamma and beta are read off the layer's own small grid at the coordinate X (`ops/normact/cam_neural_field.py`). An
image is fitted from Fourier features of (row, column), with the norm; a signal in time from octaves, or from time
itself, without norm and activation. Grids learn ten times as fast as the weights.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import pi
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.data.images import read_image
from opsin.errors import BadInput, TrainingFailed
from opsin.layers.device import device_of
from opsin.ops.normact.cam_neural_field import EPS, Modulation, TemporalModulation, TriPlane, pixel_centres

GRID_SPEED = 10.0  # learning rate of grids over that of weights
RENDERED = 2**16  # coordinates at a time where nothing is learned

VARIANTS = {"cam_image": {}, "cam_image_plain": dict(grid_size=None, normalise=False)}


class FourierFeatures(nn.Module):
    """x (n, d) in [0, 1] to sines and cosines (n, 2 m) of m random directions, of deviation sigma in cycles."""

    def __init__(self, dim: int, frequencies: int = 256, sigma: float = 10.0):
        super().__init__()
        self.features = 2 * frequencies
        self.register_buffer("proj", 2 * pi * sigma * torch.randn(dim, frequencies))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n m2"]:
        angle = x @ self.proj
        return torch.cat((angle.sin(), angle.cos()), 1)


class Octaves(nn.Module):
    """x (n, d) to x, sin(2^i x) and cos(2^i x) for i below `count`; count 0 leaves it alone."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.features = dim * (1 + 2 * count)
        self.register_buffer("scales", 2.0 ** torch.arange(count), persistent=False)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d2"]:
        angle = (x[:, None] * self.scales[:, None]).flatten(1)
        return torch.cat((x, angle.sin(), (angle + pi / 2).sin()), 1)


class FieldLayer(nn.Module):
    """act(gamma(X) norm(W h + b) + beta(X)); without a modulation act(norm(W h + b))."""

    def __init__(
        self, dim_in: int, dim: int, modulation: nn.Module | None, normalise: bool, act: Callable[[Tensor], Tensor]
    ):
        super().__init__()
        self.linear = nn.Linear(dim_in, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False) if normalise else nn.Identity()
        self.modulation, self.act = modulation, act

    def forward(self, h: Float[Tensor, "n c"], places: Float[Tensor, "n d"]) -> Float[Tensor, "n c2"]:
        h = self.norm(self.linear(h))
        if self.modulation is not None:
            scale, shift = self.modulation(places)
            h = torch.addcmul(shift, h, scale)
        return self.act(h)


class NeuralField(nn.Module):
    """Coordinates (n, d) in [0, 1] to values (n, k): an encoding, hidden layers, and a last linear layer."""

    def __init__(
        self, encoding: FourierFeatures | Octaves, layers: Sequence[FieldLayer], outputs: int,
        final: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        super().__init__()
        self.encoding, self.layers = encoding, nn.ModuleList(layers)
        self.last, self.final = nn.Linear(layers[-1].linear.out_features, outputs), final

    def forward(self, places: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        h = self.encoding(places)
        for layer in self.layers:
            h = layer(h, places)
        return self.final(self.last(h))

    @torch.no_grad()
    def values(self, places: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """The same in parts, for any number of coordinates, without gradients."""
        return torch.cat([self(part) for part in places.split(RENDERED)])


class ImageField(NeuralField):
    """(row, column) in [0, 1] to colours in [0, 1].

    Args:
        frequencies, sigma: of the random Fourier features; width, depth: of the hidden layers.
        grid_size: nodes per side of each layer's grid; None for a network without grids. normalise: before the grids.
        size: (height, width) that `image()` renders by default.
    """

    def __init__(
        self, channels: int = 3, frequencies: int = 256, sigma: float = 10.0, width: int = 256, depth: int = 3,
        grid_size: int | None = 32, normalise: bool = True, size: tuple[int, int] = (256, 256),
    ):  # fmt: skip
        encoding = FourierFeatures(2, frequencies, sigma)
        dims = [encoding.features, *[width] * depth]
        grids = [None if grid_size is None else Modulation(grid_size, grid_size) for _ in range(depth)]
        layers = [FieldLayer(a, b, grid, normalise, F.relu) for a, b, grid in zip(dims, dims[1:], grids)]
        super().__init__(encoding, layers, channels, torch.sigmoid)
        self.size = size
        self.settings = dict(
            channels=channels, frequencies=frequencies, sigma=sigma, width=width, depth=depth, grid_size=grid_size,
            normalise=normalise, size=size,
        )  # fmt: skip

    def image(self, height: int | None = None, width: int | None = None) -> Float[Tensor, "c h w"]:
        """The picture at any resolution; pixel centres are where they are in the original."""
        h, w = height or self.size[0], width or self.size[1]
        return self.values(pixel_centres(h, w, device=self.encoding.proj.device)).T.unflatten(1, (h, w))


class SignalField(NeuralField):
    """Time in [0, 1] to values, modulated after each linear layer, without norm and activation (the 1-D experiment).

    Args: octaves: of the encoding, 0 for time itself. grid_size: nodes of each layer's grid.
    """

    def __init__(self, channels: int = 1, octaves: int = 16, width: int = 64, depth: int = 3, grid_size: int = 64):
        encoding = Octaves(1, octaves)
        dims = [encoding.features, *[width] * depth]
        layers = [FieldLayer(a, b, Modulation(grid_size), False, nn.Identity()) for a, b in pairwise(dims)]
        super().__init__(encoding, layers, channels, nn.Identity())

    def signal(self, length: int) -> Float[Tensor, "length k"]:
        return self.values(torch.linspace(0, 1, length, device=self.last.weight.device)[:, None])


def parameter_groups(field: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Weights at `lr`, grids at ten times that."""
    kinds = (Modulation, TriPlane, TemporalModulation)
    grids = {p for m in field.modules() if isinstance(m, kinds) for p in m.parameters()}
    weights = [p for p in field.parameters() if p not in grids]
    return [dict(params=weights, lr=lr), dict(params=[p for p in field.parameters() if p in grids], lr=GRID_SPEED * lr)]


def fit_field(
    field: nn.Module, places: Float[Tensor, "n d"], values: Float[Tensor, "n k"], *, steps: int = 2000,
    lr: float = 1e-3, points: int | None = None, seed: int = 0, on_step: Callable[[int, float], None] = lambda *_: None,
) -> nn.Module:  # fmt: skip
    """Adam on half the mean square error; the rate falls to a tenth at a half and at three quarters of the steps.

    points: coordinates drawn for each step; None for all. on_step: told the step and its loss. It trains where the
    field is. Raises TrainingFailed where the loss is not a number.
    """
    device = device_of(field)
    places, values = places.to(device), values.to(device)
    groups = [group for group in parameter_groups(field, lr) if group["params"]]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [steps // 2, steps * 3 // 4], 0.1)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = slice(None) if points is None else torch.randint(len(places), (points,), generator=draw).to(device)
        loss = 0.5 * F.mse_loss(field(places[rows]), values[rows])
        if not loss.isfinite():
            raise TrainingFailed(f"the loss of the field is {loss.item()} at step {step}; take a smaller lr than {lr}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        on_step(step, loss.item())
    return field


def fit_image(
    image: str | Path | Float[Tensor, "c h w"], *, every: int = 1, steps: int = 2000, lr: float = 1e-3,
    points: int | None = 16384, seed: int = 0, on_step: Callable[[int, float], None] = lambda *_: None,
    device: torch.device | str | None = None, **options: Any,
) -> ImageField:  # fmt: skip
    """A field of an image file, or of an image in [0, 1]. `options` are those of `ImageField`.

    every: learn from every so many-th pixel of both axes (2 in the paper, which tests on all); points: pixels per step.
    device: where the field is and learns; an image's own, and the CPU for a file, if left out.
    Raises BadInput for files that are no image, and for options that fields do not have.
    """
    picture = image if isinstance(image, Tensor) else read_image(image)
    channels, height, width = picture.shape
    torch.manual_seed(seed)
    try:
        field = ImageField(channels=channels, size=(height, width), **options)
    except TypeError as error:
        raise BadInput(f"an image field cannot be built with {options}: {error}") from error
    field.to(picture.device if device is None else device)
    places = pixel_centres(height, width).view(height, width, 2)[::every, ::every].flatten(0, 1)
    values = picture.float()[:, ::every, ::every].flatten(1).T
    points = None if points is None or points >= len(places) else points
    fit_field(field, places, values, steps=steps, lr=lr, points=points, seed=seed, on_step=on_step)
    return field.eval()


def fit_signal(
    signal: Float[Tensor, "n k"], *, steps: int = 2000, lr: float = 1e-3, seed: int = 0, **options: Any
) -> SignalField:
    """A field of a signal of n samples over [0, 1], on its device. `options` are those of `SignalField`."""
    torch.manual_seed(seed)
    field = SignalField(channels=signal.shape[1], **options).to(signal.device)
    fit_field(field, torch.linspace(0, 1, len(signal))[:, None], signal, steps=steps, lr=lr)
    return field.eval()


def save_field(field: ImageField, path: str | Path, dtype: torch.dtype = torch.float16) -> Path:
    """Writes an image field with its settings as .safetensors, by default in half precision.

    The frequencies stay in float32: they are few, and an error of one is multiplied by 2 pi times the coordinate.
    """
    kinds = {name: torch.float32 if name == "encoding.proj" else dtype for name in field.state_dict()}
    state = {name: tensor.to(kinds[name]).contiguous() for name, tensor in field.state_dict().items()}
    save_file(state, path, metadata={"image_field": json.dumps(field.settings)})
    return Path(path)


def load_field(path: str | Path) -> ImageField:
    """What `save_field` wrote, in float32. Raises BadInput for other files."""
    if not Path(path).is_file():
        raise BadInput(f"there is no field '{path}'")
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["image_field"])
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise BadInput(f"'{path}' is not a field that save_field wrote: {error}") from error
    field = ImageField(**settings | {"size": tuple(settings["size"])})
    field.load_state_dict(state)
    return field.eval()
