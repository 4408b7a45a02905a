"""Does restoring in tiles show seams, and how much memory does a large photo take?

    python benchmarks/restore_tiling.py                       # a 6000x4000 photo at x2; minutes
    python benchmarks/restore_tiling.py --width 1500 --height 1000

Seams: the largest difference, in levels of 255, between tiles and one pass over the whole image, for Opsin's tiles and
for tiles that are cut without overlap. Memory: the peak resident size of a process that runs `opsin restore` on a photo
from file to file, everything included (interpreter, PyTorch, decoder, encoder).
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

import opsin
from opsin.restore.tiling import tiled


@torch.no_grad()
def seams(scale: int) -> None:
    """Prints one line per tile size."""
    net = opsin.create(f"espcn_x{scale}", weights="shipped").eval()
    x = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None] / 255
    whole = net(x)
    for tile in (32, 64, 128, 256):
        ours = (tiled(net, x, tile) - whole).abs().max()
        cut = torch.cat(
            [torch.cat([net(part) for part in rows.split(tile, 3)], 3) for rows in x.split(tile, 2)], 2
        )  # fmt: skip
        naive = (cut - whole).abs().max()
        print(f"tile {tile:4}: Opsin {255 * ours:.5f} levels, without overlap {255 * naive:.1f} levels")


def memory(width: int, height: int, scale: int, suffix: str) -> None:
    """Prints time and peak memory of restoring one large photo."""
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, f"photo{suffix}")
        pattern = data.astronaut()
        repeats = (-(-height // pattern.shape[0]), -(-width // pattern.shape[1]), 1)
        Image.fromarray(np.tile(pattern, repeats)[:height, :width]).save(photo)
        command = [sys.executable, "-m", "opsin", "restore", str(photo), "--scale", str(scale), "-o", f"{folder}/out"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        with Image.open(Path(folder, "out", photo.name)) as result:
            size = f"{result.width}x{result.height}"
    print(f"{width}x{height} to {size} ({suffix}): {seconds:.0f} s, peak memory {peak:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=6000)
    parser.add_argument("--height", type=int, default=4000)
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--suffix", default=".jpg")
    options = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    seams(options.scale)
    memory(options.width, options.height, options.scale, options.suffix)


if __name__ == "__main__":
    main()
