"""Photos as files: what restoring must keep of one beside its colours, and how it is written again.

Kept: the depth (8 or 16 bits), grey as grey, transparency, the EXIF record with its orientation (pixels stay stored as
they were; TIFF files are turned upright), and the colour profile where it describes what is written. Palette images
become RGB or RGBA; CMYK and other colour spaces become RGB, and their profile, which would be wrong, is dropped; of an
animation the first frame is taken.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Shaped
from PIL import Image, ImageOps
from PIL.ExifTags import IFD, Base

from opsin.data.images import SUFFIXES, opened, read_array
from opsin.errors import BadInput

KEPT_TAGS = (
    Base.Orientation, Base.ImageDescription, Base.Make, Base.Model, Base.DateTime, Base.Artist, Base.Copyright,
)  # fmt: skip
STALE_TAGS = {Base.MakerNote, Base.ExifImageWidth, Base.ExifImageHeight}
WRITTEN = {  # suffix: (format, longest side in pixels, has transparency, has 16 bits per colour)
    ".jpg": ("JPEG", 65_500, False, False), ".jpeg": ("JPEG", 65_500, False, False),
    ".jfif": ("JPEG", 65_500, False, False), ".png": ("PNG", 2**31 - 1, True, True),
    ".tif": ("TIFF", 2**31 - 1, True, True), ".tiff": ("TIFF", 2**31 - 1, True, True),
    ".webp": ("WEBP", 16_383, True, False), ".bmp": ("BMP", 2**31 - 1, False, False),
    ".ppm": ("PPM", 2**31 - 1, False, False), ".pgm": ("PPM", 2**31 - 1, False, False),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}, "TIFF": {"compression": "tiff_lzw"},
}  # fmt: skip


@dataclass
class Photo:
    """pixels: grey or RGB, uint8 or uint16. alpha: of the same height, width and depth, or None."""

    pixels: Shaped[np.ndarray, "h w c"]
    alpha: Shaped[np.ndarray, "h w"] | None = None
    exif: Image.Exif | None = None
    profile: bytes | None = None

    @property
    def deep(self) -> bool:
        return self.pixels.dtype == np.uint16

    @property
    def top(self) -> int:
        """The value of white."""
        return 65535 if self.deep else 255

    def upright(self) -> Image.Image:
        """For looking at: 8 bits, without transparency, turned as the EXIF record says."""
        pixels = (self.pixels >> 8).astype(np.uint8) if self.deep else self.pixels
        image = _picture(pixels)
        if self.exif and Base.Orientation in self.exif:
            image.getexif()[Base.Orientation] = self.exif[Base.Orientation]
        return ImageOps.exif_transpose(image).convert("RGB")


def read_photo(path: Path) -> Photo:
    """Reads a file. Raises BadInput that names it where it cannot be read."""
    with opened(path) as image:
        grey = image.mode.startswith("I") or image.mode == "F"
        deep = not grey and _is_deep_colour(image)  # asked first: reading the record may decode the file
        exif, profile = _exif(image), image.info.get("icc_profile")
        if deep:
            pixels, alpha = _deep_colour(path)
        else:
            image.load()
            orientation = image.getexif().get(Base.Orientation, 1)
            if exif and orientation == 1:  # Pillow has turned it already, which it does with TIFF files
                exif.pop(Base.Orientation, None)
            pixels, alpha = (_deep_grey(path, orientation), None) if grey else _shallow(image)
    if profile is not None and profile[16:20] != (b"GRAY" if pixels.shape[2] == 1 else b"RGB "):
        profile = None
    return Photo(pixels, alpha, exif, profile)


def _shallow(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """8-bit colours and transparency."""
    grey = image.mode in ("1", "L", "LA", "La")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
        alpha = None if (alpha == 255).all() else alpha
    pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1), alpha


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether a PNG or TIFF file has 16 bits per colour, of which Pillow would keep 8."""
    if image.format == "PNG" and image.tile:
        return str(image.tile[0].args).endswith(";16B")
    if image.format == "TIFF":
        return image.mode != "P" and int(np.max(image.tag_v2.get(258, 8))) == 16  # type: ignore[attr-defined]
    return False


