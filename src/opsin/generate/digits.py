"""How the weights of `edm_digits` were made: `python -m opsin.generate.digits` (about four minutes on one core).

Data: scikit-learn's 1,797 grey 8x8 digits with their labels, which every tenth sample loses in training, so that the
model draws with and without a label.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsin.catalog import create
from opsin.generate.train import fit_denoiser, save_denoiser

WEIGHTS = Path(__file__).parent / "weights" / "edm_digits.safetensors"


def digits() -> tuple[Float[Tensor, "n 1 8 8"], Int[Tensor, " n"]]:
    """All images in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def main(steps: int = 3000) -> Path:
    """Trains, and replaces the weights file; they are kept in 16 bits."""
    from rich.progress import Progress

    torch.manual_seed(0)
    denoiser = create("edm_digits")
    images, labels = digits()
    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=steps)
        trained = fit_denoiser(
            denoiser, images, labels, steps=steps, batch=64, lr=2e-3, ema=0.995,
            on_step=lambda step, loss: progress.advance(task),
        )  # fmt: skip
    return save_denoiser(trained, WEIGHTS, "edm_digits", half=True, force=True)


if __name__ == "__main__":
    print(main())
