"""The verb `generate`: images from a diffusion model, by name or from a weights file, as a grid in a PNG."""

from collections.abc import Callable
from contextlib import nullcontext
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from opsin.catalog import create, find, parse_spec
from opsin.errors import BadInput
from opsin.generate import Sampler, Trick
from opsin.generate.samplers import sampler_of
from opsin.generate.train import spec_of

PAD = 2  # pixels between the images of a grid


@torch.no_grad()
def generate(
    model: str | Path | nn.Module, n: int = 16, *, steps: int = 18, seed: int = 0, sampler: str | Sampler = "heun",
    trick: str | Trick | None = None, label: int | None = None, weights: str | Path | None = None, batch: int = 64,
    zoom: int | None = None, output: str | Path | None = None, force: bool = False,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Float[Tensor, "n c h w"]:  # fmt: skip
    """Draws n images, values in [0, 1], and writes them as one PNG where `output` is given.

    model: a name or spec of the catalogue (with the weights that come with it, or `weights`), a .safetensors file that
        `save_denoiser` wrote, or a denoiser.
    seed: image i depends on the seed and on i alone, not on n or batch.
    sampler: "heun" (2 steps - 1 evaluations of the network), "euler", "dpm2m", "unipc", or a `Sampler`.
    trick: a name or spec such as "skip_tuning(rho_bottom=0.7)", or a `Trick`; undone afterwards.
    label: a class for all images; without, a class-conditional model draws from all classes.
    zoom: how many pixels wide a pixel of the PNG is; as many as make an image 64 wide by default.
    Raises UnknownName, BadInput (no weights, a label that the model does not have, output exists without force).
    """
    if seed < 0:
        raise BadInput(f"seed={seed} must not be negative")
    if n < 1 or batch < 1 or (zoom is not None and zoom < 1):
        raise BadInput(f"n={n}, batch={batch} and zoom={zoom} must be at least 1")
    target = _writable(output, force)
    denoiser = _denoiser(model, weights)
    draw = sampler_of(sampler) if isinstance(sampler, str) else sampler
    patch = _trick(trick) if isinstance(trick, str) else trick
    images = []
    with patch.apply(denoiser) if patch is not None else nullcontext():
        for start in range(0, n, batch):
            rows = range(start, min(start + batch, n))
            noise = torch.stack([_noise(seed, i, denoiser.sample_shape) for i in rows])
            cond = _labels(denoiser, label, len(rows))
            images.append((draw(denoiser, noise, steps, cond).clamp(-1, 1) + 1) / 2)
            on_batch(len(rows))
    result = torch.cat(images)
    if target is not None:
        Image.fromarray(grid(result, zoom or max(1, 64 // result.shape[3]))).save(target)
    return result


def grid(images: Float[Tensor, "n c h w"], zoom: int = 1) -> UInt8[np.ndarray, "height width 3"]:
    """The images in a near-square grid on white, each pixel `zoom` pixels wide."""
    n, _, h, w = images.shape
    columns = ceil(sqrt(n))
    rows = ceil(n / columns)
    images = images.expand(-1, 3, -1, -1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    h, w = h * zoom + PAD, w * zoom + PAD
    sheet = torch.ones(3, rows * h + PAD, columns * w + PAD)
    for i, image in enumerate(images):
        top, left = PAD + i // columns * h, PAD + i % columns * w
        sheet[:, top : top + h - PAD, left : left + w - PAD] = image
    return (sheet * 255).round().byte().permute(1, 2, 0).numpy()


def _noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, index)).standard_normal(shape, np.float32))


def _writable(output: str | Path | None, force: bool) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise BadInput(f"the output '{path}' must end in .png")
    if path.exists() and not force:
        raise BadInput(f"the file '{path}' exists; use --force to replace it, or another name")
    if not path.parent.is_dir():
        raise BadInput(f"there is no folder '{path.parent}' for the output")
    return path


def _denoiser(model: str | Path | nn.Module, weights: str | Path | None) -> nn.Module:
    if isinstance(model, nn.Module):
        built = model
    elif str(model).endswith(".safetensors"):
        built = create(spec_of(Path(model)), weights=str(model))
    else:
        name = parse_spec(str(model))[0]
        card, variant = find(name)
        if card.kind != "generator":
            raise BadInput(f"'{name}' is a {card.kind}, not a generator; `opsin list --kind generator` shows those")
        if weights is None and not (variant and variant.weights):
            raise BadInput(f"'{name}' comes without weights; train it and give --weights FILE")
        built = create(str(model), weights=str(weights) if weights is not None else "shipped")
    if not hasattr(built, "sample_shape"):
        raise BadInput(f"{type(built).__name__} is not a denoiser that says what shape its images have (sample_shape)")
    return built.eval()


def _trick(spec: str) -> Trick:
    card = find(parse_spec(spec)[0])[0]
    if card.kind != "trick":
        raise BadInput(f"'{card.key}' is a {card.kind}, not a trick; `opsin list --kind trick` shows those")
    return create(spec)


def _labels(denoiser: nn.Module, label: int | None, count: int) -> Tensor | None:
    if label is None:
        return None
    classes = getattr(denoiser, "num_classes", 0)
    if not 0 <= label < classes:
        kinds = f"has the classes 0 ... {classes - 1}" if classes else "has no classes"
        raise BadInput(f"label {label} cannot be drawn: the model {kinds}")
    return torch.full((count,), label)
