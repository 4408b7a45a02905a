"""PolyViT: a vision transformer whose patches begin where the image says, so that circular shifts change no logits.

Ding et al. 2023, "Reviving Shift Equivariance in Vision Transformers", arXiv:2306.07470, section 3.3. Attention over
tokens does not care for their order; what does is the grid of patches and the embedding of absolute positions. So the
image is anchored to the patch size (`opsin.ops.attention.poly_anchor_vit`), and the positions come from a depthwise 3x3
convolution with circular padding, once, before the class token joins:

    z = LN(E P_p(x));   z = [class; z + depthwise(z)]

Names of parameters follow the official repository, which has timm's; a plain ViT's blocks load as they are.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from opsin.backbones.vit import VisionTransformer
from opsin.layers import PatchEmbed, init_weights_
from opsin.ops.attention.poly_anchor_vit import embedded

VARIANTS = {
    "polyvit_small_patch16": dict(dim=384, depth=12, num_heads=6),
    "polyvit_base_patch16": dict(dim=768, depth=12, num_heads=12),
}


class CircularPosition(nn.Module):
    """Positions relative to the neighbours, on a plane without border: (N, H, W, C) -> the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, padding_mode="circular", groups=dim)

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h w c"]:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PolyViT(VisionTransformer):
    """ViT with exact invariance to circular shifts where the patch size divides the image; other sizes run too.

    This is for logits and pooled features. The maps of `features` stay in the anchored frame, as in the paper: they are
    moved by less than a patch, differently for each image, which a head for dense outputs does not undo.

    Args: as of VisionTransformer; positions do not depend on the image's size.
    """

    def __init__(
        self, dim: int = 384, depth: int = 12, num_heads: int = 6, mlp_ratio: float = 4.0, patch_size: int = 16,
        image_size: int | tuple[int, int] = 224, num_classes: int = 1000, in_chans: int = 3,
        global_pool: Literal["token", "avg"] = "token", layer_scale: float | None = None, drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__(
            dim, depth, num_heads, mlp_ratio, patch_size, image_size, num_classes, in_chans, global_pool, layer_scale,
            drop_path,
        )  # fmt: skip
        self.pos_embed = None
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, norm=nn.LayerNorm)
        self.pos_conv = CircularPosition(dim)
        init_weights_(self.pos_conv)

    def embed(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n h2 w2 c"]:
        return self.pos_conv(embedded(self.patch_embed, x))
