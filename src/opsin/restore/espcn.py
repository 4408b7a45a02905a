"""ESPCN: super-resolution that never leaves low resolution until its last step.

Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network (Shi et al.
2016, arXiv:1609.05158). Earlier networks enlarged the image first and repaired it at r^2 times the cost. Here three
convolutions see the small luminance image y, and only the last one's C r^2 channels are rearranged into the large one:

    f1 = tanh(W1 * y + b1)      5x5, 64
    f2 = tanh(W2 * f1 + b2)     3x3, 32
    Y  = PS(W3 * f2 + b3)       3x3, r^2, linear                                   (equations 1 to 3)
    PS(T)[x, y, c] = T[x div r, y div r, C r (y mod r) + C (x mod r) + c]          (equation 4)

The mean squared error is the same before and after the rearrangement, so training compares the r^2 channels with the
target taken apart by PS's inverse, and never shuffles.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.subpixel import SubPixelConv2d
from opsin.measure.image_quality import luminance, rgb_to_ycbcr, ycbcr_to_rgb
from opsin.restore import Restorer

VARIANTS = {"espcn_x2": dict(scale=2), "espcn_x3": dict(scale=3), "espcn_x4": dict(scale=4)}


class ESPCN(Restorer):
    """The network on luminance. Colour images get their Cb and Cr by bicubic interpolation, as in the paper.

    Luminance is BT.601's, 16/255 to 235/255. A one-channel image goes through the network as it is.
    scale: 2, 3, 4, ...
    icnr: start the last layer without checkerboard.
    """

    task = "sr"
    receptive_field = 4  # 2 + 1 + 1 pixels to each side; bicubic chroma needs 2

    def __init__(self, scale: int = 3, *, icnr: bool = False):
        super().__init__()
        if scale < 1:
            raise BadInput(f"ESPCN's scale is a whole number from 1 on, not {scale}")
        self.scale = scale
        self.conv1 = nn.Conv2d(1, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 32, 3, padding=1)
        self.conv3 = SubPixelConv2d(32, 1, 3, scale, icnr=icnr)

    def features(self, y: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 32 h w"]:
        """Equations 1 and 2: the two hidden layers."""
        return torch.tanh(self.conv2(torch.tanh(self.conv1(y))))

    def forward(self, image: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c hr wr"]:
        """Grey (1 channel) or RGB (3) in [0, 1]; clamped to [0, 1] in eval mode only. Raises BadInput otherwise."""
        channels = image.shape[1]
        if channels not in self.channels:
            raise BadInput(f"ESPCN takes images of 1 or 3 channels, not {channels}")
        large = self.conv3(self.features(luminance(image)))
        if channels == 3:
            chroma = self.enlarged(rgb_to_ycbcr(image)[:, 1:])
            large = ycbcr_to_rgb(torch.cat((large, chroma), 1))
        return large if self.training else large.clamp(0, 1)

    def enlarged(self, chroma: Float[Tensor, "n 2 h w"]) -> Float[Tensor, "n 2 hr wr"]:
        """Bicubic; positions in float64, so that a pixel's weights do not depend on where in a tile it lies."""
        size = [side * self.scale for side in chroma.shape[-2:]]
        large = F.interpolate(chroma.double(), size, mode="bicubic", antialias=True, align_corners=False)
        return large.to(chroma.dtype)

    def loss(self, image: Float[Tensor, "n c h w"], clean: Float[Tensor, "n c hr wr"]) -> Float[Tensor, ""]:
        """Mean squared error on luminance (equation 5), at low resolution."""
        predicted = self.conv3.low_resolution(self.features(luminance(image)))
        return F.mse_loss(predicted, F.pixel_unshuffle(luminance(clean), self.scale))
