"""SimMIM: hide large patches of the image, and regress the hidden pixels with one linear layer.

Xie et al. 2022, "SimMIM: A Simple Framework for Masked Image Modeling", arXiv:2111.09886. The encoder sees all tokens;
those of hidden cells are replaced by one learned vector before positions and class token are added:

    t_i <- (1 - m_i) t_i + m_i t_mask,   x' = PixelShuffle(W z),   L = mean of |x' - x| over hidden pixels  (section 3)

Pixels are compared after the images' own normalisation.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from opsin.backbones import Backbone
from opsin.catalog import create
from opsin.errors import BadInput
from opsin.pretrain import Pretrainer
from opsin.pretrain.masking import cell_mask, spread

VIT = "rel_pos_bias=shared, layer_scale=0.1, drop_path=0.1, num_classes=0, global_pool=avg"
VARIANTS = {
    "simmim_vit_base_p16": dict(backbone=f"vit_base_patch16_224({VIT})"),
    "simmim_swin_base_w6_192": dict(backbone="swin_base_patch4_window7_224(window_size=6, num_classes=0)"),
    "simmim_swin_large_w12_192": dict(backbone="swin_large_patch4_window7_224(window_size=12, num_classes=0)"),
}


class SimMIM(Pretrainer):
    """Masked image modelling of a backbone that splits into `embed` (image -> tokens) and `encode` (tokens -> maps).

    Args:
        backbone: a module, or a name or spec that `create` takes.
        mask_patch: side of the hidden cells in pixels (32 at 192 or 224 pixels); a multiple of the token's side.
        ratio: share of the cells that is hidden.
    """

    no_weight_decay = ("mask_token",)

    def __init__(self, backbone: Backbone | str, mask_patch: int = 32, ratio: float = 0.6, in_chans: int = 3):
        super().__init__()
        if isinstance(backbone, str):
            backbone = create(backbone, in_chans=in_chans, num_classes=0)
        self.backbone = backbone
        if not hasattr(self.backbone, "embed") or not hasattr(self.backbone, "encode"):
            raise BadInput(f"SimMIM needs a backbone of tokens (vit, swin), not {type(self.backbone).__name__}")
        if not 0 < ratio < 1:
            raise BadInput(f"the mask ratio must lie between 0 and 1, not {ratio}")
        self.mask_patch, self.ratio = mask_patch, ratio
        dim, (channels, stride) = self.backbone.feature_info[0].channels, self.backbone.feature_info[-1]
        self.mask_token = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Sequential(nn.Conv2d(channels, stride**2 * in_chans, 1), nn.PixelShuffle(stride))

    def reconstruct(
        self, images: Float[Tensor, "n c h w"], mask: Bool[Tensor, "n rows columns"]
    ) -> Float[Tensor, "n c h w"]:
        """The image that the network imagines behind a mask of cells."""
        tokens = self.backbone.embed(images)
        hidden = spread(mask, *tokens.shape[1:3])[..., None]
        tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        return self.decoder(self.backbone.encode(tokens)[-1])

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Tensor]:
        """images: normalised, sides multiples of `mask_patch` and of the backbone's stride."""
        n, channels, height, width = images.shape
        mask = cell_mask(n, height, width, self.mask_patch, self.ratio, images.device)
        error = (self.reconstruct(images, mask) - images).abs()
        hidden = spread(mask, height, width)[:, None]
        return {"loss": (error * hidden).sum() / (hidden.sum() + 1e-5) / channels}
