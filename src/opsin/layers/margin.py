"""Face recognition's two ends: an embedding from a feature map, and a classifier on the sphere for training it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class EmbeddingHead(nn.Module):
    """BN, global average, linear layer, BN: (N, C, H, W) -> (N, dim)."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, dim)
        self.norm2 = nn.BatchNorm1d(dim)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        return self.norm2(self.fc(self.norm1(x).mean((2, 3))))


class AMSoftmax(nn.Module):
    """Additive margin softmax (Wang et al. 2018, arXiv:1801.05599): logits s (cos(theta_j) - m [j = label]).

    Cross-entropy of these logits asks the right class for a cosine that is `margin` above the others. Without labels
    there is no margin, so that the argmax is the prediction.
    """

    def __init__(self, dim: int, num_classes: int, margin: float = 0.35, scale: float = 32.0):
        super().__init__()
        self.margin, self.scale = margin, scale
        self.weight = nn.Parameter(F.normalize(torch.empty(num_classes, dim).uniform_(-1, 1)))

    def forward(self, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n k"]:
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))
        if labels is not None:
            cosine = cosine - self.margin * F.one_hot(labels, len(self.weight))
        return self.scale * cosine
