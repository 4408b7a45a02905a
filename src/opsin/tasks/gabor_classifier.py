"""A classifier of two branches: a backbone for shapes, and learned Gabor filters with statistics for texture.

Zhu et al. 2023, "Learning Gabor Texture Features for Fine-Grained Recognition" (arXiv:2308.05396; filters and
statistics are those of the card `gabor_texture`). Boxes of several scales lie on a fixed grid over the image. A gate
scores each from the semantic features and keeps it or not, and only kept regions are cut out, zoomed to S x S pixels
and described by the texture branch:

    prediction = head(M + sum_r g_r T_r),    g_r = 1 if the gate's score is above 0, else 0

The gate's answer is hard; its gradient is that of a sigmoid with logistic noise (straight through), and a budget term
pulls the share of kept regions to a given one. There is no public code: the gate's form and the embedding are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones import Backbone
from opsin.catalog import create
from opsin.errors import BadInput
from opsin.ops.conv.gabor_texture import GaborFilters, co_occurrence, histogram, soft_levels
from opsin.tasks import Classes, Losses
from opsin.tasks.classify import Classifier


@dataclass
class RegionClasses(Classes):
    """Classes, and which of the regions the gate keeps, for a close look: 1 or 0 for each."""

    kept: Float[Tensor, "n r"]


def grid_boxes(scales: Sequence[float]) -> Float[Tensor, "r 4"]:
    """Boxes (x0, y0, x1, y1) in parts of the image: per scale a grid of squares that overlap by about half.

    Raises BadInput: no scale, or one outside (0, 1].
    """
    if not scales or not all(0 < scale <= 1 for scale in scales):
        raise BadInput(f"scales={tuple(scales)}; take parts of the image's side, above 0 and up to 1")
    boxes = []
    for scale in scales:
        starts = torch.linspace(0, 1 - scale, 1 if scale == 1 else max(2, 2 * round(1 / scale) - 1))
        y, x = torch.cartesian_prod(starts, starts).view(-1, 2).T
        boxes.append(torch.stack((x, y, x + scale, y + scale), 1))
    return torch.cat(boxes)


def box_means(maps: Float[Tensor, "n c h w"], boxes: Float[Tensor, "r 4"]) -> Float[Tensor, "n r c"]:
    """The mean of the map over every box; cells that a box covers in part count in part."""

    def cover(low: Tensor, high: Tensor, cells: int) -> Float[Tensor, "r cells"]:
        edges = torch.arange(cells + 1, device=maps.device) / cells
        inside = torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])
        return F.normalize(inside.clamp_min(0), p=1, dim=1).to(maps.dtype)

    rows, columns = cover(boxes[:, 1], boxes[:, 3], maps.shape[2]), cover(boxes[:, 0], boxes[:, 2], maps.shape[3])
    return torch.einsum("nchw,rh,rw->nrc", maps, rows, columns)


def cut_out(
    images: Float[Tensor, "n c h w"], which: Tensor, boxes: Float[Tensor, "m 4"], side: int
) -> Float[Tensor, "m c side side"]:
    """Region i is `boxes[i]` of image `which[i]`, zoomed bilinearly to side x side pixels."""
    steps = (torch.arange(side, device=images.device) + 0.5) / side
    x = boxes[:, 0, None] + (boxes[:, 2] - boxes[:, 0])[:, None] * steps
    y = boxes[:, 1, None] + (boxes[:, 3] - boxes[:, 1])[:, None] * steps
    grid = torch.stack((x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)), -1)
    grid = (2 * grid - 1).to(images.dtype)
    return F.grid_sample(images[which], grid, padding_mode="border", align_corners=False)


class RegionGate(nn.Module):
    """Keeps a region (1) or not (0) by its semantic features; hard forwards, a sigmoid backwards.

    Gives what it decides, and what is tried: in training logistic noise makes that random, with the probability that
    the sigmoid says, so that closed regions are looked at too; in eval the two are the same.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.score = nn.Linear(dim, 1)

    def forward(self, features: Float[Tensor, "n r c"]) -> tuple[Float[Tensor, "n r"], Float[Tensor, "n r"]]:
        score = self.score(self.norm(features))[..., 0]
        decided = _hard(score)
        return decided, _hard(score + torch.logit(torch.rand_like(score), eps=1e-6)) if self.training else decided


def _hard(score: Tensor) -> Tensor:
    """1 where the score is above 0, else 0; the gradient of a sigmoid."""
    soft = score.sigmoid()
    return (score > 0).to(soft.dtype) + (soft - soft.detach())  # the bracket is exactly 0


