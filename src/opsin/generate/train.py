"""A small loop that trains a denoiser on images in memory, and weights files that know which network they belong to."""

from collections.abc import Callable
from copy import deepcopy
from math import cos, pi
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from opsin.errors import BadInput, TrainingFailed
from opsin.generate.edm import EDM, EDMLoss

SPEC = "opsin"  # the metadata field of a weights file that holds the network's name or spec


def fit_denoiser(
    denoiser: EDM, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None = None, *, steps: int = 2000,
    batch: int = 128, lr: float = 1e-3, ema: float = 0.999, seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> EDM:  # fmt: skip
    """Trains on EDM's loss with Adam and returns a copy with the averaged weights, in eval mode.

    images: in [0, 1]. lr: the peak of a linear warm-up (5 % of the steps) and a cosine. ema: decay of the weights'
    average, less in the first steps. The same seed gives the same weights; the caller's random state is left alone.
    Raises BadInput (no images, labels of another length), TrainingFailed (a loss that is not a number).
    """
    if not len(images) or (labels is not None and len(labels) != len(images)):
        count = "no" if labels is None else len(labels)
        raise BadInput(f"{len(images)} images and {count} labels do not make a training set")
    model, average = EDMLoss(denoiser.train()), deepcopy(denoiser).eval().requires_grad_(False)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * cos(pi * step / steps))
    )
    targets = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(steps):
            rows = torch.randint(len(images), (batch,))
            optimiser.zero_grad(set_to_none=True)
            loss = model(images[rows], targets[rows])["loss"]
            if not bool(loss.isfinite()):
                raise TrainingFailed(f"the loss is {loss.item()} at step {step}; lower lr (now {lr:g})")
            loss.backward()
            optimiser.step()
            schedule.step()
            decay = min(ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), 1 - decay)
            on_step(step, loss.item())
    return average.requires_grad_(True)


def save_denoiser(denoiser: nn.Module, path: Path, spec: str, *, half: bool = False, force: bool = False) -> Path:
    """Writes weights as safetensors, with the network's name or spec inside; `half` rounds them to 16 bits.

    Raises BadInput where the file exists and force is not given.
    """
    from safetensors.torch import save_file

    if path.exists() and not force:
        raise BadInput(f"the file '{path}' exists; use force to replace it")
    tensors = {name: (t.half() if half else t).contiguous() for name, t in denoiser.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={SPEC: spec})
    return path


def spec_of(path: Path) -> str:
    """The network that a weights file was saved from. Raises BadInput where there is none inside."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadInput(f"there is no weights file '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            spec = (file.metadata() or {}).get(SPEC)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"the weights file '{path}' cannot be read: {error}") from error
    if not spec:
        raise BadInput(f"the weights file '{path}' does not say whose it is; name the network and give --weights FILE")
    return spec
