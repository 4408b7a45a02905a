"""Draws the README's pictures by the package's own commands: `make pictures` (after `make demo`)."""

import shutil
import sys
import tempfile
from pathlib import Path

import skimage.data
from PIL import Image

import opsin

ASSETS = Path(__file__).parent / "assets"


def restored() -> Path:
    """A small photo enlarged twice: bicubic on the left, ESPCN on the right."""
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.png"
        small = Image.fromarray(skimage.data.chelsea()[20:260, 90:390]).resize((150, 120), Image.Resampling.BICUBIC)
        small.save(photo)
        written = opsin.restore(photo, scale=2, output=Path(folder) / "out", side_by_side=True)
        picture = written[1]
        return Path(shutil.copy(picture, ASSETS / "restored.png"))


def pareto(comparison: Path) -> Path:
    """Accuracy against latency, as the report of a comparison shows it."""
    return Path(shutil.copy(comparison / "pareto.svg", ASSETS / "pareto.svg"))


if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    print(restored())
    print(pareto(Path(sys.argv[1])))
