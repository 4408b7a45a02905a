"""PolyTwins: Twins whose every grid begins where the map says, so that circular shifts do not change the logits.

Ding et al. 2023, "Reviving Shift Equivariance in Vision Transformers", arXiv:2306.07470, section 3.3. The map is
anchored (`opsin.ops.attention.poly_anchor_vit`) before the first patches, before every attention in windows, and before
every reduction of keys; convolutions are circular. Patches of the later stages need no anchor of their own where the
last stride of the stage before is even, as the published ones are.

Names of parameters follow timm's `twins`, so the weights of a Twins-SVT load.
"""

from jaxtyping import Float
from torch import Tensor

from opsin.backbones import twins
from opsin.ops.attention.poly_anchor_vit import anchor, embedded

VARIANTS = {
    "polytwins_svt_small": twins.VARIANTS["twins_svt_small"],
    "polytwins_svt_base": twins.VARIANTS["twins_svt_base"],
}


class PolyTwins(twins.Twins):
    """Twins with exact invariance to circular shifts where every map's sides are multiples of its strides.

    With the published strides (windows of 7; reductions by 8, 4, 2) that is images of 224 pixels times any number.
    Other sizes run, and a side that a stride does not divide is cut on the fixed grid.

    This is for logits and pooled features. The maps of `features` stay in the anchored frame, as in the paper: how far
    they are moved against the image differs per image and per map, which a head for dense outputs does not undo.

    Args: as of Twins.
    """

    border = "circular"

    def anchored(self, number: int, stride: int) -> bool:
        """Whether the stage before this one has left its map anchored to a multiple of this stride."""
        strides = [block.stride for block in self.blocks[number - 1] if block.stride > 1] if number else []
        return bool(strides) and strides[-1] % stride == 0

    def stage(self, number: int, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n h2 w2 c2"]:
        """Patches, then blocks, each on the map anchored to its stride, with positions after the first."""
        embed = self.patch_embeds[number]
        x = embed(x) if self.anchored(number, embed.patch_size) else embedded(embed, x)
        for i, block in enumerate(self.blocks[number]):
            if block.stride > 1:
                x = anchor(x.permute(0, 3, 1, 2), block.stride).permute(0, 2, 3, 1)
            x = block(x)
            x = self.pos_block[number](x) if i == 0 else x
        return x
