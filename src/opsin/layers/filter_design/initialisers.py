"""How filters start: by a formula for one weight, or from data and the whole network.

With fan_in = C_in k k and fan_out = C_out k k, variances are 1/fan_in (LeCun), 2/(fan_in + fan_out) (Glorot) and
2/fan_in (He, for ReLU); orthogonal rows keep norms; LSUV (Mishkin and Matas 2016, arXiv:1511.06422) makes the variance
of every layer's output 1 on a batch; PCA and k-means filters (Kraehenbuehl et al. 2016, arXiv:1511.06856) are learned
from the patches that a layer receives; Fixup (Zhang et al. 2019, arXiv:1901.09321) shrinks residual branches.
Each group of a convolution starts by itself, with C_in and C_out those of the group.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput, UnknownName
from opsin.layers.filter_design.unsupervised import Whitening, contrast_normalised, kmeans, pca, sampled_patches

BLOCKS = ("Block", "Bottleneck", "Residual", "DepthwiseSeparable")
MIXERS = ("mixer", "token_mixer", "attn", "spatial_mlp")
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def fans(weight: Tensor) -> tuple[int, int]:
    """fan_in and fan_out of a weight (out, in, ...)."""
    return weight[0].numel(), len(weight) * weight[0, 0].numel()


def normal_(weight: Tensor, gain: float = 1.0) -> Tensor:
    """N(0, 0.01^2), whatever the layer's size."""
    return nn.init.normal_(weight, std=0.01 * gain)


def constant_(weight: Tensor, gain: float = 1.0) -> Tensor:
    """Every tap 1/fan_in: all filters of a layer are one and the same mean, and stay so."""
    return nn.init.constant_(weight, gain / fans(weight)[0])


def lecun_normal_(weight: Tensor, gain: float = 1.0) -> Tensor:
    return nn.init.normal_(weight, std=gain * fans(weight)[0] ** -0.5)


def lecun_uniform_(weight: Tensor, gain: float = 1.0) -> Tensor:
    bound = gain * (3 / fans(weight)[0]) ** 0.5
    return nn.init.uniform_(weight, -bound, bound)


def xavier_normal_(weight: Tensor, gain: float = 1.0) -> Tensor:
    return nn.init.xavier_normal_(weight, gain)


def xavier_uniform_(weight: Tensor, gain: float = 1.0) -> Tensor:
    return nn.init.xavier_uniform_(weight, gain)


def he_normal_(weight: Tensor, gain: float = 2**0.5) -> Tensor:
    """For a leaky ReLU of slope a the gain is sqrt(2 / (1 + a^2))."""
    return lecun_normal_(weight, gain)


def he_uniform_(weight: Tensor, gain: float = 2**0.5) -> Tensor:
    return lecun_uniform_(weight, gain)


def orthogonal_(weight: Tensor, gain: float = 1.0) -> Tensor:
    """Orthonormal rows or columns of the flattened weight; signs fixed, so that it is uniform over all of them.

    Computed in float32 where the weight has less.
    """
    with torch.no_grad():
        precise = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        return weight.copy_(nn.init.orthogonal_(precise, gain))


def delta_orthogonal_(weight: Tensor, gain: float = 1.0) -> Tensor:
    """All taps 0 but the centre, which is an orthogonal matrix. Raises BadInput where C_out < C_in."""
    if len(weight) < weight.shape[1] and weight.ndim > 2:
        raise BadInput(f"delta-orthogonal needs C_out >= C_in; a convolution has {len(weight)} < {weight.shape[1]}")
    with torch.no_grad():
        centre = (..., *(side // 2 for side in weight.shape[2:]))
        weight.zero_()
        weight[centre] = orthogonal_(weight.new_empty(weight.shape[:2]), gain)
    return weight


WEIGHT_INITIALISERS: dict[str, Callable[..., Tensor]] = {
    "zero": lambda weight, gain=1.0: nn.init.zeros_(weight),
    "constant": constant_, "normal": normal_, "lecun_normal": lecun_normal_, "lecun_uniform": lecun_uniform_,
    "xavier_normal": xavier_normal_, "xavier_uniform": xavier_uniform_, "he_normal": he_normal_,
    "he_uniform": he_uniform_, "orthogonal": orthogonal_, "delta_orthogonal": delta_orthogonal_,
}  # fmt: skip


def layers_of(model: nn.Module) -> list[Layer]:
    """Its convolutions and linear layers, in the order of their definition."""
    return [module for module in model.modules() if isinstance(module, Layer)]


class Reached(Exception):
    """Ends a forward pass at the layer of interest."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Fresh batch norms pass everything through in eval mode, as methods for networks without them want it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def at_layer(model: nn.Module, layer: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a layer and what comes out; the pass stops there."""
    found: list[tuple[Tensor, Tensor]] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((inputs[0], output))
        raise Reached

    handle = layer.register_forward_hook(stop)
    try:
        model(batch)
    except Reached:
        return found[0]
    finally:
        handle.remove()
    raise BadInput(f"the layer {layer} does not take part in the forward pass of {type(model).__name__}")


def executed(model: nn.Module, batch: Tensor) -> list[Layer]:
    """The layers in the order in which a batch meets them."""
    order: list[Layer] = []
    handles = [layer.register_forward_hook(lambda module, *_: order.append(module)) for layer in layers_of(model)]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))


