"""Class scores of whatever kind of model."""

from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput


def scores(model: nn.Module, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """Logits of a backbone, of a task model (which returns typed predictions), or of any module that gives (n, k)."""
    out = model(images)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise BadInput(f"{type(model).__name__} gives no class scores; a classifier is needed")
    return logits
