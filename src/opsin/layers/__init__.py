"""Plain shared layers: norms, MLPs, patch embeddings, drop-path, initialisers."""

from opsin.layers.attention import Attention
from opsin.layers.drop import DropPath, drop_path_rates
from opsin.layers.init import init_weights_
from opsin.layers.mlp import Mlp
from opsin.layers.norm import LayerNorm2d
from opsin.layers.patch import PatchEmbed
from opsin.layers.scale import LayerScale

__all__ = [
    "Attention", "DropPath", "LayerNorm2d", "LayerScale", "Mlp", "PatchEmbed", "drop_path_rates", "init_weights_",
]  # fmt: skip
