"""EvoNorm: norm and activation as one expression, as evolution found it.

Liu et al. 2020, "Evolving Normalization-Activation Layers", arXiv:2004.02967. Searching over computation graphs of
elementary functions and moments, instead of joining a norm and an activation, gives layers that are neither (table 2).
With s^2 a variance and m^2 a mean of squares over the axes that are named:

    B0: x / max(s_nhw, v x + s_hw)          S0: x sigmoid(v x) / s_group
    B1: x / max(s_nhw, (x + 1) m_hw)        S1: x sigmoid(x) / s_group
    B2: x / max(s_nhw, m_hw - x)            S2: x sigmoid(x) / m_group

times gamma plus beta. The B layers need the batch and keep a running variance for inference; the S layers see one
sample, and a group of channels, only. No activation follows them. Where a network has a norm without an activation, the
affine part alone remains (`apply_act=False`). Names of parameters follow timm.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput
from opsin.layers.readers import readings

Map = Float[Tensor, "n c h w"]
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish)
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
FEWEST = 2  # channels of a group, where their number is not given


def precise(x: Tensor) -> Tensor:
    """Statistics are taken in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def moments(x: Float[Tensor, "n c t"]) -> tuple[Float[Tensor, "n c 1"], Float[Tensor, "n c 1"]]:
    """Mean and biased variance over the last axis, in two passes: several times as fast as `var` on a CPU."""
    x = precise(x)
    mean = x.mean(2, keepdim=True)
    return mean, (x - mean).square().mean(2, keepdim=True)


def group_var(x: Map, groups: int) -> Float[Tensor, "n g 1"]:
    """s^2_group: the biased variance of each sample over a group of channels."""
    return moments(x.flatten(1).unflatten(1, (groups, -1)))[1]


def group_square(x: Map, groups: int) -> Float[Tensor, "n g 1"]:
    """m^2_group: the mean square."""
    return precise(x).flatten(1).unflatten(1, (groups, -1)).square().mean(2, keepdim=True)


def on_map(vector: Float[Tensor, " c"], x: Map) -> Float[Tensor, "c 1 1"]:
    """A value per channel, in the type of the map."""
    return vector[:, None, None].to(x.dtype)


class EvoNorm(nn.Module):
    """gamma * act(x) + beta, with `act` as a subclass says; (N, C, H, W) -> the same.

    `parts` gives what is computed: two factors, of which the second holds gamma and the divisor, and is small where the
    divisor is. Args: dim, channels; eps, below every root; apply_act, False for the affine part alone.
    """

    learned_v, always_divides, eps = False, False, 1e-5

    def __init__(self, dim: int, eps: float | None = None, apply_act: bool = True):
        super().__init__()
        self.dim, self.apply_act = dim, apply_act
        self.eps = type(self).eps if eps is None else eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.v = nn.Parameter(torch.ones(dim)) if self.learned_v and apply_act else None

    def forward(self, x: Map) -> Map:
        divides = self.apply_act or self.always_divides
        numerator, gain = self.parts(x) if divides else (x, on_map(self.weight, x))
        return numerator * gain + on_map(self.bias, x)

    def reference(self, x: Map) -> Map:
        """gamma * act(x) + beta as it is written."""
        y = self.act(x) if self.apply_act or self.always_divides else x
        return y * on_map(self.weight, x) + on_map(self.bias, x)

    def parts(self, x: Map) -> tuple[Map, Float[Tensor, "#n c #h #w"]]:
        """Two factors of gamma * act(x)."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")

    def act(self, x: Map) -> Map:
        """The row of the table."""
        raise TypeError(f"{type(self).__name__} does not say what it is")

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}" + ("" if self.apply_act else ", affine only")


class EvoNormB(EvoNorm):
    """A layer with batch statistics: x / max(s_nhw, `floor`), both from the moments of each sample's channels."""

    def __init__(self, dim: int, eps: float | None = None, apply_act: bool = True, momentum: float = 0.1):
        super().__init__(dim, eps, apply_act)
        self.momentum = momentum
        self.register_buffer("running_var", torch.ones(dim))

    def parts(self, x: Map) -> tuple[Map, Map]:
        mean, var = moments(x.flatten(2))
        batch = on_map((self._batch_var(mean, var, x) + self.eps).sqrt(), x)
        return x, on_map(self.weight, x) / torch.maximum(batch, self.floor(x, mean[..., None], var[..., None]))

    def act(self, x: Map) -> Map:
        y = precise(x)
        var = y.var((0, 2, 3), correction=0) if self.training else self.running_var
        floor = self.floor(x, y.mean((2, 3), keepdim=True), y.var((2, 3), correction=0, keepdim=True))
        return x / torch.maximum(on_map((var + self.eps).sqrt(), x), floor)

    def _batch_var(self, mean: Tensor, var: Tensor, x: Map) -> Float[Tensor, " c"]:
        """Biased, of the batch, in training; the running average of unbiased ones at inference."""
        if not self.training:
            return self.running_var
        batch = var.mean((0, 2)) + (mean - mean.mean(0)).square().mean((0, 2))
        count = x.numel() // x.shape[1]
        unbiased = batch.detach() * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return batch

    def floor(self, x: Map, mean: Float[Tensor, "n c 1 1"], var: Float[Tensor, "n c 1 1"]) -> Map:
        """What the divisor is at least, from the moments of each sample and channel."""
        raise TypeError(f"{type(self).__name__} does not say what it divides by")


