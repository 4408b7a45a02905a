"""Plain shared layers: norms, MLPs, patch embeddings, drop-path, initialisers."""

from opsin.layers.drop import DropPath, drop_path_rates
from opsin.layers.init import init_weights_
from opsin.layers.mlp import Mlp
from opsin.layers.norm import LayerNorm2d

__all__ = ["DropPath", "LayerNorm2d", "Mlp", "drop_path_rates", "init_weights_"]
