"""The plain vision transformer: an image is a sequence of patches.

Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", arXiv:2010.11929, in the sizes of DeiT (Touvron et al. 2020,
arXiv:2012.12877). A baseline:

    z = [class; E x_1; ...; E x_t] + position;   z = z + attention(LN z);   z = z + MLP(LN z)

With `rel_pos_bias` the position embedding gives way to a bias of the attention per offset, as in BEiT and SimMIM.
Names of parameters follow timm's `vision_transformer`, so its checkpoints load as they are.
"""

import re
from copy import deepcopy
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones import Backbone, FeatureInfo
from opsin.layers import Attention, DropPath, LayerScale, Mlp, PatchEmbed, drop_path_rates, init_weights_
from opsin.layers.relative_position import RelativePositionBias

VARIANTS = {
    "vit_tiny_patch16_224": dict(dim=192, depth=12, num_heads=3),
    "vit_small_patch16_224": dict(dim=384, depth=12, num_heads=6),
    "vit_base_patch16_224": dict(dim=768, depth=12, num_heads=12),
    "vit_large_patch16_224": dict(dim=1024, depth=24, num_heads=16),
}


class Block(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), each branch with layer scale if wanted.

    `rel_pos_bias` is the block's own bias where biases are per layer.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)
        self.rel_pos_bias: RelativePositionBias | None = None

    def forward(
        self, x: Float[Tensor, "n t c"], bias: Float[Tensor, "1 heads t t"] | None = None
    ) -> Float[Tensor, "n t c"]:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), bias)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(Backbone):
    """ViT for classification, or four maps of one stride from a quarter, a half, three quarters and all of its depth.

    Args:
        image_size: pixels, one number or (height, width). Other sizes work too: positions are interpolated.
        patch_size: pixels; global_pool: "token" reads the class token, "avg" the mean of the patches.
        layer_scale: start of the branches' gains, None for none; drop_path: the last block's rate.
        rel_pos_bias: None for position embeddings; "shared" for one bias table, "per_layer" for one in each block.
    """

    no_weight_decay = ("cls_token", "pos_embed")

    def __init__(
        self, dim: int = 384, depth: int = 12, num_heads: int = 6, mlp_ratio: float = 4.0, patch_size: int = 16,
        image_size: int | tuple[int, int] = 224, num_classes: int = 1000, in_chans: int = 3,
        global_pool: Literal["token", "avg"] = "token", layer_scale: float | None = None, drop_path: float = 0.0,
        rel_pos_bias: Literal["shared", "per_layer"] | None = None,
    ):  # fmt: skip
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = (-(-height // patch_size), -(-width // patch_size))
        self.num_classes, self.num_features, self.global_pool = num_classes, dim, global_pool
        self.taps = sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)})
        self.feature_info = [FeatureInfo(dim, patch_size) for _ in self.taps]
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        tokens = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = None if rel_pos_bias else nn.Parameter(torch.zeros(1, tokens, dim))
        rates = drop_path_rates(drop_path, (depth,))[0]
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, layer_scale, rate) for rate in rates)
        self.rel_pos_bias = RelativePositionBias(self.grid, num_heads) if rel_pos_bias else None
        self.norm = nn.LayerNorm(dim, eps=1e-6) if global_pool == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if global_pool == "avg" else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self._init()
        if rel_pos_bias == "per_layer":
            self.split_rel_pos_bias()

    def _init(self) -> None:
        init_weights_(self.blocks)
        init_weights_(self.head)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def split_rel_pos_bias(self) -> None:
        """Gives every block its own copy of the shared bias, to be fine-tuned apart (SimMIM, section 4.1)."""
        shared, self.rel_pos_bias = self.rel_pos_bias, None
        if shared is not None:
            for block in self.blocks:
                block.rel_pos_bias = deepcopy(shared)

    def embed(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n h2 w2 c"]:
        """The patches' tokens, before class token and positions: where a pre-trainer puts its mask tokens."""
        return self.patch_embed(x)

    def encode(self, tokens: Float[Tensor, "n h w c"]) -> list[Float[Tensor, "n c h w"]]:
        """The rest of the network on (possibly masked) tokens: the maps of `features`, the last after the last norm."""
        maps = self._run(tokens)
        maps[-1] = self.fc_norm(self.norm(maps[-1]))
        return [x[:, 1:].transpose(1, 2).unflatten(2, tokens.shape[1:3]) for x in maps]

    def _run(self, tokens: Float[Tensor, "n h w c"]) -> list[Float[Tensor, "n t c"]]:
        """Class token and patches after the blocks numbered in `taps`."""
        grid = (tokens.shape[1], tokens.shape[2])
        x = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens.flatten(1, 2)), 1)
        if self.pos_embed is not None:
            x = x + interpolate_positions(self.pos_embed, self.grid, grid)
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias(grid)
        outputs = []
        for number, block in enumerate(self.blocks, 1):
            x = block(x, shared if block.rel_pos_bias is None else block.rel_pos_bias(grid))
            if number in self.taps:
                outputs.append(x)
        return outputs

    def features(self, x: Float[Tensor, "n k h w"]) -> list[Float[Tensor, "n c h2 w2"]]:
        return self.encode(self.embed(x))

    def forward_features(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n t c"]:
        """Class token and patches after the last block, before the last norm."""
        return self._run(self.embed(x))[-1]

    def forward_head(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n k"]:
        pooled = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)
        return self.head(self.fc_norm(self.norm(pooled)))


def interpolate_positions(
    positions: Float[Tensor, "1 t c"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "1 t2 c"]:
    """Position embeddings of grid `old` (after the class token's) for grid `new`, bicubic with antialiasing."""
    if old == new:
        return positions
    plane = positions[:, 1:].float().transpose(1, 2).unflatten(2, old)
    plane = F.interpolate(plane, size=new, mode="bicubic", antialias=True)
    return torch.cat((positions[:, :1], plane.flatten(2).transpose(1, 2).to(positions.dtype)), 1)


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of BEiT-like checkpoints (SimMIM's) to ours; timm's pass unchanged.

    Their queries and values have biases and their keys none, which is ours with a zero bias of the keys.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith(("position_index", "mask_token"))}
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("attn.q_bias"):
            v_bias = state[name.replace("q_bias", "v_bias")]
            renamed[name.replace("q_bias", "qkv.bias")] = torch.cat((tensor, torch.zeros_like(tensor), v_bias))
        elif not name.endswith("attn.v_bias"):
            name = re.sub(r"gamma_([12])$", r"ls\1.gamma", name)
            renamed[name.replace("attn.relative_position", "rel_pos_bias.relative_position")] = tensor
    return renamed
