"""Trains the weights of `tunable_denoiser` that come with Opsin, and prints their PSNR at five strengths.

    OPSIN_DATA=... python benchmarks/train_tunable_denoiser.py -o src/opsin/restore/weights/tunable_denoiser.safetensors
    OPSIN_DATA=... python benchmarks/train_tunable_denoiser.py --evaluate        # only measures the shipped weights

Luminance of the 200 photos of BSDS500 train, patches of 40x40, mirrored and turned; white noise whose sigma is drawn
between 5 and 40 grey levels for each patch, so that the network works without being told the level. The control is
drawn on the segment (s, 1 - s) and mixes the squared distances from the clean and from the noisy patch.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import opsin
from opsin.measure.image_quality import luminance
from opsin.restore.multi_loss import ParametricMultiLoss, per_sample
from opsin.restore.tunable_denoiser import TunableDenoiser

PATCH, BATCH, RATE = 40, 8, 1e-3
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def photos(split: str) -> list[Tensor]:
    source = opsin.data.open("bsds500").splits[split]
    return [luminance(source[i][0]) for i in range(len(source))]


def batch(images: list[Tensor], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(noisy, clean) patches."""
    squares = []
    for i in torch.randint(len(images), (BATCH,), generator=draw).tolist():
        y, x = (int(torch.randint(length - PATCH + 1, (), generator=draw)) for length in images[i].shape[1:])
        squares.append(images[i][:, y : y + PATCH, x : x + PATCH])
    turns, mirror = (int(torch.randint(count, (), generator=draw)) for count in (4, 2))
    clean = torch.stack(squares).rot90(turns, (2, 3))
    clean = clean.flip(3) if mirror else clean
    sigma = (5 + 35 * torch.rand(BATCH, 1, 1, 1, generator=draw)) / 255
    return clean + sigma * torch.randn(clean.shape, generator=draw), clean


def train(steps: int, seed: int) -> TunableDenoiser:
    """Adam with one cycle."""
    torch.manual_seed(seed)
    net, images, draw = TunableDenoiser().train(), photos("train"), torch.Generator().manual_seed(seed)
    mse = per_sample(lambda a, b: F.mse_loss(a, b, reduction="none"))
    objectives = ParametricMultiLoss(
        [lambda out, clean, noisy: mse(out, clean), lambda out, clean, noisy: mse(out, noisy)], space="simplex"
    )
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        noisy, clean = batch(images, draw)
        optimiser.zero_grad(set_to_none=True)
        loss = objectives.step(net, noisy, clean, noisy, generator=draw)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1}: loss {loss.item():.5f}", flush=True)
    return net.eval()


@torch.no_grad()
def evaluate(net: TunableDenoiser, count: int = 20) -> None:
    """PSNR to clean + (1 - s) noise on photos of BSDS500 test, before clamping."""
    net.train()  # without the clamp
    draw = torch.Generator().manual_seed(0)
    for sigma in (15, 25):
        figures: list[list[float]] = [[] for _ in STRENGTHS]
        for clean in photos("test")[:count]:
            noisy = clean + sigma / 255 * torch.randn(clean.shape, generator=draw)
            for values, s in zip(figures, STRENGTHS, strict=True):
                error = F.mse_loss(net(noisy[None], strength=s)[0], torch.lerp(noisy, clean, s))
                values.append(float(-10 * error.log10()))
        means = ", ".join(f"{s:g}: {sum(v) / count:.2f}" for s, v in zip(STRENGTHS, figures, strict=True))
        print(f"sigma {sigma}, PSNR by strength: {means}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.evaluate:
        net = opsin.create("tunable_denoiser", weights="shipped")
    else:
        net = train(args.steps, args.seed)
        if args.output:
            save_file({name: value.contiguous() for name, value in net.state_dict().items()}, args.output)
    evaluate(net)


if __name__ == "__main__":
    main()
