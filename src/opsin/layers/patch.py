"""Images to tokens."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = 8  # pixels: patches up to this size are cut faster on a CPU out of pixels than out of planes


class PatchEmbed(nn.Module):
    """(N, in_chans, H, W) -> (N, ceil(H/p), ceil(W/p), dim): one linear map per patch, then the norm if there is one.

    Sides that are no multiple of the patch are padded with zeros at the right and the bottom.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm: type[nn.Module] = nn.Identity):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = norm(dim)

    def forward(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n h2 w2 c"]:
        below, right = (-side % self.patch_size for side in x.shape[2:])
        x = F.pad(x, (0, right, 0, below)) if below or right else x  # padding by nothing would copy
        if self.patch_size <= SMALL and x.is_cpu:  # and then the tokens need no turning round
            x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))
