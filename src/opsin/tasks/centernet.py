"""CenterNet: an object is a point, the centre of its box, found as a peak of a heat map.

Zhou et al. 2019, "Objects as Points", arXiv:1904.07850. On a map of stride R a network predicts, per position, a
heat Y_k for each class, the box's size and the centre's offset from the position. Targets are Gaussians around the
centres; with alpha = 2, beta = 4 and N objects (equation 1, and section 3 for the other two)

    L_heat = -1/N sum  (1 - Y)^alpha log Y  where the target is 1,  (1 - T)^beta Y^alpha log(1 - Y)  elsewhere
    L = L_heat + 0.1 |size - size*| + |offset - offset*|        the last two at the objects' positions only

Peaks are positions that no neighbour exceeds (3x3 max-pooling): there is no other suppression of doubles.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones import Backbone
from opsin.data import Boxes
from opsin.errors import BadInput
from opsin.layers.normalize import Normalize
from opsin.tasks import Detections, Losses, TaskModel
from opsin.tasks.segment import freeze_unreached, resize

HEAT_BIAS = -2.19  # of the last layer: a heat of 0.1 everywhere at first
SIZE_WEIGHT = 0.1
OVERLAP = 0.7
TOP = 100  # detections per image


class Heads(NamedTuple):
    """What the network predicts on its map; size and offset are (x, y), in positions."""

    heat: Float[Tensor, "n k h w"]  # logits
    size: Float[Tensor, "n 2 h w"]
    offset: Float[Tensor, "n 2 h w"]


@dataclass
class CentreTargets:
    """The same for the true boxes: the heat map, and size and offset of each of b objects."""

    heat: Float[Tensor, "n k h w"]
    image: Int[Tensor, " b"]
    position: Int[Tensor, " b"]  # row * w + column
    size: Float[Tensor, "b 2"]
    offset: Float[Tensor, "b 2"]


def gaussian_radius(size: Float[Tensor, "b 2"], overlap: float = OVERLAP) -> Float[Tensor, " b"]:
    """How far the corners of a box of `size` positions may move: the smallest of CornerNet's three cases.

    As all published CenterNets were trained: the larger root of each quadratic, divided by 2 and not by 2a, which is
    wider than the radius that keeps the overlap.
    """
    total, area = size.sum(1), size.prod(1)
    cases = (
        (1.0, total, area * (1 - overlap) / (1 + overlap)),
        (4.0, 2 * total, (1 - overlap) * area),
        (4 * overlap, -2 * overlap * total, (overlap - 1) * area),
    )
    return torch.stack([(b + (b.square() - 4 * a * c).clamp(min=0).sqrt()) / 2 for a, b, c in cases]).amin(0)


def draw_targets(targets: list[Boxes], size: tuple[int, int], stride: int, num_classes: int) -> CentreTargets:
    """Targets for a map of `size` positions; boxes are in pixels. Overlapping Gaussians of a class take the larger."""
    height, width = size
    boxes = torch.cat([t.boxes for t in targets]).float() / stride
    labels = torch.cat([t.labels for t in targets]).long()
    counts = torch.tensor([len(t.labels) for t in targets], device=boxes.device)
    image = torch.arange(len(targets), device=boxes.device).repeat_interleave(counts)
    last = boxes.new_tensor((width - 1, height - 1))
    centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    whole = torch.minimum(centre.floor().clamp(min=0), last).long()
    radius = gaussian_radius(extent.ceil()).floor().clamp(min=0)
    heat = boxes.new_zeros(len(targets) * num_classes, height * width)
    _draw(heat, image * num_classes + labels, whole, radius, width)
    heat = heat.view(len(targets), num_classes, height, width)
    return CentreTargets(heat, image, whole[:, 1] * width + whole[:, 0], extent, centre - whole)


def _draw(
    heat: Float[Tensor, "m p"], plane: Int[Tensor, " b"], centre: Int[Tensor, "b 2"], radius: Float[Tensor, " b"],
    width: int,
) -> None:  # fmt: skip
    """A Gaussian of deviation (2 radius + 1) / 6 around each centre, cut off at the radius; maxima, in place."""
    if len(plane) == 0:
        return
    reach = int(radius.max())
    step = torch.arange(-reach, reach + 1, device=heat.device)
    at = centre[:, :, None] + step  # b 2 s
    ends = torch.tensor((width, heat.shape[1] // width), device=heat.device)
    inside = (at >= 0) & (at < ends[:, None]) & (step.abs() <= radius[:, None, None])
    spread = ((2 * radius + 1) / 6)[:, None, None]
    values = torch.exp(-step.square() / (2 * spread.square())) * inside  # b 2 s
    windows = values[:, 1, :, None] * values[:, 0, None, :]
    at = at.clamp(min=0).minimum(ends[:, None] - 1)
    places = plane[:, None, None] * heat.shape[1] + at[:, 1, :, None] * width + at[:, 0, None, :]
    heat.view(-1).scatter_reduce_(0, places.flatten(), windows.flatten(), "amax")


def focal_loss(logits: Float[Tensor, "n k h w"], heat: Float[Tensor, "n k h w"]) -> Float[Tensor, ""]:
    """The penalty-reduced focal loss (equation 1), over the number of objects."""
    logits = logits.float()
    log_heat, log_cold, found = F.logsigmoid(logits), F.logsigmoid(-logits), logits.sigmoid()
    positive = heat == 1
    at_centre = (1 - found).square() * log_heat
    elsewhere = (1 - heat).pow(4) * found.square() * log_cold
    return -torch.where(positive, at_centre, elsewhere).sum() / positive.sum().clamp(min=1)


def centre_losses(heads: Heads, targets: CentreTargets) -> Losses:
    """The three losses, weighted; the two regressions are means over coordinates of objects."""
    at = (targets.image, slice(None), targets.position)
    count = max(len(targets.image), 1) * 2
    size = (heads.size.flatten(2)[at].float() - targets.size).abs().sum() / count
    offset = (heads.offset.flatten(2)[at].float() - targets.offset).abs().sum() / count
    return {"heat": focal_loss(heads.heat, targets.heat), "size": SIZE_WEIGHT * size, "offset": offset}


def peaks(heat: Float[Tensor, "n k h w"]) -> Bool[Tensor, "n k h w"]:
    """Positions that no neighbour exceeds."""
    return F.max_pool2d(heat, 3, 1, 1) == heat


class TopDetections(Detections):
    """As many detections for every image, in one tensor; lists are made when they are asked for."""

    def __init__(self, table: Float[Tensor, "n top 6"]):
        self.rows = table

    @property
    def table(self) -> Float[Tensor, "n top 6"]:
        return self.rows

    @property
    def boxes(self) -> list[Boxes]:  # type: ignore[override]
        return [Boxes(rows[:, :4], rows[:, 5].long()) for rows in self.rows]

    @property
    def scores(self) -> list[Float[Tensor, " top"]]:  # type: ignore[override]
        return list(self.rows[:, :, 4])


def decode(heads: Heads, stride: int, image_size: tuple[int, int], top: int = TOP) -> TopDetections:
    """The `top` highest peaks of each image as boxes in pixels, inside the image, best first."""
    classes, height, width = heads.heat.shape[1:]
    heat = heads.heat.float().sigmoid()
    scores, place = (heat * peaks(heat)).flatten(1).topk(min(top, classes * height * width))
    position = place % (height * width)
    index = position[:, None].expand(-1, 2, -1)
    offset, size = (part.float().flatten(2).gather(2, index) for part in (heads.offset, heads.size))
    centre = torch.stack((position % width, position // width), 1) + offset
    corners = torch.cat((centre - size / 2, centre + size / 2), 1).transpose(1, 2) * stride
    limits = corners.new_tensor((image_size[1], image_size[0]) * 2)
    corners = corners.clamp(min=0).minimum(limits)
    labels = place // (height * width)
    return TopDetections(torch.cat((corners, scores[:, :, None], labels[:, :, None].to(scores.dtype)), 2))


class CentreDetector(TaskModel):
    """What detectors of this kind share: normalised images in, three losses or `Detections` out.

    A member sets `num_classes` and `stride`, and implements `heads(images)` for normalised images whose sides are
    multiples of `multiple`. Images of other sizes are padded with their mean, right and below.
    """

    num_classes: int
    stride: int
    multiple: int

    def __init__(self, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()):
        super().__init__()
        self.normalize = Normalize(mean, std)

    def heads(self, images: Float[Tensor, "n c h w"]) -> Heads:
        """The three maps."""
        raise TypeError(f"{type(self).__name__} does not implement heads()")

    def forward(self, images: Float[Tensor, "n c h w"], targets: list[Boxes] | None = None) -> Detections | Losses:
        height, width = images.shape[-2:]
        padded = F.pad(self.normalize(images), (0, -width % self.multiple, 0, -height % self.multiple))
        heads = self.heads(padded)
        if targets is None:
            return decode(heads, self.stride, (height, width))
        if any(len(t.labels) and int(t.labels.max()) >= self.num_classes for t in targets):
            raise BadInput(f"a box has a class beyond the detector's {self.num_classes}; create it with num_classes=")
        targets = [Boxes(t.boxes.to(images.device), t.labels.to(images.device)) for t in targets]
        return centre_losses(heads, draw_targets(targets, heads.heat.shape[-2:], self.stride, self.num_classes))


class PyramidDetector(CentreDetector):
    """Centre heads on any backbone: its levels, each by a 1x1 convolution, summed at the finest one's size.

    Args: width: channels of the summed map. mean, std: of the images, per channel.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, width: int = 64, mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
    ):  # fmt: skip
        super().__init__(mean, std)
        self.backbone, self.num_classes = backbone, num_classes
        self.stride = min(info.stride for info in backbone.feature_info)
        self.multiple = max(info.stride for info in backbone.feature_info)
        self.lateral = nn.ModuleList(nn.Conv2d(info.channels, width, 1, bias=False) for info in backbone.feature_info)
        self.norm = nn.BatchNorm2d(width)
        self.heat, self.size, self.offset = (plain_head(width, outputs) for outputs in (num_classes, 2, 2))
        nn.init.constant_(self.heat[-1].bias, HEAT_BIAS)
        freeze_unreached(backbone, channels=len(mean) or 3)

    def heads(self, images: Float[Tensor, "n c h w"]) -> Heads:
        levels = [lateral(level) for lateral, level in zip(self.lateral, self.backbone.features(images))]
        finest = max((level.shape[-2:] for level in levels), key=lambda size: size[0])
        x = F.relu(self.norm(torch.stack([resize(level, finest) for level in levels]).sum(0)))
        return Heads(self.heat(x), self.size(x), self.offset(x))


def plain_head(width: int, outputs: int) -> nn.Sequential:
    """CenterNet's head: a 3x3 convolution, and a 1x1."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, outputs, 1))