def to_unit_variance(model: nn.Module, layer: Layer, batch: Tensor, tolerance: float, rounds: int) -> None:
    """Divides a weight by the standard deviation of the layer's output until its variance is 1 +- tolerance."""
    for _ in range(rounds):
        output = at_layer(model, layer, batch)[1]
        if output.numel() == 1:
            raise BadInput(f"the layer {layer} gives one value for this batch, which has no variance; give more images")
        variance = float(output.var())
        if abs(variance - 1) < tolerance or variance == 0:
            return
        layer.weight.div_(variance**0.5)


def lsuv(model: nn.Module, batch: Tensor, tolerance: float = 0.1, rounds: int = 10) -> None:
    """Orthogonal, then layer by layer in the order of the forward pass to outputs of variance 1."""
    initialise(model, "orthogonal")
    with evaluating(model):
        for layer in executed(model, batch):
            to_unit_variance(model, layer, batch, tolerance, rounds)


def from_patches(model: nn.Module, batch: Tensor, learner: Callable[..., Tensor]) -> None:
    """Filters learned from the patches that each convolution receives, at output variance 1; the rest by LSUV's rule.

    Where a layer has more filters than its patches have dimensions, those left over start at random. Layers with groups
    keep orthogonal filters.
    """
    initialise(model, "orthogonal")
    with evaluating(model):
        for layer in executed(model, batch):
            if isinstance(layer, nn.Conv2d) and layer.groups == 1:
                inputs, _ = at_layer(model, layer, batch)
                found = learned_weight(inputs, layer, learner)
                layer.weight[: len(found)] = found.to(layer.weight)
            to_unit_variance(model, layer, batch, 0.1, 10)


