"""One reader for every image file: whatever the file holds, a float32 (C, H, W) tensor in [0, 1] comes out.

Conventions, for the kinds of file that loaders disagree about:

- transparency is composited on white, so that colours hidden under transparent pixels never show;
- an EXIF orientation is applied; of an animation the first frame is taken;
- grey to colour repeats the channel, colour to grey is the ITU-R 601 luma; CMYK is converted without its profile;
- 16-bit files, grey or colour, keep their depth: value / 65535. Files of floats or 32-bit integers must already be
  in [0, 1] or [0, 65535].

A file that cannot be read raises `BadInput` with one sentence that names it: empty, truncated, not an image, more than
`MAX_PIXELS`. Decoders raise whatever their parsing trips over (struct.error, IndexError, zlib.error, ...), so every
exception of the decoding step becomes that sentence.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from opsin.errors import BadInput, OpsinError

MAX_PIXELS = 178_956_970  # of one image: 0.5 GB of 8-bit RGB
SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".avif", ".tga", ".ico",
})  # fmt: skip
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")  # JPEG: MPO too
GREY_MODES = frozenset({"1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
ORIENTATION = 0x0112  # the EXIF tag


class Encoded(Protocol):
    """An image file that lies somewhere else than in the file system, e.g. in a row of a table; `str()` names it."""

    def read_bytes(self) -> bytes: ...


ImageSource = str | Path | bytes | Encoded


class Header(NamedTuple):
    """What the first bytes of a file say: (height, width) as it will be read, and whether it has no colour."""

    size: tuple[int, int]
    grey: bool


def read_image(
    source: ImageSource, channels: int = 3, *, size: tuple[int, int] | None = None, name: str = ""
) -> Float[Tensor, "c h w"]:
    """Reads an image as float32 in [0, 1].

    Args:
        source: a path, or the bytes of a file.
        channels: 1 (grey) or 3 (RGB).
        size: (height, width) to scale (antialiased bicubic, keeping the aspect) and centre-crop to.
        name: what an error calls the image; the path by default.
    """
    return as_float(read_array(source, channels, size=size, name=name))


def read_array(
    source: ImageSource, channels: int = 3, *, size: tuple[int, int] | None = None, name: str = ""
) -> Tensor:
    """As `read_image`, but in the file's own depth: uint8, or float32 where the file holds more than 8 bits."""
    if channels not in (1, 3):
        raise BadInput(f"images are read with 1 channel (grey) or 3 (RGB), not channels={channels!r}")
    with opened(source, name) as image:
        if size is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (max(size), max(size)))  # decodes at 1/2, 1/4 or 1/8 where that is still large enough
        pixels = _pixels(image, source, channels)
    return pixels if size is None else fit(pixels, size)


def read_mask(source: ImageSource, name: str = "") -> Int[Tensor, "h w"]:
    """Reads an index image (grey, palette or 1-bit): the raw number of each pixel, as int64."""
    with opened(source, name) as image:
        array = np.asarray(ImageOps.exif_transpose(image))
        if array.ndim == 3 and array.shape[2] == 3 and (array == array[..., :1]).all():
            array = array[..., 0]
        if array.ndim != 2:
            raise BadInput(
                f"the mask {name or describe(source)} is a colour image ({image.mode}); a mask holds one class number "
                "per pixel, in a grey or palette image"
            )
        return torch.from_numpy(array.astype(np.int64))


def read_header(source: ImageSource, name: str = "") -> Header:
    """Size and colour without decoding. A file whose end looks cut off is decoded, to know; raises as `read_image`."""
    with opened(source, name) as image:
        if not _has_end(image):
            image.load()
        return _header(image)


def as_float(image: Tensor) -> Float[Tensor, "*n c h w"]:
    """uint8 to float32 in [0, 1]; floats as they are."""
    return image.float().div_(255) if image.dtype == torch.uint8 else image


