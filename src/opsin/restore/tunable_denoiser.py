"""A denoiser with a slider: DnCNN's body with tunable convolutions.

The body is that of Zhang et al. 2017 ("Beyond a Gaussian Denoiser", arXiv:1608.03981): 3x3 convolutions with ReLU
between them predict the noise, which is taken off the image. It has no batch norm, whose statistics would mix samples
of different controls. Its convolutions are those of Maggioni et al. 2023 (arXiv:2304.00898; the card `tunable_conv`)
for two objectives, the clean image and the image as it is:

    f(x; w) = x - B(x; w),     w = (s, 1 - s)     s = 1 takes all noise off, s = 0 leaves it, between them a part

Trained with `opsin.restore.multi_loss`; colour images go through channel by channel.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput
from opsin.ops.conv.tunable_conv import Tunable, make_tunable, set_control
from opsin.restore import Restorer

VARIANTS = {
    "tunable_denoiser": dict(depth=8, width=32),
    "tunable_denoiser_dncnn": dict(depth=17, width=64),  # the size of DnCNN-S
}


class Dncnn(nn.Sequential):
    """`depth` 3x3 convolutions of `width` channels with ReLU; what they give is subtracted from the image.

    forward(image (n, 1, h, w), control): the control goes to the layers that are tunable, if any.
    """

    def __init__(self, depth: int = 17, width: int = 64):
        layers: list[nn.Module] = []
        for i in range(depth):
            conv = nn.Conv2d(1 if i == 0 else width, 1 if i == depth - 1 else width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
            layers += [conv, nn.ReLU()]
        with torch.no_grad():
            layers[-2].weight.mul_(0.1)  # little is subtracted at first
        super().__init__(*layers[:-1])

    def forward(self, image: Float[Tensor, "n 1 h w"], control: Tensor | None = None) -> Float[Tensor, "n 1 h w"]:
        x = image
        for layer in self:
            x = layer(x, control) if isinstance(layer, Tunable) else layer(x)
        return image - x


class TunableDenoiser(Restorer):
    """Grey (1 channel) or RGB (3) in [0, 1]; clamped to [0, 1] in eval mode only.

    Args:
        depth, width: of the body.
        strength: s where a call names none, from 0 (as it is) to 1 (all noise off).
        phi: from controls to coefficients, see `opsin.ops.conv.tunable_conv`.
    Raises BadInput: a strength outside [0, 1], or another number of channels.
    """

    task = "denoise"

    def __init__(self, depth: int = 8, width: int = 32, strength: float = 1.0, phi: str = "mlp"):
        super().__init__()
        if not 0 <= strength <= 1:
            raise BadInput(f"strength={strength} is outside of 0 (nothing) to 1 (all noise off)")
        self.receptive_field = depth
        self.body = make_tunable(Dncnn(depth, width), controls=2, phi=phi)
        set_control(self, [strength, 1 - strength])

    def forward(
        self, image: Float[Tensor, "n c h w"], *, strength: Tensor | float | None = None,
        control: Float[Tensor, "*n p"] | None = None,
    ) -> Float[Tensor, "n c h w"]:  # fmt: skip
        """strength: s of this call, one for all images or (n,); or control: the two numbers themselves, also (n, 2).

        Without either the layers keep the control that they have (`set_control`, or the constructor's strength).
        """
        n, channels = image.shape[:2]
        if channels not in self.channels:
            raise BadInput(f"the denoiser takes images of 1 or 3 channels, not {channels}")
        if strength is not None:
            s = torch.as_tensor(strength, dtype=image.dtype, device=image.device)
            control = torch.stack((s, 1 - s), -1)
        if control is not None and control.ndim == 2:
            control = control.repeat_interleave(channels, 0)
        out = self.body(image.reshape(n * channels, 1, *image.shape[2:]), control).reshape(image.shape)
        return out if self.training else out.clamp(0, 1)