def _deep_colour(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with path.open("rb") as stream, av.open(stream) as container:
        rgba = next(container.decode(video=0)).to_ndarray(format="rgba64le").astype(np.uint16, copy=False)
    opaque = bool((rgba[..., 3] == 65535).all())
    return np.ascontiguousarray(rgba[..., :3]), None if opaque else np.ascontiguousarray(rgba[..., 3])


def _deep_grey(path: Path, orientation: int) -> np.ndarray:
    """16-bit grey as it is stored; the reader turns it upright, which is undone here."""
    upright = Image.fromarray((read_array(path, 1)[0].numpy() * 65535).round().astype(np.int32))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    return np.asarray(stored).astype(np.uint16)[..., None]


def _exif(image: Image.Image) -> Image.Exif | None:
    """What of the record stays true of a larger image: not the sizes, offsets and thumbnails."""
    old, new = image.getexif(), Image.Exif()
    for tag in KEPT_TAGS:
        if tag in old:
            new[tag] = old[tag]
    for ifd in (IFD.Exif, IFD.GPSInfo):
        values = {tag: value for tag, value in old.get_ifd(ifd).items() if tag not in STALE_TAGS}
        if values:
            new.get_ifd(ifd).update(values)
            new[ifd] = 0  # the writer fills in the offset
    return new if len(new) else None


def target_name(name: str, photo: Photo, scale: int) -> str:
    """The file's name, or with ".png" added where its format cannot hold the result."""
    side = scale * max(photo.pixels.shape[:2])
    form = WRITTEN.get(Path(name).suffix.lower())
    fits = form and side <= form[1] and (form[2] or photo.alpha is None) and (form[3] or not photo.deep)
    grey_only = Path(name).suffix.lower() == ".pgm" and photo.pixels.shape[2] != 1
    return name if fits and not grey_only else f"{name}.png"


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def write_photo(photo: Photo, path: Path) -> Path:
    """Writes a file, whole or not at all. Raises BadInput where the disk says no."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _encode(photo, part, WRITTEN[path.suffix.lower()][0])
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"'{path}' cannot be written: {error.strerror or error}") from error
    return path


def _encode(photo: Photo, path: Path, form: str) -> None:
    if photo.deep and photo.pixels.shape[2] == 3:
        (_deep_tiff if form == "TIFF" else _deep_png)(photo, path)
        return
    options = dict(OPTIONS.get(form, {}))
    if photo.profile:
        options["icc_profile"] = photo.profile
    if photo.exif and form in ("JPEG", "PNG", "WEBP", "TIFF"):
        options["exif"] = photo.exif
    image = _picture(photo.pixels)
    if photo.alpha is not None:
        image.putalpha(Image.fromarray(photo.alpha))
    image.save(path, format=form, **options)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _stacked(photo: Photo) -> np.ndarray:
    return photo.pixels if photo.alpha is None else np.concatenate((photo.pixels, photo.alpha[..., None]), 2)


def _deep_tiff(photo: Photo, path: Path) -> None:
    """16 bits per colour, which Pillow does not write."""
    import tifffile

    tags = []
    if photo.exif and Base.Orientation in photo.exif:
        tags.append((int(Base.Orientation), 3, 1, int(photo.exif[Base.Orientation]), True))
    tifffile.imwrite(
        path, _stacked(photo), photometric="rgb", compression="zlib", iccprofile=photo.profile, extratags=tags,
        extrasamples=None if photo.alpha is None else ["unassalpha"],
    )  # fmt: skip


def _deep_png(photo: Photo, path: Path) -> None:
    """16 bits per colour, which Pillow does not write: the PNG specification's chunks, rows filtered by "Up"."""
    height, width = photo.pixels.shape[:2]
    packer = zlib.compressobj(6)
    with path.open("wb") as file:

        def chunk(name: bytes, data: bytes) -> None:
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))

        file.write(b"\x89PNG\r\n\x1a\n")
        colour = 2 if photo.alpha is None else 6
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
        if photo.profile:
            chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(photo.profile))
        if photo.exif:
            chunk(b"eXIf", photo.exif.tobytes().removeprefix(b"Exif\0\0"))
        above = np.zeros(0, np.uint8)
        for top in range(0, height, 64):
            alpha = None if photo.alpha is None else photo.alpha[top : top + 64]
            rows = _stacked(Photo(photo.pixels[top : top + 64], alpha)).astype(">u2")
            data = rows.reshape(len(rows), -1).view(np.uint8)
            previous = np.concatenate((above.reshape(-1, data.shape[1]), data[:-1]))
            previous = previous if len(previous) == len(data) else np.concatenate((0 * data[:1], data[:-1]))
            filtered = np.concatenate((np.full((len(data), 1), 2, np.uint8), data - previous), 1)
            above = data[-1]
            if packed := packer.compress(filtered.tobytes()):
                chunk(b"IDAT", packed)
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")
