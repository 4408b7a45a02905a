"""EDM: a denoiser whose input, output and target have unit variance at every noise level.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364. With data of
standard deviation s and noise of standard deviation sigma, the U-Net F sits inside (eq. 7, table 1)

    D(x; sigma) = c_skip x + c_out F(c_in x; log(sigma) / 4),
    c_skip = s^2 / (sigma^2 + s^2),   c_out = sigma s / sqrt(sigma^2 + s^2),   c_in = 1 / sqrt(sigma^2 + s^2)

and learns  E (sigma^2 + s^2) / (sigma s)^2 |D(y + sigma n; sigma) - y|^2  with log sigma normal. D gives the score,
(D - x) / sigma^2, and so the ODE that samplers follow. Images are in [-1, 1]. Names follow EDM's checkpoints.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.generate import Denoiser
from opsin.generate.unet import UNet

VARIANTS = {
    "edm_imagenet64": dict(
        image_size=64, num_classes=1000, channels=192, channel_mult=(1, 2, 3, 4), attn_resolutions=(32, 16, 8)
    ),
    "edm_cifar10": dict(
        image_size=32, channels=64, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(16, 8), head_dim=32
    ),
    "edm_digits": dict(
        image_size=8, in_chans=1, num_classes=10, channels=24, channel_mult=(1, 2), num_blocks=2, attn_resolutions=(4,),
        head_dim=24, dropout=0.0, label_dropout=0.1, sigma_data=0.75,
    ),
}  # fmt: skip


class Preconditioning(NamedTuple):
    """The four functions of the noise level that surround the network (EDM, table 1)."""

    skip: Tensor
    out: Tensor
    scale_in: Tensor
    noise: Tensor


def precondition(sigma: Float[Tensor, "*n"], sigma_data: float) -> Preconditioning:
    """c_skip, c_out, c_in and c_noise at a noise level."""
    total = sigma.square() + sigma_data**2
    return Preconditioning(sigma_data**2 / total, sigma * sigma_data * total.rsqrt(), total.rsqrt(), sigma.log() / 4)


class EDM(nn.Module):
    """The preconditioned denoiser D(x; sigma, cond). Options beyond sigma_data are the U-Net's.

    `cond` is None, class numbers (n,), or one-hot rows (n, num_classes); rows of zeros mean no label.
    """

    def __init__(
        self, image_size: int = 32, in_chans: int = 3, num_classes: int = 0, channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4), num_blocks: int = 3, attn_resolutions: Sequence[int] = (32, 16, 8),
        head_dim: int = 64, dropout: float = 0.1, label_dropout: float = 0.0, sigma_data: float = 0.5,
    ):  # fmt: skip
        super().__init__()
        self.image_size, self.in_chans, self.num_classes = image_size, in_chans, num_classes
        self.sigma_data = sigma_data
        self.model = UNet(
            image_size, in_chans, num_classes, channels, channel_mult, num_blocks, attn_resolutions, head_dim, dropout,
            label_dropout,
        )  # fmt: skip

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.in_chans, self.image_size, self.image_size

    def skip_points(self) -> list[nn.Module]:
        """The U-Net's joins, innermost first."""
        return self.model.skip_points()

    def forward(
        self, x: Float[Tensor, "n c h w"], sigma: Float[Tensor, " n"], cond: Tensor | None = None
    ) -> Float[Tensor, "n c h w"]:
        """The expected clean image; computed in the precision of the weights, returned in that of x."""
        dtype = self.model.out_conv.weight.dtype
        sigma = torch.as_tensor(sigma, device=x.device).float().expand(len(x))
        c = precondition(sigma[:, None, None, None], self.sigma_data)
        out = self.model((c.scale_in * x).to(dtype), c.noise.flatten(), self._labels(cond))
        return (c.skip * x + c.out * out.float()).to(x.dtype)

    def _labels(self, cond: Tensor | None) -> Float[Tensor, "n k"] | None:
        if cond is None or cond.ndim == 2:
            return cond
        if not self.num_classes:
            raise BadInput("this denoiser was built without classes (num_classes=0) and takes no labels")
        if bool((cond < 0).any()) or bool((cond >= self.num_classes).any()):
            raise BadInput(f"labels must lie in 0 ... {self.num_classes - 1}")
        return F.one_hot(cond, self.num_classes).float()


class EDMLoss(nn.Module):
    """The training objective, and at the same time the model that a training loop sees (table 1, section 5).

    `loss(images, targets)` takes images in [0, 1] and labels (ignored where the denoiser has no classes) and returns
    `{"loss": ...}`; `loss(images)` returns them noised at the median level and denoised again, in [0, 1].
    """

    def __init__(self, denoiser: EDM, p_mean: float = -1.2, p_std: float = 1.2):
        super().__init__()
        self.denoiser, self.p_mean, self.p_std = denoiser, p_mean, p_std

    def weight(self, sigma: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """lambda(sigma) = 1 / c_out^2, which makes every level's loss 1 at the start."""
        return 1 / precondition(sigma, self.denoiser.sigma_data).out.square()

    def forward(self, images: Float[Tensor, "n c h w"], targets: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        clean = 2 * images - 1
        if targets is None:
            level = torch.full((len(clean),), self.p_mean, device=clean.device).exp()
            return (self.denoiser(noised(clean, level), level).clamp(-1, 1) + 1) / 2
        sigma = (self.p_mean + self.p_std * torch.randn(len(clean), device=clean.device)).exp()
        cond = targets if self.denoiser.num_classes else None
        error = (self.denoiser(noised(clean, sigma), sigma, cond) - clean).square()
        return {"loss": (self.weight(sigma)[:, None, None, None] * error).mean()}


def noised(
    clean: Float[Tensor, "n c h w"], sigma: Float[Tensor, " n"], generator: torch.Generator | None = None
) -> Float[Tensor, "n c h w"]:
    """clean + sigma * Gaussian noise."""
    noise = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
    return clean + sigma[:, None, None, None] * noise


def score(denoiser: Denoiser, x: Float[Tensor, "n c h w"], sigma: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """The gradient of log p(x; sigma) (eq. 3)."""
    return (denoiser(x, sigma) - x) / sigma[:, None, None, None].square()


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EDM's checkpoints keep their resampling filter as buffers (2x2 means, which `Down` and `Up` are); drop them."""
    return {name: tensor for name, tensor in state.items() if not name.endswith("resample_filter")}
