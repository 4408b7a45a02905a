"""Images that look right to a network's batch norms: calibration without data (ZeroQ, arXiv:2001.00281, eq. 3).

    min over x of  sum_l ||mu_l(x) - mu_l||^2 + ||sigma_l(x) - sigma_l||^2

where mu_l, sigma_l are what batch norm l remembers of its training data, and mu_l(x), sigma_l(x) the statistics of its
input for one image, over its positions; l = 0 is the image itself with mean 0 and deviation 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from opsin.errors import BadInput
from opsin.layers.device import device_of
from opsin.layers.normalize import Normalize


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every image and channel over the positions."""
    flat = x.flatten(2) if x.ndim > 2 else x[:, :, None]
    return flat.mean(2), (flat.var(2, unbiased=False) + 1e-6).sqrt()


def distance(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Squared distance of the statistics, mean over the batch."""
    own_mean, own_std = statistics(x)
    return ((own_mean - mean).square().sum() + (own_std - std).square().sum()) / len(x)


class Statistics:
    """Collects the distances of all batch norms (and of the image) during one forward pass."""

    def __init__(self, model: nn.Module):
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self.entrance = next((m for m in model.modules() if isinstance(m, Normalize)), None)
        if not self.norms:
            raise BadInput(f"{type(model).__name__} has no batch norms whose statistics could stand in for data")
        self.total = torch.zeros(())
        self.handles = [norm.register_forward_pre_hook(self._at_norm) for norm in self.norms]
        if self.entrance is not None:
            self.handles.append(self.entrance.register_forward_hook(self._at_entrance))

    def _at_norm(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, variance = norm.running_mean, norm.running_var
        assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
        self.total = self.total + distance(inputs[0], mean, (variance + 1e-6).sqrt())

    def _at_entrance(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.total = self.total + distance(output, output.new_zeros(()), output.new_ones(()))

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        self.total = torch.zeros((), device=x.device)
        model(x)
        if self.entrance is None:
            self.total = self.total + distance(x, x.new_zeros(()), x.new_ones(()))
        return self.total

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def distil(
    model: nn.Module, shape: tuple[int, int, int, int], *, steps: int = 500, lr: float = 0.5, seed: int = 0
) -> tuple[Float[Tensor, "n c h w"], list[float]]:
    """Distilled images of the model's own input space, and the loss at every step.

    Adam on the pixels from Gaussian noise; the rate falls tenfold after 100 steps without progress. The model stays in
    eval mode, and its statistics do not move. Raises BadInput where it has no batch norms.
    """
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device_of(model))
    collector = Statistics(model)
    x = _in_input_space(noise, collector.entrance).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=lr)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.1, patience=100, min_lr=1e-4)
    losses, was_training, wanted = [], model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            for _ in range(steps):
                optimiser.zero_grad()
                loss = collector.loss(model, x)
                loss.backward()
                optimiser.step()
                schedule.step(loss.detach())
                losses.append(float(loss.detach()))
    finally:
        collector.close()
        model.train(was_training)
        for p, want in zip(model.parameters(), wanted, strict=True):
            p.requires_grad_(want)
    return x.detach(), losses


def _in_input_space(noise: Tensor, entrance: nn.Module | None) -> Tensor:
    """Noise that has mean 0 and deviation 1 after the model's own normalisation."""
    if entrance is None:
        return noise.clone()
    zero, one = (entrance(torch.full_like(noise[:1], value)) for value in (0.0, 1.0))
    return (noise - zero) / (one - zero)
