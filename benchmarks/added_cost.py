"""What do anchoring and token sampling add to the layer that they wrap?

    python benchmarks/added_cost.py [--rounds 201] [--threads 1]

Forward passes without gradients, in turns; `added` is the ratio of medians less 1, with its 95 % interval. Token
sampling is measured once with every token staying, so that what it saves is not counted, and once as it is, on random
weights and tokens. Anchoring an image is measured with the patch embeddings of PolyViT and PolyTwins, which are a
convolution and a norm, and with the convolution alone; for images in planes, as data sets give them, and for
channels-last ones; and in whole networks. Everything is timed twice: with an allocator that returns freed memory to the
system, where every larger tensor may come as fresh pages, and with one that keeps it; all of it in three processes,
minutes apart, of which the middle one counts.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import opsin
from opsin.compress import adaptive_token_sampler as ats
from opsin.layers import PatchEmbed
from opsin.measure.evidence import machine
from opsin.ops.attention.poly_anchor_vit import anchor, embedded
from opsin.train.allocator import keep_freed_memory
from turns import Times, forward, middle, repeated, timed

RESULTS = Path(__file__).parent / "results"
STAGES = [
    (2, 64, 56, 8),
    (8, 64, 56, 8),
    (8, 128, 28, 4),
    (8, 256, 14, 2),
]  # images, channels, side, Twins' ratio
Pair = tuple[str, str, Tensor, Callable[[Tensor], Any], Callable[[Tensor], Any]]


def pairs() -> Iterator[Pair]:
    """Kind, layer, input, the layer alone, and the layer with what is added."""
    for n, dim, side, reduction in STAGES:
        x = torch.randn(n, dim, side, side).to(memory_format=torch.channels_last)  # as the networks hold it
        where = f"{n} x {dim} x {side} x {side}"
        plain, anchored = (
            opsin.create(name, dim=dim, window_size=7).eval() for name in ("window_attention", "poly_anchor_vit")
        )
        anchored.load_state_dict(plain.state_dict())
        yield "anchoring, attention", f"window attention, {where}", x, plain, anchored
        reduced = opsin.create("subsampled_attention", dim=dim, sr_ratio=reduction).eval()
        yield "anchoring, attention", f"sub-sampled attention, {where}", x, reduced, after_anchor(reduced, reduction)
    for n, patch, dim in ((1, 16, 384), (8, 16, 384), (8, 16, 768), (1, 4, 64), (8, 4, 64)):
        for kind, norm in (("patch embedding", nn.LayerNorm), ("without its norm", nn.Identity)):
            embed, x = PatchEmbed(3, dim, patch, norm=norm).eval(), torch.randn(n, 3, 224, 224)
            where = f"{n} x 3 x 224 x 224, {patch}^2 -> {dim}"
            yield f"anchoring, {kind}", where, x, embed, partial(embedded, embed)
            last = copy.deepcopy(embed).to(memory_format=torch.channels_last)
            x = x.to(memory_format=torch.channels_last)
            yield f"anchoring channels-last images, {kind}", where, x, last, partial(embedded, last)
    yield from sampled_blocks()
    for plain_name, name in (
        ("vit_small_patch16_224", "polyvit_small_patch16"),
        ("twins_svt_small", "polytwins_svt_small"),
    ):
        x = torch.randn(2, 3, 224, 224)
        plain, anchored = (opsin.create(key).eval() for key in (plain_name, name))
        yield "anchoring, network", f"{name} after {plain_name}, 2 images", x, plain, anchored


def after_anchor(layer: nn.Module, stride: int) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(anchor(x, stride))


def sampled_blocks() -> Iterator[Pair]:
    """A block of DeiT-S with the sampler choosing, every token staying nevertheless; and with the chosen ones alone."""
    vit = opsin.create("vit_small_patch16_224").eval()
    ats.CHOICES["everything"] = lambda *given: (ats.inverse_transform(*given), given[1])[1]  # its choice does not count
    block = vit.blocks[5]
    for kind, choice in (("token sampling, all stay", "everything"), ("token sampling", "inverse_transform")):
        sampler = ats.SampledViT(vit, 3, choice=choice)
        for n in (1, 8):
            tokens, exists = torch.randn(n, 197, 384), torch.ones(n, 197, dtype=torch.bool)

            def sampled(z: Tensor, exists: Tensor = exists, sampler: ats.SampledViT = sampler) -> Tensor:
                return sampler.sampled(block, z, exists, 197)[0]  # type: ignore[arg-type]

            yield kind, f"block of DeiT-S, {n} x 197 x 384", tokens, block, sampled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        if options.one == "kept":
            keep_freed_memory()
        print(json.dumps(list(measured(options.rounds))))
        return
    runs = repeated([("returned",), ("kept",)] if keep_freed_memory() else [("returned",)])
    rows = [compared(kind, layer, runs) for memory, kind, layer in runs if memory == "returned"]
    where = {"machine": machine(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    results = RESULTS / ("added_cost.json" if options.threads == 1 else f"added_cost_{options.threads}_threads.json")
    results.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
    lines = ["| what | layer | ms | added | freed memory kept |", "|" + " --- |" * 5]
    for row in rows:
        shares = (shown(row.get(name)) for name in ("added", "kept"))
        lines.append(f"| {row['kind']} | {row['layer']} | {row['ms']:.2f} | {' | '.join(shares)} |")
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")


def shown(share: list[float] | None) -> str:
    """A ratio less 1 and its interval, in per cent."""
    if share is None:
        return ""
    value, low, high = (100 * s for s in share)
    return f"{value:+.1f} % ({low:+.1f} to {high:+.1f})"


def compared(kind: str, layer: str, runs: dict[tuple[Any, ...], list[Times]]) -> dict[str, Any]:
    """The layer's milliseconds, and the shares that are added, with their 95 % intervals."""
    found, kept = (runs.get((memory, kind, layer), [{}]) for memory in ("returned", "kept"))
    ms = median(median(times["plain"]) for times in found)
    row: dict[str, Any] = {"kind": kind, "layer": layer, "ms": round(ms, 3)}
    for name, times in (("added", found), ("kept", kept)):
        if times[0]:
            row[name] = [round(value - 1, 4) for value in middle(times, "wrapped", "plain")]
    return row


def measured(rounds: int) -> Iterator[tuple[tuple[str, str], Times]]:
    """Kind and layer, and milliseconds of the layer alone and with what is added."""
    for kind, layer, x, plain, wrapped in pairs():
        yield (kind, layer), timed({"plain": forward(plain, x), "wrapped": forward(wrapped, x)}, rounds)


if __name__ == "__main__":
    main()
