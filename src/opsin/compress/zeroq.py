"""ZeroQ: post-training quantisation without any data.

Cai et al. 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", arXiv:2001.00281. Images are distilled from the
statistics in the batch norms (section 3.1); they set the ranges of the activations, and tell how much every layer
suffers from few bits, from which a Pareto frontier gives the bits of each layer for a size (section 3.2). Nothing is
trained.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from opsin.compress import Budget, Compressed, Report
from opsin.compress.bit_allocation import best_within, pareto_frontier, sensitivities
from opsin.compress.distilled_data import distil
from opsin.compress.measured import accuracy, measured
from opsin.compress.quantiser import QuantisedActivation, QuantisedLayer, is_plain, weight_of
from opsin.data import Data
from opsin.errors import BadInput

VARIANTS = {
    "zeroq": {},
    "zeroq_w8a8": dict(choices=(8,)),
    "zeroq_mixed": dict(choices=(2, 4, 8)),
}
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU)


class ZeroQ:
    """Quantises a network that has batch norms.

    Args:
        choices: the bits that a layer's weights may get, of 2, 4 and 8. Without a budget all get the most.
        activation_bits: of every activation function's output.
        images, steps, lr: of the distillation; the paper takes 32 images and 500 steps.
        input_size: (channels, height, width) where no data tells it.
    """

    def __init__(
        self, choices: tuple[int, ...] = (2, 4, 8), activation_bits: int = 8, images: int = 32, steps: int = 500,
        lr: float = 0.5, input_size: tuple[int, int, int] | None = None, seed: int = 0,
    ):  # fmt: skip
        if not set(choices) <= {2, 4, 8} or not choices:
            raise BadInput(f"weights are stored in 2, 4 or 8 bits, not {choices}")
        self.choices, self.activation_bits = tuple(sorted(choices)), activation_bits
        self.images, self.steps, self.lr, self.input_size, self.seed = images, steps, lr, input_size, seed

    def __call__(self, model: nn.Module, data: Data | None = None, budget: Budget = Budget()) -> Compressed:  # noqa: B008
        """A quantised copy. Data is used for the report's accuracy and the images' size only.

        Raises BadInput: no batch norms, an unknown size, or a budget that cannot be met.
        """
        shape = self._shape(data)
        model = deepcopy(model).eval()
        example = torch.rand(1, *shape)
        before, score_before = measured(model, example), accuracy(model, data)
        calibration, losses = distil(
            model, (self.images, *shape), steps=self.steps, lr=self.lr, seed=self.seed
        )  # fmt: skip
        layers = quantisable(model)
        bits, omega = self._allocate(model, layers, calibration, budget, before)
        quantise_activations(model, calibration, self.activation_bits)
        quantise_weights(model, dict(zip(layers, bits, strict=True)))
        report = Report(
            before, measured(model, example), budget, score_before, accuracy(model, data),
            details={"bits": dict(zip(layers, bits, strict=True)), "sensitivity": omega, "distillation": losses},
        )  # fmt: skip
        if not report.met:
            missed = {k: v for k, v in vars(budget).items() if v is not None and report.after[k] > v}
            raise BadInput(f"quantisation cannot meet the budget {missed}: it reached {report.after}")
        return Compressed(model, report, example)

    def _shape(self, data: Data | None) -> tuple[int, int, int]:
        if self.input_size is not None:
            return self.input_size
        if data is None or data.size is None:
            raise BadInput("the images' size is not known; pass input_size=(channels, height, width)")
        return (data.channels, *data.size)

    def _allocate(
        self, model: nn.Module, layers: dict[str, nn.Module], images: Tensor, budget: Budget, before: dict[str, float]
    ) -> tuple[list[int], list[list[float]]]:
        """Bits per layer for the budget, and the sensitivities that they follow from."""
        sizes = [weight_of(layer).numel() for layer in layers.values()]
        limit = weight_limit(budget, layers, before)
        if limit is None or len(self.choices) == 1:
            return [self.choices[-1]] * len(layers), []
        omega = sensitivities(model, list(layers.values()), images, self.choices)
        chosen = best_within(pareto_frontier(omega, sizes, self.choices), limit)
        return list(chosen.bits), omega.tolist()


def quantisable(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions (with zero padding) and linear layers by name, in order."""
    return {name: module for name, module in model.named_modules() if is_plain(module)}


def weight_limit(budget: Budget, layers: dict[str, nn.Module], before: dict[str, float]) -> float | None:
    """How many bits all weights may take together, after scales, biases and norms have had theirs."""
    weights = sum(weight_of(layer).numel() for layer in layers.values())
    limits = []
    if budget.bits is not None:
        limits.append(budget.bits * weights)
    if budget.bytes is not None:
        channels = sum(weight_of(layer).shape[0] for layer in layers.values())
        fixed = before["bytes"] - 4 * weights + 8 * channels + 64 * len(layers)
        limits.append(8 * (budget.bytes - fixed))
    return min(limits) if limits else None


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts a module where the one called `name` was."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def quantise_weights(model: nn.Module, bits: dict[str, int]) -> None:
    """Every named layer with its weights in that many bits, in place."""
    for name, number in bits.items():
        replace(model, name, QuantisedLayer(model.get_submodule(name), number))


@torch.no_grad()
def quantise_activations(model: nn.Module, images: Tensor, bits: int) -> None:
    """Rounds the output of every activation function to the range that it takes on the images, in place."""
    acts = {name: m for name, m in model.named_modules() if isinstance(m, ACTIVATIONS)}
    watchers = {name: QuantisedActivation(m, bits) for name, m in acts.items()}
    for name, watcher in watchers.items():
        replace(model, name, watcher)
    model(images)
    for watcher in watchers.values():
        watcher.calibrating = False
