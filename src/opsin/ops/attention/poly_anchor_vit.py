"""Adaptive polyphase anchoring: let the image choose where the grid of patches or windows begins.

Ding et al. 2023, "Reviving Shift Equivariance in Vision Transformers", arXiv:2306.07470. A stride or a window of s x s
cuts the map on a fixed grid, so that an image moved by one pixel is cut elsewhere. Anchoring moves the map circularly
such that the strongest of its s^2 polyphase components comes first (section 3.2, algorithm 1):

    P_s(x) = roll(x, -(p_y, p_x)),   (p_y, p_x) = argmax over phases of || x[p_y::s, p_x::s] ||_2

Then P_s(roll(x, t)) = roll(P_s(x), s m) for some integers m: whatever commutes with shifts by multiples of s, as a
convolution of stride s, attention in s x s windows, or s x s keys that become one, commutes with all shifts, and what
is pooled at the end ignores them. Nothing is learned, and no gradient passes through the argmax.

The paper leaves features in the anchored frame, and so do the networks in `opsin.backbones.polyvit` and `polytwins`.
The operator here is for blocks with a shortcut, and moves its result back: op(roll(x, t)) = roll(op(x), t) for all t.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from opsin.layers.kept import constant, may_keep
from opsin.layers.patch import PatchEmbed
from opsin.layers.readers import quiet
from opsin.layers.tokens import taken
from opsin.layers.windows import pad_to_windows
from opsin.ops import native
from opsin.ops.attention.window_attention import WindowAttention

SOURCE = str(Path(__file__).with_name("poly_anchor.cpp"))
LOOPS = {"strongest_phases": "pp" + 8 * "l", "anchored": "pp" + 8 * "l", "embedded": "pppp" + 9 * "l"}


def counted(size: Sequence[int], stride: tuple[int, int]) -> tuple[int, int]:
    """How many phases there are along both sides: one along a side that the stride does not divide."""
    return 1 if size[0] % stride[0] else stride[0], 1 if size[1] % stride[1] else stride[1]


@torch.no_grad()
def strongest(x: Float[Tensor, "n c h w"], phases: tuple[int, int]) -> Int[Tensor, " n"]:
    """The number of the strongest polyphase component of every map, row by row.

    Tokens' norms are taken in float32 at least and added in float64 (float32 on MPS, which has none): a shift changes
    the order of the sum, which must not change the answer. Components that tie (a constant image) have none: then it is
    the first.
    """
    tokens = as_tokens(x)
    if (run := loop("strongest_phases", x, tokens)) is not None:
        best = torch.empty(len(x), dtype=torch.int64)
        run(x.data_ptr(), best.data_ptr(), *x.shape, *phases, tokens, torch.get_num_threads())
        return best
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    single, (height, width), (rows, columns) = torch.promote_types(x.dtype, torch.float32), x.shape[2:], phases
    if x.stride(1) == 1:  # channels last: without a copy of the map
        energy = torch.linalg.vector_norm(x, dim=1, dtype=single).square()
    elif x.shape[1] <= 4:  # an image: plane by plane
        energy = reduce(torch.add, (plane.to(single).square() for plane in x.unbind(1)))
    else:
        energy = x.to(single).square().sum(1)
    energy = energy.view(-1, height // rows, rows, width).sum(1, dtype=exact)
    return energy.view(-1, rows, width // columns, columns).sum(2).flatten(1).argmax(1)


def loop(name: str, x: Float[Tensor, "n c h w"], tokens: bool) -> Callable[..., None] | None:
    """A function of poly_anchor.cpp, where it can run on these maps."""
    return native.loop(SOURCE, name, LOOPS[name]) if native.takes(x) and (tokens or x.is_contiguous()) else None


def as_tokens(x: Float[Tensor, "n c h w"]) -> bool:
    """Whether the memory is that of (n, h, w, c), without gaps."""
    return x.is_contiguous(memory_format=torch.channels_last)


@constant
def turned(size: tuple[int, int], phases: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where what comes to every row (phases, h) and column (phases, w) is when a plane is moved up and left by a phase.

    Places count along the flattened plane, so that the two are added.
    """
    down, right = shifts(phases, device)
    rows, columns = (torch.arange(side, device=device) for side in size)
    return (rows + down) % size[0] * size[1], (columns + right) % size[1]