class TextureBranch(nn.Module):
    """Regions (m, c, S, S) -> texture vectors (m, dim).

    Filter responses, by every filter the pairs (value of a level, its share) through a small MLP averaged over levels,
    plus a linear map of the co-occurrences; then one linear map over all filters.
    Args: filters, a module that gives kernels (f, s, s); levels of the histogram; hidden, numbers per filter.
    """

    def __init__(self, filters: nn.Module, count: int, dim: int, levels: int = 8, hidden: int = 16):
        super().__init__()
        self.filters, self.levels = filters, levels
        self.pairs = nn.Sequential(nn.Linear(2, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.neighbours = nn.Linear(levels**2, hidden)
        self.pool = nn.Linear(count * hidden, dim)

    def statistics(
        self, regions: Float[Tensor, "m c s s"]
    ) -> tuple[Float[Tensor, "m f l 2"], Float[Tensor, "m f l l"]]:
        """Per filter the pairs (value, share) of every level and the co-occurrences; shares are times the levels."""
        responses = F.conv2d(regions.mean(1, keepdim=True), self.filters()[:, None])
        weights, values = soft_levels(responses, self.levels)
        pairs = torch.stack((values, self.levels * histogram(weights)), -1)
        return pairs, self.levels**2 * co_occurrence(weights)

    def forward(self, regions: Float[Tensor, "m c s s"]) -> Float[Tensor, "m d"]:
        pairs, neighbours = self.statistics(regions)
        per_filter = F.gelu(self.pairs(pairs).mean(2) + self.neighbours(neighbours.flatten(2)))
        return self.pool(per_filter.flatten(1))


class TwoBranch(nn.Module):
    """The network: images (n, c, h, w) -> logits (n, k)."""

    boxes: Tensor

    def __init__(self, backbone: Backbone, texture: TextureBranch, scales: Sequence[float], side: int, classes: int):
        super().__init__()
        dim = backbone.feature_info[-1].channels
        self.backbone, self.texture, self.side = backbone, texture, side
        self.gate, self.norm = RegionGate(dim), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.register_buffer("boxes", grid_boxes(scales), persistent=False)

    def both(self, images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n r"]]:
        """Logits, and what the gate decides of every region. Only regions that are let through are computed."""
        maps = self.backbone.features(images)[-1]
        decided, tried = self.gate(box_means(maps, self.boxes))
        features = self.norm(maps.mean((2, 3)))
        which, box = (tried.detach() > 0.5).nonzero(as_tuple=True)
        if len(which):
            texture = self.texture(cut_out(images, which, self.boxes[box], self.side))
            features = features.index_add(0, which, (texture * tried[which, box, None]).to(features.dtype))
        return self.head(features), decided

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.both(images)[0]


class GaborClassifier(Classifier):
    """The two-branch classifier: losses with targets (cross-entropy, and the budget of regions), else `RegionClasses`.

    Args:
        backbone: a name or spec of the catalogue, or a Backbone.
        filters, kernel_size, bands: of the Gabor filters. levels: of the histogram.
        scales: of the boxes, in parts of the image's side. side: S, pixels that a region is zoomed to.
        budget: share of the regions to keep; budget_weight: of its term (kept - budget)^2.
    Raises BadInput: regions smaller than the filters, a budget outside (0, 1].
    """

    def __init__(
        self, backbone: str | Backbone = "metanet_n", num_classes: int = 1000, in_chans: int = 3, filters: int = 24,
        kernel_size: int = 11, bands: int = 4, levels: int = 8, scales: Sequence[float] = (1.0, 0.5), side: int = 32,
        budget: float = 0.5, budget_weight: float = 1.0, mean: tuple[float, ...] = (), std: tuple[float, ...] = (),
        label_smoothing: float = 0.0,
    ):  # fmt: skip
        if side < kernel_size + 1:
            raise BadInput(f"regions of side={side} pixels leave no room for filters of {kernel_size}; take more")
        if not 0 < budget <= 1:
            raise BadInput(f"budget={budget} is no share of the regions; take a number above 0 and up to 1")
        if isinstance(backbone, str):
            backbone = create(backbone, num_classes=0, in_chans=in_chans)
        dim = backbone.feature_info[-1].channels
        texture = TextureBranch(GaborFilters(filters, kernel_size, bands), filters, dim, levels)
        super().__init__(TwoBranch(backbone, texture, scales, side, num_classes), mean, std, label_smoothing)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.budget, self.budget_weight = budget, budget_weight

    def losses(self, predictions: Classes, targets: Tensor) -> Losses:
        losses = super().losses(predictions, targets)
        if isinstance(predictions, RegionClasses):
            losses["budget"] = self.budget_weight * (predictions.kept.float().mean() - self.budget) ** 2
        return losses

    def forward(self, images: Float[Tensor, "n c h w"], targets: Tensor | None = None) -> Classes | Losses:
        logits, kept = self.network.both(self.normalize(images))
        predictions = RegionClasses(logits, kept)
        return predictions if targets is None else self.losses(predictions, targets)
