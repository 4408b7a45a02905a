"""Every kind of image file comes out as float32 (C, H, W) in [0, 1], or is named in one sentence."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from opsin.data.images import fit, fit_nearest, read_array, read_header, read_image, read_mask
from opsin.errors import BadInput

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chw(array: np.ndarray, top: float = 255) -> torch.Tensor:
    array = array if array.ndim == 3 else array[..., None]
    return torch.from_numpy(array.astype(np.float32) / top).permute(2, 0, 1)


def deep_png(array: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG written by hand: colour type 0 grey, 2 RGB, 4 grey + alpha, 6 RGBA."""
    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(tag: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + tag + content + struct.pack(">I", zlib.crc32(tag + content))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_plain_rgb_and_its_luma():
    image = read_image(encode(Image.fromarray(RGB)))
    assert image.dtype == torch.float32
    assert torch.equal(image, chw(RGB))
    grey = read_image(encode(Image.fromarray(RGB)), channels=1)
    assert grey.shape == (1, 5, 7)
    assert torch.allclose(grey[0], (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0), atol=1 / 255)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000", "TGA", "GIF"])
def test_lossless_formats_agree(kind):
    grey = RGB[..., 0] if kind == "GIF" else RGB
    options = {"lossless": True} if kind == "WEBP" else {}
    image = read_image(encode(Image.fromarray(grey), kind, **options), channels=1 if kind == "GIF" else 3)
    assert torch.equal(image, chw(grey))


def test_grey_becomes_three_equal_channels():
    image = read_image(encode(Image.fromarray(RGB[..., 1])))
    assert torch.equal(image, chw(RGB[..., 1]).expand(3, -1, -1))


def test_one_bit():
    bits = RGB[..., 0] > 127
    assert torch.equal(read_image(encode(Image.fromarray(bits)), channels=1), chw(bits, 1))


def test_palette_is_looked_up():
    image = Image.fromarray(RGB).quantize(colors=8)
    assert torch.equal(read_image(encode(image)), chw(np.array(image.convert("RGB"))))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(mode):
    alpha = Image.fromarray(np.where(np.arange(35).reshape(5, 7) % 2, 255, 0).astype(np.uint8))
    image = Image.fromarray(RGB).convert("L" if mode == "LA" else "RGB")
    image.putalpha(alpha)
    content = encode(image)
    if mode == "P":
        palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
        palette.putpalette([10, 20, 30, 40, 50, 60])
        result = read_image(encode(palette, transparency=0))
        assert torch.equal(result[:, 0, 0], torch.ones(3))
        assert torch.allclose(result[:, 0, 1], torch.tensor([40, 50, 60]) / 255)
        return
    result = read_image(content)
    opaque = torch.from_numpy(np.array(alpha)) == 255
    assert (result[:, ~opaque] == 1).all()
    assert torch.equal(result[:, opaque], chw(np.array(image.convert("RGB")))[:, opaque])


def test_half_transparent_black_is_grey():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 51))
    assert read_image(encode(image)).sub(0.8).abs().max() < 1e-6


def test_cmyk_is_converted():
    image = Image.fromarray(RGB).resize((32, 32)).convert("CMYK")
    result = read_image(encode(image, "TIFF"))
    assert torch.equal(result, chw(np.array(image.convert("RGB"))))
    assert read_image(encode(image, "JPEG", quality=100)).sub(result).abs().mean() < 0.02


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_depth(kind):
    deep = np.random.default_rng(1).integers(0, 65536, (5, 7), dtype=np.uint16)
    content = deep_png(deep, 0) if kind == "PNG" else encode(Image.fromarray(deep), kind)
    assert torch.allclose(read_image(content, channels=1), chw(deep, 65535), atol=1e-7)
    assert read_image(content).shape == (3, 5, 7)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_colour_keeps_its_depth(channels, tmp_path):
    deep = np.random.default_rng(2).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb")
    expected = chw(deep, 65535)
    if channels == 1:
        expected = (expected * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    for source in (deep_png(deep, 2), tmp_path / "deep.tif", str(tmp_path / "deep.tif")):
        assert torch.allclose(read_image(source, channels), expected, atol=1e-6)


def test_sixteen_bit_alpha_is_composited():
    deep = np.full((2, 2, 4), 65535, dtype=np.uint16)
    deep[..., :3], deep[0, 0, 3] = 1000, 0
    result = read_image(deep_png(deep, 6))
    assert result[:, 0, 0].eq(1).all()
    assert torch.allclose(result[:, 1, 1], torch.full((3,), 1000 / 65535))


def test_floats_are_taken_as_they_are_or_refused():
    inside = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    assert torch.equal(read_image(encode(Image.fromarray(inside), "TIFF"), channels=1)[0], torch.from_numpy(inside))
    with pytest.raises(BadInput, match=r"outside \[0, 1\]"):
        read_image(encode(Image.fromarray(inside * 255), "TIFF"))
    with pytest.raises(BadInput, match=r"outside \[0, 65535\]"):
        read_image(encode(Image.fromarray(np.full((2, 2), -5, np.int32)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), np.uint8)))
    upright = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation](np.array(stored))  # fmt: skip
    content = encode(stored, "PNG", exif=exif)
    assert torch.equal(read_image(content), chw(np.ascontiguousarray(upright)))
    assert read_header(content).size == upright.shape[:2]
    deep = np.array(stored).astype(np.uint16) * 257
    turned = tifffile_with_orientation(deep, orientation)
    assert torch.allclose(read_image(turned), chw(np.ascontiguousarray(upright)), atol=1e-6)