class EvoNormB0(EvoNormB):
    """x / max(s_nhw, v x + s_hw)."""

    learned_v, eps = True, 1e-3

    def floor(self, x: Map, mean: Float[Tensor, "n c 1 1"], var: Float[Tensor, "n c 1 1"]) -> Map:
        return x * on_map(self.v, x) + (var + self.eps).sqrt().to(x.dtype)


class EvoNormB1(EvoNormB):
    """x / max(s_nhw, (x + 1) m_hw)."""

    def floor(self, x: Map, mean: Float[Tensor, "n c 1 1"], var: Float[Tensor, "n c 1 1"]) -> Map:
        return (x + 1) * (var + mean.square() + self.eps).sqrt().to(x.dtype)


class EvoNormB2(EvoNormB):
    """x / max(s_nhw, m_hw - x)."""

    def floor(self, x: Map, mean: Float[Tensor, "n c 1 1"], var: Float[Tensor, "n c 1 1"]) -> Map:
        return (var + mean.square() + self.eps).sqrt().to(x.dtype) - x


class EvoNormS(EvoNorm):
    """A layer of one sample: `gate(x)` over a statistic of groups of channels.

    groups: 32 in the paper; without a number the most that divide `dim`, up to 32, with two channels or more in each.
    Raises BadInput where the groups do not divide the channels, or are none.
    """

    statistic: Callable[[Map, int], Float[Tensor, "n g 1"]] = staticmethod(group_var)

    def __init__(self, dim: int, groups: int | None = None, eps: float | None = None, apply_act: bool = True):
        super().__init__(dim, eps, apply_act)
        self.groups = fitting_groups(dim) if groups is None else groups
        if self.groups < 1 or dim % self.groups:
            raise BadInput(f"groups={groups} does not divide the {dim} channels; take a divisor, or leave it out")

    def parts(self, x: Map) -> tuple[Map, Float[Tensor, "n c 1 1"]]:
        inverse = torch.rsqrt(self.statistic(x, self.groups) + self.eps)
        gain = (self.weight.view(self.groups, -1) * inverse).flatten(1)
        return self.gate(x) if self.apply_act else x, gain[..., None, None].to(x.dtype)

    def act(self, x: Map) -> Map:
        moment = self.statistic(x, self.groups).repeat_interleave(self.dim // self.groups, 1)
        return (self.gate(x) if self.apply_act else x) / (moment + self.eps).sqrt()[..., None].to(x.dtype)

    def gate(self, x: Map) -> Map:
        """The numerator."""
        return nn.functional.silu(x)


class EvoNormS0(EvoNormS):
    """x sigmoid(v x) / s_group."""

    learned_v = True

    def gate(self, x: Map) -> Map:
        return x * torch.sigmoid(x * on_map(self.v, x))


class EvoNormS1(EvoNormS):
    """x sigmoid(x) / s_group."""


class EvoNormS2(EvoNormS):
    """x sigmoid(x) / m_group."""

    statistic = staticmethod(group_square)


class EvoNormS0a(EvoNormS0):
    """timm's variant for training from scratch: a larger eps, and the affine-only form still divides."""

    eps, always_divides = 1e-3, True


class EvoNormS1a(EvoNormS1):
    """As S0a."""

    eps, always_divides = 1e-3, True


class EvoNormS2a(EvoNormS2):
    """As S0a."""

    eps, always_divides = 1e-3, True


FORMS: dict[str, type[EvoNorm]] = {
    "b0": EvoNormB0, "b1": EvoNormB1, "b2": EvoNormB2, "s0": EvoNormS0, "s1": EvoNormS1, "s2": EvoNormS2,
    "s0a": EvoNormS0a, "s1a": EvoNormS1a, "s2a": EvoNormS2a,
}  # fmt: skip
VARIANTS = {f"evonorm_{form}": dict(form=form) | (dict(groups=32) if form[0] == "s" else {}) for form in FORMS}


def fitting_groups(dim: int) -> int:
    """The most groups, up to 32, that leave at least two channels in each."""
    return max((g for g in range(1, 33) if dim % g == 0 and dim // g >= FEWEST), default=1)


def evonorm(
    dim: int, form: str = "s0", groups: int | None = None, eps: float | None = None, apply_act: bool = True
) -> EvoNorm:
    """A layer by the name of its form. Raises BadInput: an unknown form, or groups for a form that has none."""
    if form not in FORMS:
        raise BadInput(f"form='{form}' is no EvoNorm; take one of {', '.join(FORMS)}")
    build = FORMS[form]
    if issubclass(build, EvoNormS):
        return build(dim, groups, eps, apply_act)
    if groups is not None:
        raise BadInput(f"groups={groups} means nothing to EvoNorm {form.upper()}, which has no groups; leave it out")
    return build(dim, eps, apply_act)


def evolve(model: nn.Module, form: str = "s0", groups: int | None = None) -> int:
    """Puts an EvoNorm in the place of every pair of norm and activation of any network, in place; returns how many.

    The activations become identities, where all that they read are norms. A norm that no activation follows (the end of
    a residual branch) keeps its affine part alone. Which activation, a module, reads which norm is traced from the
    forwards. Raises BadInput where no activation reads a norm.
    """
    norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    read: dict[str, set[str | None]] = defaultdict(set)
    for source, reader in readings(model, lambda m: isinstance(m, NORMS + ACTIVATIONS)):
        if isinstance(model.get_submodule(reader), ACTIVATIONS):
            read[reader].add(source)
    gone = [reader for reader, sources in read.items() if sources <= set(norms)]
    active = {source for reader in gone for source in read[reader]}
    if not active:
        raise BadInput("no activation module of this network reads a norm; EvoNorm replaces pairs of the two")
    for name in norms:
        old: Any = model.get_submodule(name)
        dim = old.num_channels if isinstance(old, nn.GroupNorm) else old.num_features
        new = evonorm(dim, form, groups, apply_act=name in active)
        if old.weight is not None:
            new.weight.data, new.bias.data = old.weight.detach().clone(), old.bias.detach().clone()
        model.set_submodule(name, new.to(new.weight.device).train(old.training))
    for reader in gone:
        model.set_submodule(reader, nn.Identity())
    return len(active)
