"""Trains the ESPCN weights that come with Opsin, and prints their PSNR beside bicubic's and the paper's.

    OPSIN_DATA=... python benchmarks/train_espcn.py --scale 2 3 4 -o src/opsin/restore/weights
    OPSIN_DATA=... python benchmarks/train_espcn.py --evaluate        # only measures the shipped weights

As in the paper: luminance, patches of 17r x 17r, mean squared error at low resolution, a learning rate that falls over
training. Not as in the paper: 200 photos of BSDS500 instead of 50,000 of ImageNet; low resolution by antialiased
bicubic (what photos and the benchmarks have) instead of Gaussian blur and decimation; patches at random places,
mirrored and turned, instead of a grid; Adam with one cosine over 20,000 steps and the same rate for all layers,
instead of SGD with a threshold and a tenth of the rate in the last layer.
Published PSNR values are the paper's, for ImageNet training.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import opsin
from opsin.data.resample import bicubic_resize
from opsin.measure.image_quality import luminance, psnr_y, ssim_y
from opsin.restore.espcn import ESPCN

PATCH, BATCH, RATE = 17, 16, 1e-3


def pairs(name: str, split: str, scale: int) -> list[tuple[Tensor, Tensor]]:
    """(low, high) RGB images; the high one cropped to a multiple of the scale, the low one rounded to 8 bits."""
    photos = opsin.data.open(name).splits[split]
    result = []
    for i in range(len(photos)):
        high = photos[i][0]
        high = high[:, : high.shape[1] // scale * scale, : high.shape[2] // scale * scale]
        low = bicubic_resize(high[None], 1 / scale)[0].clamp(0, 1)
        result.append(((low * 255).round() / 255, high))
    return result


class Patches:
    """Random 17x17 patches of low-resolution luminance with their 17r x 17r targets, mirrored and turned."""

    def __init__(self, images: list[tuple[Tensor, Tensor]], seed: int):
        self.images = [(luminance(low), luminance(high)) for low, high in images]
        self.random = torch.Generator().manual_seed(seed)

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        cut = [self._one() for _ in range(count)]
        low, high = (torch.stack(side) for side in zip(*cut))
        turns, mirror = self._draw(4), self._draw(2)
        low, high = low.rot90(turns, (2, 3)), high.rot90(turns, (2, 3))
        return (low.flip(3), high.flip(3)) if mirror else (low, high)

    def _one(self) -> tuple[Tensor, Tensor]:
        low, high = self.images[self._draw(len(self.images))]
        r = high.shape[1] // low.shape[1]
        y, x = self._draw(low.shape[1] - PATCH + 1), self._draw(low.shape[2] - PATCH + 1)
        h, w = slice(y * r, (y + PATCH) * r), slice(x * r, (x + PATCH) * r)
        return low[:, y : y + PATCH, x : x + PATCH], high[:, h, w]

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.random))


def train(scale: int, steps: int, seed: int = 0) -> ESPCN:
    """Adam with a cosine over `steps` batches."""
    torch.manual_seed(seed)
    net = ESPCN(scale).train()
    patches = Patches(pairs("bsds500", "train", scale), seed)
    held = [(luminance(low)[None], luminance(high)[None]) for low, high in pairs("bsds500", "val", scale)[:20]]
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    for step in range(steps):
        falling = 0.005 + 0.995 * (1 + math.cos(math.pi * step / steps)) / 2
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 100) * falling
        optimiser.zero_grad(set_to_none=True)
        net.loss(*patches.batch(BATCH)).backward()
        optimiser.step()
        if (step + 1) % max(1, steps // 8) == 0:
            seconds = time.process_time()
            print(
                f"x{scale}: {step + 1} steps, BSDS500 val {evaluate(net, held)[0]:.2f} dB, {seconds:.0f} s", flush=True
            )
    return net.eval()


@torch.no_grad()
def evaluate(
    net: torch.nn.Module, images: list[tuple[Tensor, Tensor]], border: int | None = None
) -> tuple[float, float]:
    """Mean PSNR-Y and SSIM-Y over images; the border is the scale."""
    mode = net.training
    net.eval()
    psnr, ssim = [], []
    for low, high in images:
        restored = net(low)
        border = high.shape[-1] // low.shape[-1]
        psnr.append(psnr_y(restored, high, border).item())
        ssim.append(ssim_y(restored, high, border).item())
    net.train(mode)
    return sum(psnr) / len(psnr), sum(ssim) / len(ssim)


class Bicubic(torch.nn.Module):
    """The baseline: bicubic enlargement."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        return bicubic_resize(image, self.scale).clamp(0, 1)


def report(scale: int, net: ESPCN) -> dict[str, str]:
    """Prints a line per test set and returns the figures."""
    from opsin.catalog import find

    published = find(f"espcn_x{scale}")[1].published
    figures = {}
    for name in ("set5", "set14"):
        images = [(low[None], high[None]) for low, high in pairs(name, "test", scale)]
        (ours, ssim), (bicubic, ssim_bicubic) = evaluate(net, images), evaluate(Bicubic(scale), images)
        paper = published.get(f"{name}_psnr_y")
        print(
            f"x{scale} {name:5}  bicubic {bicubic:.2f} dB / {ssim_bicubic:.4f}   ours {ours:.2f} dB / {ssim:.4f}   "
            f"gain {ours - bicubic:+.2f} dB   paper {f'{paper:.2f} dB' if paper else '-'}"
        )
        figures |= {f"{name}_psnr_y": f"{ours:.3f}", f"{name}_psnr_y_bicubic": f"{bicubic:.3f}"}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--steps", type=int, default=20_000, help="batches of 16 patches for each scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="measure the shipped weights, train nothing")
    parser.add_argument("-o", "--output", type=Path, default=Path())
    options = parser.parse_args()
    for scale in options.scale:
        if options.evaluate:
            report(scale, opsin.create(f"espcn_x{scale}", weights="shipped").eval())
            continue
        net = train(scale, options.steps, options.seed)
        figures = report(scale, net) | {"seed": str(options.seed), "steps": str(options.steps)}
        options.output.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), options.output / f"espcn_x{scale}.safetensors", metadata=figures)


if __name__ == "__main__":
    main()