def tifffile_with_orientation(array: np.ndarray, orientation: int) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    return buffer.getvalue()


def test_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (10, 200)]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert torch.equal(read_image(content, channels=1), torch.full((1, 4, 4), 10 / 255))


def test_path_bytes_and_encoded_agree(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(RGB)))
    assert torch.equal(read_image(path), read_image(path.read_bytes()))
    assert torch.equal(read_image(str(path)), read_image(path))


# -- what cannot be read


def bad_files() -> dict[str, tuple[bytes, str]]:
    png, jpeg = encode(Image.fromarray(RGB)), encode(Image.fromarray(RGB).resize((64, 64)), "JPEG")
    flipped = bytearray(png)
    flipped[60] ^= 0xFF  # inside the compressed pixels
    bomb = bytearray(png)
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    return {
        "empty": (b"", "empty"), "text": (b"hello, world", "no image format"),
        "cut.png": (png[:-30], "truncated"), "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "flipped": (bytes(flipped), "cannot be read"), "bomb": (bytes(bomb), "pixels"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(bad_files()))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_files_are_named_in_one_sentence(kind, tmp_path):
    content, reason = bad_files()[kind]
    path = tmp_path / f"{kind}.img"
    path.write_bytes(content)
    for source, name in ((path, str(path)), (content, f"of {len(content)} bytes")):
        with pytest.raises(BadInput) as error:
            read_image(source)
        assert name in str(error.value)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(BadInput, match=r"there is no image .*gone\.png"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(BadInput, match="is a directory"):
        read_image(tmp_path)


def test_wrong_channels():
    with pytest.raises(BadInput, match="channels=4"):
        read_image(encode(Image.fromarray(RGB)), channels=4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_header_check_finds_a_cut_file_and_keeps_a_whole_one(kind):
    whole = encode(Image.fromarray(np.kron(RGB, np.ones((20, 20, 1), np.uint8))), kind)
    assert read_header(whole).size == (100, 140)
    with pytest.raises(BadInput):
        read_header(whole[: int(len(whole) * 0.8)])


def test_header_knows_grey():
    assert read_header(encode(Image.fromarray(RGB[..., 0]))).grey
    assert not read_header(encode(Image.fromarray(RGB))).grey
    assert read_header(encode(Image.fromarray(RGB[..., 0]), "GIF")).grey


# -- size


def test_fit_covers_keeps_the_aspect_and_crops_the_centre():
    image = torch.linspace(0, 1, 40)[None, None, :].expand(3, 20, 40)
    result = fit(image, (10, 10))
    assert result.shape == (3, 10, 10)
    assert torch.allclose(result[0, 0], torch.linspace(0, 1, 40)[10:30].reshape(10, 2).mean(1), atol=1e-3)


@pytest.mark.parametrize("size", [(10, 10), (16, 9), (64, 64)])
def test_size_at_reading_is_pillows_bicubic(size):
    photo = np.kron(RGB, np.ones((9, 9, 1), np.uint8))
    height, width = photo.shape[:2]
    ratio = max(size[0] / height, size[1] / width)
    scaled = (max(size[0], round(height * ratio)), max(size[1], round(width * ratio)))
    expected = Image.fromarray(photo).resize(scaled[::-1], Image.Resampling.BICUBIC)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    expected = expected.crop((left, top, left + size[1], top + size[0]))
    image = read_image(encode(Image.fromarray(photo)), size=size)
    assert image.sub(chw(np.array(expected))).abs().max() <= 1.01 / 255


def test_large_jpeg_is_decoded_small_and_still_right():
    ramp = np.repeat(np.linspace(0, 255, 1600).astype(np.uint8)[None, :, None], 1200, 0).repeat(3, 2)
    image = read_image(encode(Image.fromarray(ramp), "JPEG", quality=95), size=(100, 100))
    whole = fit(read_array(encode(Image.fromarray(ramp), "JPEG", quality=95)), (100, 100)).float() / 255
    assert image.sub(whole).abs().max() < 0.02


def test_masks_keep_their_numbers(tmp_path):
    numbers = np.array([[0, 1, 255], [7, 11, 3]], dtype=np.uint8)
    palette = Image.fromarray(numbers, "P")
    palette.putpalette(list(range(256)) * 3)
    triple = Image.fromarray(np.repeat(numbers[..., None], 3, 2))
    for image in (Image.fromarray(numbers), palette, triple):
        assert torch.equal(read_mask(encode(image)), torch.from_numpy(numbers.astype(np.int64)))
    with pytest.raises(BadInput, match="colour image"):
        read_mask(encode(Image.fromarray(RGB)))


def test_masks_are_fitted_like_their_images():
    mask = torch.arange(24).reshape(4, 6)
    assert torch.equal(fit_nearest(mask, (4, 4)), mask[:, 1:5])
    assert torch.equal(fit_nearest(mask, (8, 12)), mask.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_reader_on_real_photos(opsin_data: Path):
    photo = next((opsin_data / "bsds500" / "test").glob("*.jpg"))
    assert torch.equal(read_image(photo), chw(np.array(Image.open(photo))))