def fit(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Scales so that the image just covers `size` (height, width), keeping its aspect, and crops the centre."""
    height, width = image.shape[-2:]
    ratio = max(size[0] / height, size[1] / width)
    scaled = (max(size[0], round(height * ratio)), max(size[1], round(width * ratio)))
    if scaled != (height, width):
        image = F.interpolate(image[None], scaled, mode="bicubic", antialias=True, align_corners=False)[0]
        image = image if image.dtype == torch.uint8 else image.clamp(0, 1)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return image[..., top : top + size[0], left : left + size[1]]


def describe(source: ImageSource) -> str:
    """What to call a source in a sentence."""
    return f"of {len(source)} bytes" if isinstance(source, bytes) else str(source)


@contextmanager
def opened(source: ImageSource, name: str = "") -> Iterator[ImageFile.ImageFile]:
    """An opened, not yet decoded image; whatever goes wrong inside becomes one sentence that names the file."""
    name = name or describe(source)
    try:
        with _stream(source) as stream:
            image = Image.open(stream, formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadInput(f"the image {name} has {width} x {height} pixels, more than {MAX_PIXELS} in all")
            if width * height == 0:
                raise BadInput(f"the image {name} has {width} x {height} pixels")
            yield image
    except OpsinError:
        raise
    except FileNotFoundError:
        raise BadInput(f"there is no image {name}") from None
    except Exception as error:
        raise BadInput(f"the image {name} cannot be read: {_reason(error, source)}") from error


def _stream(source: ImageSource) -> Any:
    if isinstance(source, str | Path):
        return Path(source).open("rb")
    return io.BytesIO(source if isinstance(source, bytes) else source.read_bytes())


def _reason(error: Exception, source: ImageSource) -> str:
    """The cause in a few words, on one line."""
    if isinstance(error, UnidentifiedImageError):
        empty = not source if isinstance(source, bytes) else isinstance(source, str | Path) and _is_empty(Path(source))
        return "the file is empty" if empty else "it is in no image format that is known here"
    if isinstance(error, Image.DecompressionBombError):
        return f"it claims more than {MAX_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split())
    return "the file is truncated" if "truncated" in text.lower() else (text or type(error).__name__)[:120]


def _is_empty(path: Path) -> bool:
    return path.stat().st_size == 0


def _header(image: Image.Image) -> Header:
    width, height = image.size
    plain_png = image.format == "PNG" and "exif" not in image.info  # there, getexif() would decode the whole image
    turned = not plain_png and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    palette = image.mode == "P" and image.palette is not None and _is_grey_palette(image)
    return Header((width, height) if turned else (height, width), image.mode in GREY_MODES or palette)


def _is_grey_palette(image: Image.Image) -> bool:
    colours = np.array(image.getpalette("RGB") or [0, 0, 1]).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _has_end(image: ImageFile.ImageFile) -> bool:
    """Whether the file ends as its format demands. False (so: decode to know) for formats without such a mark."""
    stream = image.fp
    assert stream is not None
    place = stream.tell()
    length = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, length - 1024))
    tail = stream.read(1024)
    stream.seek(0)
    head = stream.read(16)
    stream.seek(place)
    match image.format:
        case "JPEG" | "MPO":
            return b"\xff\xd9" in tail
        case "PNG":
            return b"IEND" in tail
        case "GIF":
            return tail.endswith(b";")
        case "WEBP":
            return int.from_bytes(head[4:8], "little") + 8 <= length
        case "BMP":
            return int.from_bytes(head[2:6], "little") <= length
    return False


def _pixels(image: ImageFile.ImageFile, source: ImageSource, channels: int) -> Tensor:
    """Decodes to (C, H, W), uint8 or float32 in [0, 1]."""
    if image.mode in GREY_MODES - {"1", "L"}:
        grey = _deep_grey(ImageOps.exif_transpose(image), describe(source))
        return grey.expand(channels, -1, -1).clone()
    if _is_deep_colour(image):
        return _deep_colour(source, image.getexif().get(ORIENTATION, 1), channels)
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    mode = "L" if channels == 1 else "RGB"
    array = np.array(upright if upright.mode == mode else upright.convert("RGB").convert(mode))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1).contiguous()


def _deep_grey(image: Image.Image, name: str) -> Float[Tensor, "1 h w"]:
    array = np.asarray(image).astype(np.float32)
    scaled = array if image.mode == "F" else array / 65535
    if not np.isfinite(array).all() or scaled.min() < 0 or scaled.max() > 1:
        top = "1" if image.mode == "F" else "65535"
        raise BadInput(f"the image {name} holds {image.mode} values outside [0, {top}]; scale them into that range")
    return torch.from_numpy(scaled)[None]


def _is_deep_colour(image: ImageFile.ImageFile) -> bool:
    """Whether the file has 16 bits per channel where Pillow would keep 8."""
    if image.format == "PNG" and image.tile:
        return str(image.tile[0].args).endswith(";16B")
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, 8)  # type: ignore[attr-defined]
        return image.mode != "P" and max(np.ravel(bits)) == 16
    return False


def _deep_colour(source: ImageSource, orientation: int, channels: int) -> Float[Tensor, "c h w"]:
    with _stream(source) as stream, av.open(stream) as container:
        frame = next(container.decode(video=0))
    rgba: NDArray[Any] = frame.to_ndarray(format="rgba64le").astype(np.float32) / 65535
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    image = torch.from_numpy(colour * alpha + (1 - alpha)).permute(2, 0, 1)
    return _turn(luma(image) if channels == 1 else image, orientation).contiguous()


def luma(image: Float[Tensor, "*n 3 h w"]) -> Float[Tensor, "*n 1 h w"]:
    """ITU-R 601 luma of RGB, 0.299 R + 0.587 G + 0.114 B: what Pillow calls grey."""
    return (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(-3, keepdim=True)


def _turn(image: Tensor, orientation: int) -> Tensor:
    """Applies an EXIF orientation (1 to 8) to (C, H, W)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(-2, -1)
    if orientation in (2, 3, 6, 7):
        image = image.flip(-1)
    if orientation in (3, 4, 7, 8):
        image = image.flip(-2)
    return image


def fit_nearest(mask: Int[Tensor, "h w"], size: tuple[int, int]) -> Int[Tensor, "H W"]:
    """As `fit` for a mask: every output pixel takes the class of the nearest input pixel."""
    height, width = mask.shape
    ratio = max(size[0] / height, size[1] / width)
    scaled = (max(size[0], round(height * ratio)), max(size[1], round(width * ratio)))
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    rows = ((torch.arange(top, top + size[0]) + 0.5) * height / scaled[0]).long()
    columns = ((torch.arange(left, left + size[1]) + 0.5) * width / scaled[1]).long()
    return mask[rows[:, None], columns]
