"""A surrogate of a wave solver: a U-shaped network that continues a wave field, with a choice of convolution.

The task network of Boukraichi et al. 2023, "A priori compression of convolutional neural networks for wave simulators"
(arXiv:2304.04964; the card `apriori_separable_conv`), at a size of our own: two snapshots and the medium go in, the
next snapshot comes out, and what comes out goes in again (auto-regression):

    u^{t+1} = u^t + U(u^{t-1}, u^t, c)

It is trained on one step with the squared error. All k x k convolutions are dense, or compressed before training.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.ops.conv.apriori_separable_conv import HE, compress_a_priori
from opsin.science.wave import Waves

HISTORY = 2  # the equation is of second order in time


class Level(nn.Module):
    """Two convolutions on the finer map around a coarser level: down by a stride, up by repetition, a skip beside."""

    def __init__(self, dim: int, side: int, below: nn.Module | None):
        super().__init__()
        self.enter = nn.Conv2d(dim, dim, side, padding=side // 2)
        self.below = below
        if below is not None:
            self.down = nn.Conv2d(dim, 2 * dim, side, 2, side // 2)
            self.up = nn.Conv2d(2 * dim, dim, side, padding=side // 2)
            self.leave = nn.Conv2d(2 * dim, dim, side, padding=side // 2)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        x = F.gelu(self.enter(x))
        if self.below is None:
            return x
        coarse = self.below(F.gelu(self.down(x)))
        fine = F.gelu(self.up(F.interpolate(coarse, x.shape[2:], mode="nearest")))
        return F.gelu(self.leave(torch.cat((x, fine), 1)))


class WaveSurrogate(nn.Module):
    """Continues a wave field by one snapshot.

    forward(history (n, 2, h, w), speed (n, h, w)) -> (n, 1, h, w), in the units of the history.
    Args:
        width: channels of the finest of `levels` levels; each coarser one has twice as many.
        kernel_size: of all convolutions but the last, odd.
        form: "dense", or a compressed format, "pairs", "shared" or "cp"; rank: of that format, None for as many weights
            as one outer product per pair.
    Raises BadInput (an even kernel, rank), UnknownName (form).
    """

    def __init__(
        self, width: int = 16, kernel_size: int = 5, levels: int = 3, form: str = "dense", rank: int | None = None
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise BadInput(f"kernel_size={kernel_size} is even, so that the field would shift; take an odd one")
        self.stem = nn.Conv2d(HISTORY + 1, width, kernel_size, padding=kernel_size // 2)
        body: nn.Module | None = None
        for level in reversed(range(levels)):
            body = Level(width * 2**level, kernel_size, body)
        self.body = body
        self.head = nn.Conv2d(width, 1, 1)
        self.apply(_he)
        if form != "dense":
            self.stem, self.body = (compress_a_priori(part, form, rank) for part in (self.stem, self.body))
        nn.init.zeros_(self.head.weight)

    def forward(self, history: Float[Tensor, "n 2 h w"], speed: Float[Tensor, "n h w"]) -> Float[Tensor, "n 1 h w"]:
        scale = history.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)
        x = torch.cat((history / scale, speed[:, None]), 1)
        return history[:, -1:] + scale * self.head(self.body(F.gelu(self.stem(x))))

    def rollout(
        self, history: Float[Tensor, "n 2 h w"], speed: Float[Tensor, "n h w"], steps: int
    ) -> Float[Tensor, "n t h w"]:
        """`steps` further snapshots, each from the network's own last two."""
        fields = list(history.split(1, 1))
        for _ in range(steps):
            fields.append(self(torch.cat(fields[-HISTORY:], 1), speed))
        return torch.cat(fields[HISTORY:], 1)


def _he(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=(HE / module.weight[0].numel()) ** 0.5)
        nn.init.zeros_(module.bias)


def fit(
    model: WaveSurrogate, data: Waves, *, steps: int, seed: int = 0, batch: int = 4, lr: float = 2e-3
) -> list[float]:
    """Trains on random successive snapshots with Adam and one cycle of the learning rate; returns the losses.

    The loss is the squared error of one step over the mean square of the true step, per sample.
    """
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.2)
    losses = []
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(data), (batch,), generator=order)
        first = torch.randint(data.fields.shape[1] - HISTORY, (batch,), generator=order)
        window = torch.stack([data.fields[r, t : t + HISTORY + 1] for r, t in zip(rows, first, strict=True)])
        history, target = window[:, :HISTORY], window[:, HISTORY:]
        optimiser.zero_grad(set_to_none=True)
        size = (target - history[:, -1:]).square().mean((1, 2, 3)).clamp_min(1e-12)
        loss = ((model(history, data.speed[rows]) - target).square().mean((1, 2, 3)) / size).mean()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def rollout_error(model: WaveSurrogate, data: Waves, steps: int = 10, first: int = 0) -> float:
    """Relative L2 error of a roll-out from snapshots `first` and `first` + 1, over all of it, averaged over samples."""
    model.eval()
    start = first + HISTORY
    truth = data.fields[:, start : start + steps]
    predicted = model.rollout(data.fields[:, first:start], data.speed, steps)
    return float(((predicted - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).mean())
