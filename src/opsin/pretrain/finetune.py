"""Fine-tuning a pre-trained backbone: deeper layers learn faster."""

import re
from typing import Any

from torch import nn

from opsin.backbones import Backbone


def layer_of(name: str, depths: tuple[int, ...]) -> int:
    """The depth of a parameter by its name: 0 for the embedding, then one per block, the head last.

    depths: blocks per stage; one stage for a plain transformer.
    """
    stage = re.match(r"(?:layers|stages)\.(\d+)\.(?:blocks\.(\d+)|)", name)
    block = re.match(r"blocks\.(\d+)\.", name)
    if stage:
        before = sum(depths[: int(stage[1])])
        return before + (int(stage[2]) + 1 if stage[2] else 1)
    if block:
        return int(block[1]) + 1
    embeds = ("patch_embed", "cls_token", "pos_embed", "rel_pos_bias", "stem", "mask_token")
    return 0 if name.startswith(embeds) else sum(depths) + 1


def layer_decay_groups(backbone: Backbone, lr: float, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """Parameter groups with the rate lr * decay^(last - layer) (SimMIM, section 4.1; 0.65 for ViT-B).

    Vectors and tables of relative positions get no weight decay.
    """
    stages = getattr(backbone, "layers", getattr(backbone, "stages", None))
    blocks = [stage.blocks if isinstance(stage.blocks, nn.Module) else stage for stage in stages] if stages else None
    depths = tuple(len(b) for b in blocks) if blocks else (len(backbone.blocks),)  # type: ignore[arg-type]
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depths)
        plain = parameter.ndim > 1 and "relative_position" not in name and name not in ("pos_embed", "cls_token")
        group = groups.setdefault(
            (layer, plain),
            {
                "params": [],
                "lr": lr * decay ** (sum(depths) + 1 - layer),
                "weight_decay": weight_decay if plain else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
