"""DeepLab-v2: convolutions with holes keep the map fine, parallel rates see several scales, a CRF finds the edges.

Chen et al. 2016, "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
Connected CRFs", arXiv:1606.00915. Three ideas:

    atrous convolution   y[i] = sum_k x[i + r k] w[k]      the last stages dilate instead of striding: output stride 8
    ASPP                 score = sum_r head_r(x)           3x3 branches of rates r = 6, 12, 18, 24, summed (section 3.2)
    multi-scale          score = max_s up(score(s x))      over copies of the image at s = 1, 0.75, 0.5 (section 4.1.2)

and `predict_with_crf` sharpens the result by a fully connected CRF (section 3.3; `opsin.tasks.crf`). Published
weights in the naming of github.com/kazuto1011/deeplab-pytorch load through `remap`.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from opsin.backbones import Backbone
from opsin.catalog import create
from opsin.errors import BadInput
from opsin.layers.normalize import Normalize
from opsin.tasks import Losses, Masks
from opsin.tasks.crf import DenseCRF
from opsin.tasks.segment import Segmenter, pixel_cross_entropy, resize

MEAN = (122.675 / 255, 116.669 / 255, 104.008 / 255)  # RGB, what the published networks subtract
STD = (0.229, 0.224, 0.225)
RESNET101 = "resnet101(stride_in_1x1=True, output_stride=8, ceil_pool=True)"
VGG16 = "vgg16(hidden=0, output_stride=8, overlapping_pool=True)"
VARIANTS = {
    "deeplab_v2_resnet101": dict(backbone=RESNET101),
    "deeplab_v2_resnet101_msc": dict(backbone=RESNET101, scales=(1.0, 0.75, 0.5)),
    "deeplab_v2_vgg16_largefov": dict(backbone=VGG16, rates=(12,), hidden=1024),
    "deeplab_v2_vgg16_aspp_s": dict(backbone=VGG16, rates=(2, 4, 8, 12), hidden=1024),
    "deeplab_v2_vgg16_aspp_l": dict(backbone=VGG16, rates=(6, 12, 18, 24), hidden=1024),
}


class AtrousConv(nn.Conv2d):
    """A 3x3 convolution with holes that keeps the size: taps `rate` apart, effective size 2 rate + 1."""

    def __init__(self, dim_in: int, dim: int, rate: int):
        super().__init__(dim_in, dim, 3, padding=rate, dilation=rate)


class Branch(nn.Sequential):
    """One rate of the VGG networks: fc6 (3x3, dilated), fc7 and fc8 (1x1), with ReLU and dropout between."""

    def __init__(self, dim_in: int, hidden: int, num_classes: int, rate: int, drop: float = 0.5):
        wide = [AtrousConv(dim_in, hidden, rate), nn.ReLU(), nn.Dropout(drop)]
        again = [nn.Conv2d(hidden, hidden, 1), nn.ReLU(), nn.Dropout(drop)]
        super().__init__(*wide, *again, nn.Conv2d(hidden, num_classes, 1))


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling: the sum of branches that differ in their rate alone.

    hidden: 0 for branches that classify at once (the ResNet networks), or the width of `Branch`.
    """

    def __init__(self, dim_in: int, num_classes: int, rates: Sequence[int] = (6, 12, 18, 24), hidden: int = 0):
        super().__init__()
        for i, rate in enumerate(rates):
            deep = Branch(dim_in, hidden, num_classes, rate) if hidden else AtrousConv(dim_in, num_classes, rate)
            self.add_module(f"c{i}", deep)
        for layer in self.classifiers():
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def classifiers(self) -> Iterator[nn.Conv2d]:
        """The last layer of each branch: those that learn faster."""
        for branch in self.children():
            yield branch[-1] if isinstance(branch, Branch) else branch

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h w"]:
        return torch.stack([branch(x) for branch in self.children()]).sum(0)