def learned_weight(inputs: Float[Tensor, "n c h w"], layer: nn.Conv2d, learner: Callable[..., Tensor]) -> Tensor:
    """As many filters as the patches allow, of unit norm; the patches are spread as the layer's taps are."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(inputs, layer._reversed_padding_repeated_twice, mode)
    patches = sampled_patches(padded, layer.kernel_size, 10_000, dilation=layer.dilation)
    filters = learner(patches, min(layer.out_channels, patches.shape[1], len(patches)))
    return nn.functional.normalize(filters, dim=1).unflatten(1, layer.weight.shape[1:])


def whitened_kmeans(patches: Float[Tensor, "n d"], count: int) -> Float[Tensor, "m d"]:
    """k-means after contrast normalisation and ZCA, without which it finds averages.

    What is linear in both, the whitening and taking off a patch's mean, is folded into the filters.
    """
    if patches.shape[1] == 1:  # no contrast in one value
        return kmeans(patches, count)
    normalised = contrast_normalised(patches)
    whitening = Whitening.zca(normalised)
    filters = kmeans(whitening(normalised), count) @ whitening.matrix
    return filters - filters.mean(1, keepdim=True)


def fixup(model: nn.Module, branches: Sequence[nn.Module] | None = None) -> None:
    """He, then in each of L residual branches of m layers all but the last times L^(-1/(2m - 2)), and the last 0.

    The classifier, the last linear layer, starts at 0, too. branches: modules whose layers are one branch each, in the
    order of their use; by default those that `residual_branches` finds. Batch norms are left as they are.
    Raises BadInput where no branches are known, or one has no layers.
    """
    found = [layers_of(branch) for branch in branches] if branches else residual_branches(model)
    if not found:
        raise BadInput(f"no residual branches found in {type(model).__name__}; name them with branches=[...]")
    if not all(found):
        raise BadInput(
            f"a residual branch of {type(model).__name__} has no convolutions and no linear layers to shrink"
        )
    initialise(model, "he_normal")
    with torch.no_grad():
        for layers in found:
            for layer in layers[:-1]:
                layer.weight.mul_(len(found) ** (-1 / (2 * len(layers) - 2)))
            layers[-1].weight.zero_()
        heads = [layer for layer in layers_of(model) if isinstance(layer, nn.Linear)]
        if heads:
            heads[-1].weight.zero_()


def residual_branches(model: nn.Module) -> list[list[Layer]]:
    """The layers of every residual branch, block by block.

    Known are blocks with two branches (`norm1`, `norm2`, `mlp`, and a mixer); and with one, which have a `downsample`
    or `shortcut` (None where nothing changes), or a `drop_path`, or say `residual = True`.
    Raises BadInput at any other class that ends as BLOCKS do: it may be residual or not.
    """
    branches = branches_of(model)
    if branches is not None:
        return branches
    inside = [branch for child in model.children() for branch in residual_branches(child)]
    if not inside and is_block(model) and len(layers_of(model)) > 1:
        raise BadInput(f"{type(model).__name__} may be residual or not; name the branches with branches=[...]")
    return inside


def is_block(module: nn.Module) -> bool:
    return type(module).__name__.endswith(BLOCKS)


def branches_of(block: nn.Module) -> list[list[Layer]] | None:
    """The branches of one block: two, one, none where it says `residual = False`; None where that is not known."""
    if not is_block(block):
        return None
    residual = getattr(block, "residual", None)
    if isinstance(residual, bool):
        return [layers_of(block)] if residual else []
    if all(isinstance(getattr(block, name, None), nn.Module) for name in ("norm1", "norm2", "mlp")):
        mixers = [m for name, m in block.named_children() if name in MIXERS]
        return [layers_of(part) for part in (*mixers, block.mlp)] if len(mixers) == 1 else None
    if not any(hasattr(block, name) for name in ("downsample", "shortcut", "drop_path")):
        return None
    shortcuts = [getattr(block, name, None) for name in ("downsample", "shortcut")]
    skipped = {id(m) for shortcut in shortcuts if isinstance(shortcut, nn.Module) for m in shortcut.modules()}
    return [[layer for layer in layers_of(block) if id(layer) not in skipped]]


MODEL_INITIALISERS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "lsuv": lsuv,
    "pca": lambda model, batch: from_patches(model, batch, pca),
    "kmeans": lambda model, batch: from_patches(model, batch, whitened_kmeans),
}
INITIALISERS = (*WEIGHT_INITIALISERS, *MODEL_INITIALISERS, "fixup")


def initialise(model: nn.Module, name: str, batch: Tensor | None = None, gain: float | None = None) -> nn.Module:
    """Starts every convolution and linear layer of a network in place, biases at 0; returns it.

    Args: name, one of INITIALISERS; batch, images for those that learn from data; gain, the factor of the standard
        deviation, by default the initialiser's own.
    Raises UnknownName; BadInput without a batch where one is needed, or with a gain where there is none.
    """
    if name not in INITIALISERS:
        raise UnknownName("initialiser", name, INITIALISERS)
    for layer in layers_of(model):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if name in WEIGHT_INITIALISERS:
        chosen = () if gain is None else (gain,)
        for layer in layers_of(model):
            for group in layer.weight.detach().chunk(getattr(layer, "groups", 1)):
                WEIGHT_INITIALISERS[name](group, *chosen)
        return model
    if gain is not None:
        raise BadInput(f"the initialiser '{name}' takes no gain; it scales the layers itself")
    if name == "fixup":
        fixup(model)
    elif batch is None:
        raise BadInput(f"the initialiser '{name}' learns from data; give it a batch of images")
    else:
        MODEL_INITIALISERS[name](model, batch)
    return model
