"""What the recipes that mix two images of a batch share: soft targets."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def soft(targets: Int[Tensor, " n"] | Float[Tensor, "n k"], num_classes: int) -> Float[Tensor, "n k"]:
    """Class indices as one-hot rows; rows of probabilities stay as they are."""
    return F.one_hot(targets, num_classes).float() if targets.ndim == 1 else targets