@constant
def in_windows(
    size: tuple[int, int], phases: tuple[int, int], window: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The way back: where every row and column is after that, with the tokens of one window behind one another."""
    (a, b), (down, right) = window, shifts(phases, device)
    rows, columns = (torch.arange(side, device=device) for side in size)
    rows, columns = (rows - down) % size[0], (columns - right) % size[1]
    return rows // a * (a * size[1]) + rows % a * b, columns // b * (a * b) + columns % b


def shifts(phases: tuple[int, int], device: torch.device) -> tuple[Int[Tensor, "phases 1"], Int[Tensor, "phases 1"]]:
    """Row and column of every phase."""
    number = torch.arange(phases[0] * phases[1], device=device)[:, None]
    return number // phases[1], number % phases[1]


def anchor(x: Float[Tensor, "n c h w"], stride: int | tuple[int, int]) -> Float[Tensor, "n c h w"]:
    """P_s of every map, in the memory format that it has. A side that the stride does not divide stays where it is."""
    size, stride = (x.shape[2], x.shape[3]), (stride, stride) if isinstance(stride, int) else stride
    phases, tokens = counted(size, stride), as_tokens(x)
    if (run := loop("anchored", x, tokens)) is not None:
        moved = torch.empty_like(x)
        run(x.data_ptr(), moved.data_ptr(), *x.shape, *phases, tokens, torch.get_num_threads())
        return moved
    best = strongest(x, phases)
    rows, columns = (places.index_select(0, best) for places in turned(size, phases, x.device))
    down, right = rows[:, :, None], columns[:, None]
    if x.stride(1) == 1:  # channels last: whole tokens move
        return taken(x.permute(0, 2, 3, 1).flatten(1, 2), down, right).permute(0, 3, 1, 2)
    index = (down + right).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).unflatten(2, size)


def embedded(embed: PatchEmbed, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n h2 w2 c"]:
    """Patches of anchored maps, (N, ceil(H/p), ceil(W/p), dim): `embed(anchor(x, p))`, where they are p x p.

    At inference on a processor no moved map is made: patches are read where they begin.
    """
    conv, p = embed.proj, embed.patch_size
    if not _is_plain(embed, x) or (run := loop("embedded", x, as_tokens(x))) is None:
        return embed(anchor(x, p))
    tokens = torch.empty(len(x), x.shape[2] // p, x.shape[3] // p, conv.out_channels)
    places = (tensor.data_ptr() for tensor in (x, conv.weight, cast(Tensor, conv.bias), tokens))
    memory = as_tokens(x), as_tokens(conv.weight)
    run(*places, *x.shape, p, conv.out_channels, *memory, torch.get_num_threads())
    return embed.norm(tokens)


def _is_plain(embed: PatchEmbed, x: Float[Tensor, "n k h w"]) -> bool:
    """Whether a loop may do the work of the convolution: nobody would miss it, and it is as made."""
    conv, p = embed.proj, embed.patch_size
    if type(embed) is not PatchEmbed or type(conv) is not nn.Conv2d or conv.bias is None or not may_keep(conv, x):
        return False
    weight, bias = conv.weight.detach(), conv.bias.detach()
    return (
        native.takes(weight)
        and native.takes(bias)
        and (weight.is_contiguous() or as_tokens(weight))
        and bias.is_contiguous()
        and x.shape[2] % p == x.shape[3] % p == 0
        and 0 not in x.shape[2:]
        and weight.shape == (conv.out_channels, x.shape[1], p, p)
        and (conv.stride, conv.padding, conv.dilation, conv.groups) == ((p, p), (0, 0), (1, 1), 1)
        and quiet(embed)
        and quiet(conv)
        and not is_in_torch_dispatch_mode()  # which counts multiply-adds, say
        and not torch.is_autocast_enabled("cpu")
    )


class PolyAnchorAttention(WindowAttention):
    """(N, C, H, W) -> the same: attention in windows that begin where the map says.

    Commutes with every circular shift along a side that `window_size` divides; along another the windows are fixed and
    filled up with zeros. Choosing the windows costs nothing beyond cutting them: both are one look-up.

    Args and errors: as of WindowAttention, whose parameters it has.
    """

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        (height, width), (a, b), phases = x.shape[2:], self.window, counted(x.shape[2:], self.window)
        best, padded = strongest(x, phases), pad_to_windows(x.permute(0, 2, 3, 1), self.window)
        size = (padded.shape[1], padded.shape[2])
        rows, columns = (places.index_select(0, best) for places in turned(size, phases, x.device))
        down, right = rows.unflatten(1, (-1, a)), columns.unflatten(1, (-1, b))
        windows = taken(padded.flatten(1, 2), down[:, :, None, :, None], right[:, None, :, None])
        mixed = self.attend(windows.flatten(3, 4).flatten(1, 2)).flatten(1, 2)
        rows, columns = (places.index_select(0, best) for places in in_windows(size, phases, self.window, x.device))
        return self.proj(taken(mixed, rows[:, :height, None], columns[:, None, :width])).permute(0, 3, 1, 2)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Sample by sample: all components and their norms, roll, attention in fixed windows, roll back."""
        return torch.cat([self._anchored(sample[None]) for sample in x])

    def _anchored(self, x: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 c h w"]:
        rows, columns = (s if side % s == 0 else 1 for side, s in zip(x.shape[2:], self.window))
        norms = {(i, j): x[..., i::rows, j::columns].detach().norm() for i in range(rows) for j in range(columns)}
        down, right = max(norms, key=lambda place: float(norms[place]))
        return super().reference(x.roll((-down, -right), (2, 3))).roll((down, right), (2, 3))
