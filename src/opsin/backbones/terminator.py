"""Terminator: no residual connections; blocks multiply rows with columns of the map, weighted by hyper-kernels.

The network of Zhang 2024, arXiv:2401.17948 (see the operator `hyperzzw`). A slow-fast neural encoding block multiplies
its input X with a hyper-kernel K as large as the map, and lets these context weights act on features of X:

    global   Y = (K X) F,   a product of matrices per channel, for F = fast, mixed and channel-gated features of X
    local    y(p) = sum_q (K_l(q) a(p + q)) b(p + q),   for pairs (a, b) of X and those features, four kernel sizes
    gated    X sigmoid(K_s s^2 K_c m^2),   s and m the means of Y over channels and over positions

By products a position sees its row, its column and a 9x9 window in one block, and everything in two; the rest of the
image reaches it in one block only pooled, through m and through means and variances.

All branches are concatenated, a 1x1 bottleneck keeps what is useful, and half of the groups of channels are
standardised over the batch, half per image. A local error, the distance of the blocks' kernels from each other, teaches
the slow networks besides the task: `slow_loss()`, or the recipe `slow_loss`.

The author's repository holds no code any more. Branches, their inputs, widths and the slow loss follow what a public
copy of it (lalalune/Terminator) still has, written anew from its formulas. Chosen here, because the copy lacks it:
which earlier inputs a block sees (those of the one and two blocks before), GELU after each block, frequencies and start
of the slow networks. Different on purpose: local kernels get their context from the windows, as the paper says, where
the copy makes one kernel from the mean over the batch, so that images change each other; batch statistics have running
averages for eval mode, for the same reason; and no offset is bound to a position, so that kernels are redrawn at any
resolution.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones import Backbone, FeatureInfo
from opsin.errors import BadInput
from opsin.layers.slow_net import SlowNet
from opsin.ops.gating.hyperzzw import local_zzw, standardise

GROUPS = 12  # of channels, standardised in turn over the batch and per image
LOCAL_SIZES = (3, 9, 5, 7)
BRANCHES = 10
VARIANTS = {"terminator_cifar": dict(factors=(4, 3, 2, 2, 2), earlier=(0, 0, 1, 1, 2), dropout=0.05)}


class GroupStandardisation(nn.Module):
    """G-IBS: groups of channels standardised in turn over the batch and per image, without parameters."""

    def __init__(self, dim: int):
        super().__init__()
        if dim % GROUPS:
            raise BadInput(
                f"{dim} channels have no {GROUPS} equal groups; take factors whose products are multiples of it"
            )
        self.batch = nn.BatchNorm2d(dim // 2, affine=False)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        groups = x.unflatten(1, (GROUPS // 2, 2, -1))
        batch = self.batch(groups[:, :, 0].flatten(1, 2)).unflatten(1, (GROUPS // 2, -1))
        image = standardise(groups[:, :, 1].flatten(1, 2)).unflatten(1, (GROUPS // 2, -1))
        return torch.stack((batch, image), 2).flatten(1, 3)


class RecursiveGate(nn.Module):
    """RGU: q = GELU(std(W_k x * W_q W_v x)), y = W_y q."""

    def __init__(self, dim: int):
        super().__init__()
        self.key, self.value, self.query, self.out = (_mixer(dim, dim) for _ in range(4))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self.out(F.gelu(standardise(self.key(x) * self.query(self.value(x)))))


class HyperChannel(nn.Module):
    """Scores of channels: K_c m^2, with m the mean over positions and K_c drawn over the channels' numbers."""

    def __init__(self, hidden: int):
        super().__init__()
        self.slow = SlowNet(1, 1, hidden)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 1 1"]:
        return (self.slow((x.shape[1],)).to(x.dtype) * x.mean((2, 3)).square())[:, :, None, None]


