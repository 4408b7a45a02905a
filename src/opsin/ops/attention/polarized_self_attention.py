"""Polarized self-attention: a gain per channel and a gain per pixel, each made at full resolution of its own kind.

Liu et al. 2021, "Polarized Self-Attention: Towards High-quality Pixel-wise Regression", arXiv:2107.00782. Pixel-wise
outputs depend on both channel and place, but attention over all pairs is too dear. So one branch collapses space and
keeps C/2 channels, the other collapses the channels and keeps every pixel; softmax where something is collapsed, and a
sigmoid at the end, fit peaky outputs (section 3.1; mean over pixels p, all maps 1x1 convolutions):

    A_ch = sigmoid(W_z W_v sum_p softmax_p(w_q x) x_p),    A_sp = sigmoid(softmax(W_q mean_p x)^T W_v' x)

The parallel layout gives A_ch x + A_sp x, the sequential one A_sp' (A_ch x) with A_sp' of A_ch x.

The first softmax of A_sp is over channels in the paper. The official code normalises over the pixels instead: the
logits (parallel) or the rows of W_v' x (sequential). Their sum over the pixels is then fixed, so that on a large map
every logit is near 0 and A_sp is 1/2 almost everywhere. `softmax="official"` is that, for its weights.

Nothing is mixed before it is collapsed: W_v sum_p a_p x_p = sum_p a_p W_v x_p and g^T (W_v' x) = (W_v'^T g)^T x, so the
cost falls from 3/2 N C^2 to 3 N C multiplications, with equal results. Only the official sequential form, whose softmax
is of the rows of W_v' x, has to make these: 1/2 N C^2. Names of parameters follow DeLightCMU/PSA.
"""

from collections import OrderedDict
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput

Layout = Literal["parallel", "sequential"]
Softmax = Literal["paper", "official"]
VARIANTS = {
    "psa_p": dict(layout="parallel", softmax="official"),
    "psa_s": dict(layout="sequential", softmax="official"),
}


class PolarizedSelfAttention(nn.Module):
    """(N, C, H, W) -> the same. The block around it has the identity, so there is none here.

    Args:
        layout: "parallel" or "sequential". In the latter W_z is a bottleneck with a norm, as in the official code.
        softmax: "paper", or "official" for weights of the official code.
    Raises BadInput: C is odd (or, in the sequential layout, no multiple of 8), or an unknown layout or softmax.
    """

    def __init__(self, dim: int, layout: Layout = "parallel", softmax: Softmax = "paper"):
        super().__init__()
        if layout not in ("parallel", "sequential") or softmax not in ("paper", "official"):
            raise BadInput(
                f"layout='{layout}', softmax='{softmax}' is unknown; the layout is parallel or sequential, and the "
                "softmax paper or official"
            )
        step = 2 if layout == "parallel" else 8
        if dim % step:
            raise BadInput(f"dim={dim} is no multiple of {step}, which the {layout} layout needs; take another width")
        self.layout, self.softmax, half = layout, softmax, dim // 2
        self.conv_q_right = nn.Conv2d(dim, 1, 1, bias=False)
        self.conv_v_right = nn.Conv2d(dim, half, 1, bias=False)
        self.conv_up = nn.Conv2d(half, dim, 1, bias=False) if layout == "parallel" else _bottleneck(half, dim)
        self.conv_q_left = nn.Conv2d(dim, half, 1, bias=False)
        self.conv_v_left = nn.Conv2d(dim, half, 1, bias=False)
        for conv in (self.conv_q_right, self.conv_v_right, self.conv_q_left, self.conv_v_left):
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        gained = x * self.channel_gain(x)
        if self.layout == "sequential":
            return gained * self.spatial_gain(gained)
        return gained + x * self.spatial_gain(x)

    def channel_gain(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 1 1"]:
        """A_ch, in (0, 1): the mean of the pixels under one learned attention, then two matrices."""
        weights = self.conv_q_right(x).flatten(2).softmax(-1)
        pooled = x.flatten(2) @ weights.transpose(1, 2)
        return self.conv_up(self.conv_v_right(pooled.unsqueeze(-1))).sigmoid()

    def spatial_gain(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 h w"]:
        """A_sp, in (0, 1): the product of every pixel with one direction that the mean pixel chooses."""
        query, pixels = self.conv_q_left(x.mean((2, 3), keepdim=True)).flatten(1), x.flatten(2)
        if self.softmax == "official" and self.layout == "sequential":
            logits = query.unsqueeze(1) @ self.conv_v_left(x).flatten(2).softmax(-1)
        else:
            query = query.softmax(-1) if self.softmax == "paper" else query
            logits = (query @ self.conv_v_left.weight.flatten(1)).unsqueeze(1) @ pixels
            logits = logits if self.softmax == "paper" else logits.softmax(-1)
        return logits.unflatten(2, x.shape[2:]).sigmoid()

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The equations word by word, with every projection at full resolution."""
        values, weights = self.conv_v_right(x), self.conv_q_right(x).flatten(2).softmax(-1)
        collapsed = torch.einsum("ncp,nqp->ncq", values.flatten(2), weights)
        gained = x * self.conv_up(collapsed.unsqueeze(-1)).sigmoid()
        y = gained if self.layout == "sequential" else x
        query, theta = self.conv_q_left(y).mean((2, 3)), self.conv_v_left(y).flatten(2)
        if self.softmax == "paper":
            logits = torch.einsum("nc,ncp->np", query.softmax(-1), theta)
        elif self.layout == "sequential":
            logits = torch.einsum("nc,ncp->np", query, theta.softmax(-1))
        else:
            logits = torch.einsum("nc,ncp->np", query, theta).softmax(-1)
        spatial = y * logits.sigmoid().unflatten(1, x.shape[2:]).unsqueeze(1)
        return spatial if self.layout == "sequential" else gained + spatial

    def extra_repr(self) -> str:
        return f"layout={self.layout}, softmax={self.softmax}"


def _bottleneck(half: int, dim: int) -> nn.Sequential:
    """W_z of the sequential layout: a quarter of the channels, normed, and back."""
    squeeze, expand = nn.Conv2d(half, half // 4, 1), nn.Conv2d(half // 4, dim, 1)
    return nn.Sequential(squeeze, nn.LayerNorm((half // 4, 1, 1)), nn.ReLU(), expand)


def insert_psa(network: nn.Module, layout: Layout = "parallel", softmax: Softmax = "paper") -> nn.Module:
    """Puts the operator after the first convolution, norm and ReLU of every residual block, in place (section 4).

    Residual blocks are the modules that have `conv1`, `bn1`, `relu1` and `conv2`, as those of `opsin.backbones.resnet`;
    other parameters keep their names, and the operator's are `relu1.psa.*`. Raises BadInput where there is no such
    block.
    """
    blocks = [m for m in network.modules() if all(hasattr(m, part) for part in ("conv1", "bn1", "relu1", "conv2"))]
    if not blocks:
        raise BadInput(f"{type(network).__name__} has no block with conv1, bn1, relu1 and conv2; take a resnet")
    for block in blocks:
        psa = PolarizedSelfAttention(block.bn1.num_features, layout, softmax).to(block.conv1.weight)
        block.relu1 = nn.Sequential(OrderedDict(act=block.relu1, psa=psa))
    return network