class DeepLab(Segmenter):
    """DeepLab-v2 on any backbone. Images in [0, 1], any size.

    Args:
        backbone: a Backbone, or a name or spec of one. Those with an `output_stride` option should have 8.
        rates, hidden: of the pyramid (see AtrousPyramid). Scale the rates with the stride: 6 at stride 8 is 3 at 16.
        scales: copies of the image whose scores are fused by their maximum; the first is 1.
        level: which map of the backbone's pyramid is classified; the last by default.
        freeze_bn: batch norms keep their statistics and are not trained (as published, for pre-trained networks).
    Raises BadInput where the backbone gives no pyramid, or the first scale is not 1.
    """

    def __init__(
        self, backbone: Backbone | str = RESNET101, num_classes: int = 21, in_chans: int = 3,
        rates: Sequence[int] = (6, 12, 18, 24), hidden: int = 0, scales: Sequence[float] = (1.0,),
        level: int = -1, freeze_bn: bool = False, mean: Sequence[float] = (), std: Sequence[float] = (),
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.scales, self.level, self.freeze_bn = num_classes, tuple(scales), level, freeze_bn
        if not scales or scales[0] != 1:
            raise BadInput(f"scales={tuple(scales)}: the first must be 1, the image as it is")
        if isinstance(backbone, str):
            backbone = create(backbone, num_classes=0, in_chans=in_chans)
        if not isinstance(backbone, Backbone):
            raise BadInput(f"DeepLab needs a backbone with a pyramid; {type(backbone).__name__} has none")
        published = in_chans == 3 and not mean
        self.normalize = Normalize(MEAN if published else tuple(mean), STD if published else tuple(std))
        self.backbone = backbone
        self.aspp = AtrousPyramid(backbone.feature_info[level].channels, num_classes, rates, hidden)
        self.train()

    def train(self, mode: bool = True) -> "DeepLab":
        super().train(mode)
        if self.freeze_bn:
            freeze_batch_norms(self)
        return self

    def score(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h w"]:
        """The pyramid's scores of normalised images, at the backbone's stride."""
        return self.aspp(self.backbone.features(x)[self.level])

    def score_maps(self, images: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n k _h _w"]]:
        """The scores of each scale at its own resolution, and last, if there are several scales, their maximum."""
        x = self.normalize(images)
        maps = [self.score(x)]
        for scale in self.scales[1:]:
            maps.append(self.score(F.interpolate(x, scale_factor=scale, mode="bilinear")))
        if len(maps) > 1:
            maps.append(torch.stack([resize(scores, maps[0].shape[-2:]) for scores in maps]).amax(0))
        return maps

    def logits(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h w"]:
        return resize(self.score_maps(images)[-1], images.shape[-2:])

    def forward(self, images: Float[Tensor, "n c h w"], targets: Int[Tensor, "n h w"] | None = None) -> Masks | Losses:
        """Masks; or, given targets, a loss for each scale and one for the maximum, at the scores' own resolution."""
        if targets is None:
            return Masks(self.logits(images))
        names = [*(f"scale {scale:g}" for scale in self.scales), "max"] if len(self.scales) > 1 else ["loss"]
        maps = self.score_maps(images)
        return {n: pixel_cross_entropy(m, shrink_labels(targets, m.shape[-2:])) for n, m in zip(names, maps)}

    @torch.no_grad()
    def predict_with_crf(self, images: Float[Tensor, "n 3 h w"], crf: DenseCRF | None = None) -> Masks:
        """The test procedure: scores up-sampled to the image, softmax, then the CRF. The logits are log-marginals."""
        self.eval()
        crf = crf or DenseCRF()
        sharpened = [crf(scores, image) for scores, image in zip(self.logits(images), images)]
        return Masks(torch.stack(sharpened).clamp(min=1e-20).log())


def shrink_labels(labels: Int[Tensor, "n h w"], size: tuple[int, int] | torch.Size) -> Int[Tensor, "n h2 w2"]:
    """Nearest-neighbour down-sampling: no label is invented, and 255 stays 255."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def freeze_batch_norms(model: nn.Module) -> None:
    """Puts every batch norm into eval mode and takes its parameters out of training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.requires_grad_(False)


def parameter_groups(model: DeepLab, lr: float, weight_decay: float = 5e-4) -> list[dict]:
    """The published groups: the trunk at `lr`, classifiers' weights at 10, biases at 20 times it and undecayed."""
    weights = [layer.weight for layer in model.aspp.classifiers()]
    biases = [layer.bias for layer in model.aspp.classifiers()]
    classifier = {id(p) for p in (*weights, *biases)}
    trunk = [p for p in model.parameters() if p.requires_grad and id(p) not in classifier]
    return [
        {"params": trunk, "lr": lr, "weight_decay": weight_decay},
        {"params": weights, "lr": 10 * lr, "weight_decay": weight_decay},
        {"params": biases, "lr": 20 * lr, "weight_decay": 0.0},
    ]


def published_optimizer(
    model: DeepLab, steps: int = 20_000, lr: float = 2.5e-4, power: float = 0.9
) -> tuple[torch.optim.SGD, LambdaLR]:
    """SGD with momentum 0.9 and the poly schedule, lr (1 - step / steps)^power; VGG networks start at lr = 1e-3."""
    optimizer = torch.optim.SGD(parameter_groups(model, lr), momentum=0.9)
    return optimizer, LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps) ** power)


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The PyTorch port's names, for BGR images of 0 to 255, to ours; our own names pass."""
    state = {name.removeprefix("base."): value for name, value in state.items()}
    if "layer1.conv1.conv.weight" not in state:
        return state
    renamed = {_rename(name): value for name, value in state.items()}
    first = renamed["backbone.conv1.weight"].flip(1)
    mean, std = (first.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return renamed | {"backbone.conv1.weight": first * 255 * std, "normalize.mean": mean, "normalize.std": std}


PORT = {
    "reduce.conv": "conv1", "reduce.bn": "bn1", "conv3x3.conv": "conv2", "conv3x3.bn": "bn2",
    "increase.conv": "conv3", "increase.bn": "bn3", "shortcut.conv": "downsample.0", "shortcut.bn": "downsample.1",
}  # fmt: skip


def _rename(name: str) -> str:
    stage, part, *rest = name.split(".")
    if stage == "aspp":
        return name
    if stage == "layer1":  # the stem
        return f"backbone.{'conv1' if rest[0] == 'conv' else 'bn1'}.{rest[-1]}"
    place = f"backbone.layer{int(stage[-1]) - 1}.{int(part.removeprefix('block')) - 1}"
    return f"{place}.{PORT['.'.join(rest[:2])]}.{rest[-1]}"
