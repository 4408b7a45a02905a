"""Looking at a transformer's attention, and smoothing it (Gu et al. 2022, arXiv:2111.10659, sections 4 and 5)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput
from opsin.layers.attention import Attention
from opsin.tasks.outputs import scores


def attention_layers(model: nn.Module) -> list[Attention]:
    """The self-attention layers in order. Raises BadInput where there are none."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise BadInput(f"{type(model).__name__} has no self-attention layers to look at or to smooth")
    return layers


@torch.no_grad()
def attention_maps(model: nn.Module, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "blocks n heads t t"]:
    """The softmax weights of every block for a batch."""
    maps: list[Tensor] = []
    with ExitStack() as stack:
        for layer in attention_layers(model):

            def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                assert isinstance(module, Attention)
                maps.append(module.attention_map(*inputs))

            stack.callback(layer.register_forward_pre_hook(read).remove)
        scores(model, images)
    return torch.stack(maps)


def rollout(maps: Float[Tensor, "blocks n heads t t"], discard: float = 0.9) -> Float[Tensor, "n patches"]:
    """Attention rollout of the class token over the patches, scaled to a maximum of 1.

    Per block: mean over heads, the lowest `discard` share of the entries set to 0 (never class to class), the residual
    added as (A + I) / 2, rows normalised; the blocks are multiplied.
    """
    n, tokens = maps.shape[1], maps.shape[-1]
    identity = torch.eye(tokens, device=maps.device)
    joint = identity.expand(n, -1, -1)
    for block in maps.mean(2):
        flat = block.flatten(1).clone()
        lowest = flat.argsort(1)[:, : int(discard * flat.shape[1])]
        drop = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, lowest, True)
        drop[:, 0] = False
        step = (flat.masked_fill(drop, 0).view_as(block) + identity) / 2
        joint = (step / step.sum(-1, keepdim=True)) @ joint
    seen = joint[:, 0, 1:]
    return seen / seen.max(1, keepdim=True).values


def attention_shift(
    model: nn.Module, clean: Float[Tensor, "n c h w"], perturbed: Float[Tensor, "n c h w"], token: int
) -> Float[Tensor, " n"]:
    """Class attention on one patch token after the perturbation over that before: last block, mean over heads."""
    before, after = (attention_maps(model, x)[-1].mean(1)[:, 0, 1 + token] for x in (clean, perturbed))
    return after / before


class AttentionTemperature:
    """The smoothed attention of section 5: softmax(q k^T / (T sqrt(d))) in every block, at inference, without training.

    T = 1 is the network itself; with T towards infinity attention becomes uniform.
    """

    def __init__(self, temperature: float = 1.5):
        if temperature <= 0:
            raise BadInput(f"the attention temperature must be above 0, not {temperature}")
        self.temperature = temperature

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """Divides the attention logits by T within the block."""
        layers = attention_layers(model)
        scales = [layer.scale for layer in layers]
        try:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scale = scale / self.temperature
            yield model
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scale = scale
