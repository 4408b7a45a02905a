"""Small image files, made on the spot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (12, 16), channels: int = 3) -> np.ndarray:
    """A smooth random uint8 picture of (height, width): codecs keep it nearly as it is."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 3, channels), dtype=np.uint8)
    image = Image.fromarray(coarse if channels == 3 else coarse[..., 0]).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.array(image)


@pytest.fixture
def write() -> Callable[..., Path]:
    """`write(path, seed=, size=, channels=)` makes an image file, and the folders above it."""

    def make(path: Path, seed: int = 0, size: tuple[int, int] = (12, 16), channels: int = 3) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed, size, channels)).save(path)
        return path

    return make


@pytest.fixture
def write_mask() -> Callable[..., Path]:
    """`write_mask(path, array)` makes an index image."""

    def make(path: Path, numbers: np.ndarray) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.astype(np.uint8)).save(path)
        return path

    return make