class HyperInteraction(nn.Module):
    """Filters x by scores of the channels and positions of y."""

    def __init__(self) -> None:
        super().__init__()
        self.channel, self.slow = HyperChannel(16), SlowNet(1, 2, 64)

    def forward(self, y: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        places = self.slow(y.shape[2:]).to(y.dtype) * y.mean(1, keepdim=True).square()
        return x * torch.sigmoid(places * self.channel(y))


class LocalBranch(nn.Module):
    """Local HyperZZW, a 1x1 convolution, batch standardisation, GELU and one offset."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.slow = SlowNet(dim, 2, 32, fan_in=kernel_size**2)
        self.mixer = _mixer(dim, dim, bias=False)  # the standardisation takes any offset away
        self.norm = nn.BatchNorm2d(dim, affine=False)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return F.gelu(self.norm(self.mixer(self.apply_kernel(self.slow((self.kernel_size,) * 2), a, b)))) + self.bias

    def apply_kernel(self, kernel: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return local_zzw(kernel, a, b)


class SFNEBlock(nn.Module):
    """(N, C, H, H) -> (N, factor C, H, H): ten branches, a bottleneck and group standardisation.

    Args: dim, C; factor; earlier: how many earlier inputs are concatenated; num_layers of the global slow network;
        image_size in pixels, which sets the variance of fresh global kernels; dropout of channels.
    """

    local_branch = LocalBranch

    def __init__(self, dim: int, factor: int, earlier: int, num_layers: int, image_size: int, dropout: float):
        super().__init__()
        self.slow_global = SlowNet(dim, 2, 64, num_layers, fan_in=image_size)
        self.gate_context, self.gate = RecursiveGate(dim), RecursiveGate(dim)
        self.mixer = _mixer(dim, dim, bias=False)
        self.channel, self.interact = HyperChannel(32), HyperInteraction()
        self.locals = nn.ModuleList(self.local_branch(dim, size) for size in LOCAL_SIZES)
        self.bottleneck = _mixer((BRANCHES + earlier) * dim, factor * dim, bias=False)
        self.norm = GroupStandardisation(factor * dim)
        self.dropout = nn.Dropout2d(dropout)
        self.bias = nn.Parameter(torch.zeros(1))

    def context(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The context weights K X."""
        return self.slow_global(x.shape[2:]).to(x.dtype) * x

    def forward(self, x: Float[Tensor, "n c h w"], earlier: Sequence[Tensor] = ()) -> Float[Tensor, "n c2 h w"]:
        weights = self.context(x)
        fast = standardise(self.gate_context(weights) + self.gate(x))
        mixed = standardise(self.mixer(x))
        gated = standardise(x * torch.sigmoid(self.channel(x)))
        y, y_mixed, y_gated = (weights @ features for features in (fast, mixed, gated))
        pairs = ((x, gated), (gated, x), (mixed, x), (x, mixed))
        near = [branch(a, b) for branch, (a, b) in zip(self.locals, pairs, strict=True)]
        tiled = [past.repeat(1, x.shape[1] // past.shape[1], 1, 1) for past in earlier]
        branches = (y, y_mixed, y_gated, y * torch.sigmoid(y), fast, self.interact(y, x), *near, *tiled)
        out = self.norm(self.bottleneck(torch.cat(branches, 1)))
        return self.dropout(F.gelu(out) + self.bias)


class Terminator(Backbone):
    """Square images; every map has the image's size.

    Args:
        factors: by which each block multiplies the channels; the products must be multiples of 12.
        earlier: earlier inputs that each block sees; there are none for the first, one for the second, and so on.
        image_size: in pixels. slow_layers: depth of the first block's global slow network; later ones have one less.
        dropout: of channels, in all blocks but the first.
    Raises BadInput: an image that is not square, channels that do not divide, more earlier inputs than there are.
    """

    def __init__(
        self, factors: Sequence[int] = (4, 3, 2, 2, 2), earlier: Sequence[int] = (0, 0, 1, 1, 2), num_classes: int = 10,
        in_chans: int = 3, image_size: int = 32, slow_layers: int = 3, dropout: float = 0.0,
        block: type[SFNEBlock] = SFNEBlock,
    ):  # fmt: skip
        super().__init__()
        _check(factors, earlier)
        self.earlier, self.image_size, self.factors = tuple(earlier), image_size, tuple(factors)
        self.feature_info, self.blocks, dim = [], nn.ModuleList(), in_chans
        for i, (factor, past) in enumerate(zip(factors, earlier, strict=True)):
            layers = slow_layers if i == 0 else max(1, slow_layers - 1)
            self.blocks.append(block(dim, factor, past, layers, image_size, dropout if i else 0.0))
            dim *= factor
            self.feature_info.append(FeatureInfo(dim, 1))
        self.num_classes, self.num_features = num_classes, dim
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def features(self, x: Float[Tensor, "n k h h"]) -> list[Float[Tensor, "n _c h h"]]:
        if x.shape[2] != x.shape[3]:
            height, width = x.shape[2:]
            raise BadInput(f"Terminator multiplies maps as matrices, so {height}x{width} must be cropped to a square")
        inputs = [x]
        for block, past in zip(self.blocks, self.earlier, strict=True):
            seen = inputs[:-1][::-1][:past]
            inputs.append(block(inputs[-1], seen))
        return inputs[1:]

    def forward_head(self, x: Float[Tensor, "n c h h"]) -> Float[Tensor, "n k"]:
        return self.head(x.mean((2, 3)))

    def slow_loss(self) -> Float[Tensor, ""]:
        """The local error of the slow networks: mean squared differences of all pairs of blocks' global kernels.

        A shallower block's kernel is tiled to the channels of the deeper one. Add it to the task's loss, as the recipe
        `slow_loss` does. Raises BadInput where there is one block only.
        """
        if len(self.blocks) < 2:
            raise BadInput("the slow loss compares blocks with each other, and this Terminator has one; leave it out")
        kernels = [block.slow_global((self.image_size,) * 2) for block in self.blocks]
        return torch.stack([
            F.mse_loss(shallow.repeat(len(deep) // len(shallow), 1, 1), deep)
            for i, deep in enumerate(kernels) for shallow in kernels[:i]
        ]).sum()  # fmt: skip


def _check(factors: Sequence[int], earlier: Sequence[int]) -> None:
    """Raises BadInput where there are no such blocks."""
    if len(factors) != len(earlier) or not factors:
        given = f"factors={tuple(factors)} and earlier={tuple(earlier)}"
        raise BadInput(f"{given} need one number each for every block, and at least one block")
    for block, past in enumerate(earlier):
        if not 0 <= past <= block:
            raise BadInput(f"earlier={tuple(earlier)}: block {block + 1} sees 0 to {block} earlier inputs, not {past}")


def _mixer(dim_in: int, dim: int, bias: bool = True) -> nn.Conv2d:
    """A 1x1 convolution."""
    conv = nn.Conv2d(dim_in, dim, 1, bias=bias)
    nn.init.kaiming_normal_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
