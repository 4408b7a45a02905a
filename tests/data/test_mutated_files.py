"""Whatever happens to an image file, it decodes to a finite image of a plausible shape or is named in one sentence."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import opsin.data
from opsin.data.images import read_header, read_image, read_mask
from opsin.errors import BadInput

PICTURE = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)


def _encoded() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    colour, grey = Image.fromarray(PICTURE), Image.fromarray(PICTURE[..., 0])
    deep = Image.fromarray(PICTURE[..., 0].astype(np.uint16) * 257)
    kinds = {
        "jpg": (colour, "JPEG", {"exif": exif}),
        "cmyk": (colour.convert("CMYK"), "JPEG", {}),
        "png": (colour, "PNG", {}),
        "rgba": (colour.convert("RGBA"), "PNG", {"exif": exif}),
        "palette": (colour.quantize(16), "PNG", {"transparency": 3}),
        "deep": (deep, "PNG", {}),
        "gif": (grey, "GIF", {}),
        "bmp": (colour, "BMP", {}),
        "tif": (colour, "TIFF", {}),
        "lzw": (colour, "TIFF", {"compression": "tiff_lzw"}),
        "deeptif": (deep, "TIFF", {}),
        "webp": (colour, "WEBP", {}),
        "pgm": (grey, "PPM", {}),
        "jp2": (colour, "JPEG2000", {}),
        "tga": (colour, "TGA", {}),
        "ico": (colour, "ICO", {}),
    }
    found = {}
    for name, (image, kind, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    return found


FILES = _encoded()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file with bytes flipped, its end cut off, a piece removed, repeated, or replaced by another file's."""
    content = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))])
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["flip", "set", "cut", "remove", "repeat", "splice"])):
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "set" if content:
                content[place] = draw(st.integers(0, 255))
            case "cut":
                del content[place:]
            case "remove":
                del content[place : place + draw(st.integers(1, 40))]
            case "repeat":
                content[place:place] = content[place : place + draw(st.integers(1, 40))]
            case "splice":
                other = FILES[draw(st.sampled_from(sorted(FILES)))]
                start = draw(st.integers(0, len(other) - 1))
                content[place:] = other[start:]
    return bytes(content)


def one_sentence(text: str) -> bool:
    return "\n" not in text and 10 < len(text) < 400


@pytest.fixture(autouse=True)
def _quiet():
    """Decoders warn about what they find odd; that is no failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """The result, or the sentence of a BadInput; any other exception is a failure."""
    try:
        return function(*arguments), ""
    except BadInput as error:
        return None, str(error)


@given(mutated(), st.sampled_from([1, 3]))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_reader(content: bytes, channels: int):
    image, sentence = attempt(read_image, content, channels)
    if image is None:
        assert one_sentence(sentence)
        assert f"of {len(content)} bytes" in sentence
        return
    assert image.dtype == torch.float32
    assert image.shape[0] == channels and image.ndim == 3 and image.numel() > 0
    assert torch.isfinite(image).all()
    assert image.min() >= 0 and image.max() <= 1
    assert image.shape[1:] == read_header(content).size


@given(mutated())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_masks(content: bytes):
    mask, sentence = attempt(read_mask, content)
    assert one_sentence(sentence) if mask is None else mask.dtype == torch.int64 and mask.ndim == 2 and len(mask)


@given(st.lists(mutated(), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_folder(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]):
    """Sound images of each class in each split, and a few mutated: all samples can be had, bad files are listed."""
    folder = tmp_path_factory.mktemp("set")
    places = [folder / split / name for split in ("train", "val", "test") for name in "ab"]
    sound = [_put(place / "sound.png", FILES["png"]) for place in places]
    added = [_put(places[i % 6] / f"mutated{i}.png", content) for i, content in enumerate(contents)]
    data = opsin.data.open(str(folder))
    images = [split[i] for split in data.splits.values() for i in range(len(split))]
    assert all(image.shape[0] == 3 and torch.isfinite(image).all() for image, _ in images)
    assert all(one_sentence(reason) for _, reason in data.skipped)
    named = {name for name, _ in data.skipped}
    assert not named & set(map(str, sound))
    assert {str(path) for path in added if attempt(read_image, path)[1]} <= named


def _put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
