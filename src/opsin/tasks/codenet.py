"""CoDeNet: a detector small enough for an embedded FPGA, with hardware-friendly deformable convolutions in its decoder.

Dong et al. 2020, "CoDeNet: Efficient Deployment of Input-Adaptive Object Detection on Embedded FPGAs",
arXiv:2006.08357, after Huang et al. 2020, arXiv:2002.08357. A ShuffleNetV2 brings the image to stride 32 and 1024
channels; three layers, each a deformable convolution of the square form, batch norm, ReLU and nearest up-sampling,
bring it back to stride 4; heads of 1x1, depthwise 3x3 and 1x1 convolutions predict centres, sizes and offsets
(`opsin.tasks.centernet`). All of it is made for 4-bit weights and 8-bit activations: `quantised()` gives a copy to
fine-tune in them. Published weights load through `remap`.
"""

import re
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from opsin.backbones.shufflenetv2 import WIDTHS, ShuffleNetV2
from opsin.errors import UnknownName
from opsin.layers.fake_quant import fake_quantised
from opsin.ops.conv.codesign_deform_conv import CodesignDeformConv
from opsin.tasks.centernet import HEAT_BIAS, CentreDetector, Heads

DECODER = (256, 128, 64)
HEAD_DIM = 64
MEAN = (0.470, 0.447, 0.408)  # RGB; CenterNet's for COCO and VOC
STD = (0.278, 0.274, 0.289)
STEMS = ("stride4", "maxpool")

ONE = WIDTHS["x1_0"]
TWO = (24, 244, 488, 976, 2153)
VARIANTS = {
    "codenet1x_a": dict(dims=ONE, stem="stride4", num_classes=20),
    "codenet1x_b": dict(dims=ONE, stem="maxpool", num_classes=20),
    "codenet1x_c": dict(dims=ONE, stem="stride4", num_classes=20),
    "codenet2x_d": dict(dims=TWO, stem="stride4", num_classes=20),
    "codenet2x_e": dict(dims=TWO, stem="maxpool", num_classes=20),
    "codenet1x_coco_fp32": dict(dims=ONE, stem="maxpool", num_classes=80),
}


def decoder(dim: int, widths: tuple[int, ...], form: str) -> nn.Sequential:
    """Deformable convolution, norm, ReLU and doubling of the map, once per width."""
    layers: list[nn.Module] = []
    for width in widths:
        op = CodesignDeformConv(dim, form, out_dim=width)
        layers += [op, nn.BatchNorm2d(width), nn.ReLU(), nn.Upsample(scale_factor=2)]
        dim = width
    return nn.Sequential(*layers)


def separable_head(dim: int, outputs: int, bias: float | None = None) -> nn.Sequential:
    """1x1, depthwise 3x3, 1x1. With a `bias` the last one starts there; without, all start as for ReLU and at zero."""
    head = nn.Sequential(
        nn.Conv2d(dim, HEAD_DIM, 1, bias=False), nn.BatchNorm2d(HEAD_DIM), nn.ReLU(),
        nn.Conv2d(HEAD_DIM, HEAD_DIM, 3, padding=1, groups=HEAD_DIM, bias=False), nn.BatchNorm2d(HEAD_DIM), nn.ReLU(),
        nn.Conv2d(HEAD_DIM, outputs, 1),
    )  # fmt: skip
    nn.init.constant_(head[-1].bias, bias or 0.0)
    if bias is None:
        for layer in (head[0], head[3], head[6]):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return head


class CoDeNet(CentreDetector):
    """The detector; its map has stride 4.

    Args:
        dims: channels of the ShuffleNetV2: stem, three stages, last convolution.
        stem: "stride4" (one convolution of stride 4) or "maxpool" (stride 2 and max-pooling).
        form: of the decoder's deformable convolutions (see `codesign_deform_conv`).
        decoder_dims: channels of the decoder's layers, from coarse to fine.
        mean, std: of the images, per channel; those of COCO for three channels.
    Raises UnknownName: stem, form.
    """

    def __init__(
        self, dims: tuple[int, ...] = ONE, stem: Literal["stride4", "maxpool"] = "stride4", form: str = "square",
        decoder_dims: tuple[int, ...] = DECODER, num_classes: int = 20, in_chans: int = 3,
        mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
    ):  # fmt: skip
        colour = in_chans == 3
        super().__init__(
            (MEAN if colour else ()) if mean is None else mean, (STD if colour else ()) if std is None else std
        )
        if stem not in STEMS:
            raise UnknownName("stem", stem, STEMS)
        self.num_classes, self.in_chans, self.multiple = num_classes, in_chans, 32
        self.stride = self.multiple // 2 ** len(decoder_dims)
        self.backbone = ShuffleNetV2(dims, num_classes=0, in_chans=in_chans)
        if stem == "stride4":
            self.backbone.conv1[0] = nn.Conv2d(in_chans, dims[0], 3, 4, 1, bias=False)
            self.backbone.maxpool = nn.Identity()
        self.deconv_layers = decoder(dims[-1], decoder_dims, form)
        self.hm = separable_head(decoder_dims[-1], num_classes, HEAT_BIAS)
        self.wh = separable_head(decoder_dims[-1], 2)
        self.reg = separable_head(decoder_dims[-1], 2)

    def heads(self, images: Float[Tensor, "n c h w"]) -> Heads:
        x = self.deconv_layers(self.backbone.conv5(self.backbone.forward_features(images)))
        return Heads(self.hm(x), self.wh(x), self.reg(x))

    def quantised(self, weight_bits: int = 4, activation_bits: int = 8) -> nn.Module:
        """A copy in low precision, to be fine-tuned: 4-bit weights (the stem's 8), 8-bit inputs of all layers."""
        return fake_quantised(self, weight_bits, activation_bits)

    def model_megabytes(self, weight_bits: int = 32) -> float:
        """Size of all parameters at so many bits each, in MiB (the unit of the published sizes)."""
        return sum(p.numel() for p in self.parameters()) * weight_bits / 8 / 2**20


RENAMED = {
    r"^layer0\.": "backbone.conv1.", r"^layer4\.": "backbone.conv5.",
    r"^layer1\.": "backbone.stage2.", r"^layer2\.": "backbone.stage3.", r"^layer3\.": "backbone.stage4.",
    r"(stage\d\.\d+)\.b(\d)\.": r"\1.branch\2.", r"\.conv_scale\.": ".offsets.conv_scale.",
}  # fmt: skip


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the official repository to ours."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in RENAMED.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed
