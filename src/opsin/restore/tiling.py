"""Images of any size through a network, tile by tile, without seams and within a bound on memory.

A network whose output at a pixel depends on R input pixels to each side gets every tile with R more pixels around it,
and of the result only the tile is kept: the parts are then the same numbers as in one pass over the whole image. A
network that looks further, or at everything, gets tiles that overlap by a quarter; their results are blended by linear
ramps, so that a difference between neighbours is spread instead of seen.

Pixels are read and written through two functions, so that the whole image never exists in floating point.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import BadInput
from opsin.measure.memory import peak_memory
from opsin.restore import Restorer

Read = Callable[[slice, slice], Float[Tensor, "1 c h w"]]  # rows, columns of the input
Write = Callable[[int, int, Float[Tensor, "1 c h w"]], None]  # top, left in the output, pixels
Run = Callable[[Restorer, list["Span"], list["Span"], Read, Write], Iterator[None]]
Tick = Callable[[int, int], None]  # tiles done, tiles in all

SMALLEST, LARGEST = 16, 1024
MEMORY = 256 * 2**20
OVERLAP = 4  # blended tiles overlap by a quarter of their side
SCRATCH = 2  # workspace of the kernels, beside the tensors that can be counted


@dataclass(frozen=True)
class Span:
    """A stretch of one axis: read from `low` to `high`, keep from `start` to `stop`."""

    low: int
    start: int
    stop: int
    high: int


def exact_spans(length: int, tile: int, context: int) -> list[Span]:
    """Stretches of about equal length, at most `tile`, one after the other, each read with `context` to each side."""
    count = -(-length // tile)
    edges = [i * length // count for i in range(count + 1)]
    return [Span(max(0, a - context), a, b, min(length, b + context)) for a, b in pairwise(edges)]


def blended_spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Stretches of length `tile`, evenly spread, each overlapping the next by at least `overlap`."""
    if length <= tile:
        return [Span(0, 0, length, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [i * (length - tile) // (count - 1) for i in range(count)]
    return [Span(a, a, a + tile, a + tile) for a in starts]


def ramps(spans: list[Span], scale: int) -> list[Float[Tensor, " side"]]:
    """One weight per output pixel of each stretch: rising from its inner ends; those of a pixel sum to one."""
    weights, total = [], torch.zeros(spans[-1].stop * scale)
    for before, span, after in zip([None, *spans], spans, [*spans[1:], None]):
        weight = torch.ones((span.stop - span.start) * scale)
        if before:
            rise = _rise((before.stop - span.start) * scale)
            weight[: len(rise)] *= rise
        if after:
            fall = _rise((span.stop - after.start) * scale).flip(0)
            weight[-len(fall) :] *= fall
        total[span.start * scale : span.stop * scale] += weight
        weights.append(weight)
    return [w / total[s.start * scale : s.stop * scale] for w, s in zip(weights, spans)]


def _rise(length: int) -> Float[Tensor, " length"]:
    """From 0 to 1, at the middles of `length` pixels."""
    return (torch.arange(length) + 0.5) / length


def exact_tiles(net: Restorer, rows: list[Span], columns: list[Span], read: Read, write: Write) -> Iterator[None]:
    """Restores tiles with their context and writes what is theirs; yields after each."""
    r = net.scale
    for y in rows:
        for x in columns:
            out = net(read(slice(y.low, y.high), slice(x.low, x.high)))
            top, left = (y.start - y.low) * r, (x.start - x.low) * r
            height, width = (y.stop - y.start) * r, (x.stop - x.start) * r
            write(y.start * r, x.start * r, out[..., top : top + height, left : left + width])
            yield


def blended_tiles(net: Restorer, rows: list[Span], columns: list[Span], read: Read, write: Write) -> Iterator[None]:
    """Restores overlapping tiles and writes each row of tiles, as soon as the next no longer reaches it, blended."""
    r = net.scale
    down, across = ramps(rows, r), ramps(columns, r)
    waiting: Tensor | None = None  # weighted sums of output rows that the next row of tiles adds to
    for i, y in enumerate(rows):
        band: Tensor | None = None
        for x, weight in zip(columns, across):
            out = net(read(slice(y.low, y.high), slice(x.low, x.high)))
            if band is None:
                band = out.new_zeros(*out.shape[:2], out.shape[2], columns[-1].stop * r)
            band[..., x.start * r : x.stop * r] += out * (weight.to(out) * down[i].to(out)[:, None])
            yield
        assert band is not None
        if waiting is not None:
            band[:, :, : waiting.shape[2]] += waiting
        ready = ((rows[i + 1].start if i + 1 < len(rows) else y.stop) - y.start) * r
        write(y.start * r, 0, band[:, :, :ready])
        waiting = band[:, :, ready:].clone()


@torch.no_grad()
def restore_tiles(
    net: Restorer, size: tuple[int, int], read: Read, write: Write, *,
    tile: int | None = None, max_memory: int = MEMORY, tick: Tick | None = None,
) -> int:  # fmt: skip
    """Restores an image of `size` (height, width) in tiles and returns the side of the tiles that it took.

    tile: their side in input pixels; by default as large as `max_memory` bytes for the network's tensors allow. Where
    memory runs out all the same, everything starts again with tiles of half the side.
    Raises BadInput where not even the smallest tile fits.
    """
    if tile is not None and tile < SMALLEST:
        raise BadInput(f"tiles of {tile} pixels are too small; take {SMALLEST} or more")
    side = tile or choose_tile(net, read, size, max_memory)
    while True:
        try:
            rows, columns, run = plan(net, size, side)
            for done, _ in enumerate(run(net, rows, columns, read, write), 1):
                if tick:
                    tick(done, len(rows) * len(columns))
            return side
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if side <= SMALLEST:
                raise BadInput(
                    f"there is no memory for tiles of {side} pixels; close other programs or take a smaller network"
                ) from error
        side = max(SMALLEST, side // 2)


def plan(net: Restorer, size: tuple[int, int], tile: int) -> tuple[list[Span], list[Span], Run]:
    """Rows, columns and how to run them: exact where a tile is at least twice the receptive field, else blended."""
    field = net.receptive_field
    if field is not None and 2 * field <= tile:
        rows, columns = (exact_spans(length, tile, field) for length in size)
        return rows, columns, exact_tiles
    rows, columns = (blended_spans(length, tile, max(1, tile // OVERLAP)) for length in size)
    return rows, columns, blended_tiles


def choose_tile(net: Restorer, read: Read, size: tuple[int, int], max_memory: int) -> int:
    """The side of tiles whose tensors stay within `max_memory`, from what a small tile is seen to take."""
    probe = tuple(min(length, 64) for length in size)
    x = read(slice(0, probe[0]), slice(0, probe[1]))
    weights = sum(t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers()))
    per_pixel = SCRATCH * max(1, peak_memory(net, (x,)) - weights) / (probe[0] * probe[1])
    side = int((max(0, max_memory - weights) / per_pixel) ** 0.5) - 2 * (net.receptive_field or 0)
    return max(SMALLEST, min(LARGEST, side))


def tiled(net: Restorer, image: Float[Tensor, "1 c h w"], tile: int) -> Float[Tensor, "1 c hr wr"]:
    """A whole tensor restored in tiles."""
    n, c, h, w = image.shape
    out = image.new_empty(n, c, h * net.scale, w * net.scale)

    def write(top: int, left: int, pixels: Tensor) -> None:
        out[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]] = pixels

    restore_tiles(net, (h, w), lambda rows, columns: image[..., rows, columns], write, tile=tile)
    return out


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: CUDA has a class for it, the CPU allocator only a sentence."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)
