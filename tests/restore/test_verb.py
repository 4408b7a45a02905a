"""Restoring files: names, formats, transparency, orientation, profiles, depth, folders, and what is refused."""

import io
import subprocess
import sys

import av
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps
from skimage import data
from torch.nn import functional as F

from opsin.cli import run
from opsin.errors import BadInput, UnknownName
from opsin.restore import Restorer
from opsin.restore.photo import Photo, read_photo, target_name, write_photo
from opsin.restore.tiling import restore_tiles
from opsin.restore.verb import compare, default_model, restore, restore_photo


class Twice(Restorer):
    """Every pixel four times: the result is known exactly, whatever the tiles."""

    scale, receptive_field = 2, 0

    def forward(self, x):
        return F.interpolate(x, scale_factor=2)


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(data.astronaut()[:60, :90])


def twice(array):
    return array.repeat(2, 0).repeat(2, 1)


def upright(path):
    """The pixels as a viewer shows them; from memory, since Pillow maps turned TIFF files wrongly."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return np.asarray(ImageOps.exif_transpose(image))


def once(source, folder, **options):
    """Restores one file and returns the path of the result."""
    return restore(source, model=Twice(), output=folder / "out", tile=32, progress=False, **options)[0]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp", "a.ppm", "b.JPEG"])
def test_name_and_format_stay(tmp_path, photo, name):
    photo.save(tmp_path / name)
    path = once(tmp_path / name, tmp_path)
    assert path == tmp_path / "out" / name
    with Image.open(path) as result, Image.open(tmp_path / name) as source:
        assert (result.size, result.mode, result.format) == ((180, 120), "RGB", source.format)
        lossy = source.format in ("JPEG", "WEBP")
        error = np.abs(np.asarray(result).astype(int) - twice(np.asarray(source)))
        assert error.mean() < (3 if lossy else 1e-9)


def test_formats_that_cannot_hold_the_result_become_png(tmp_path, photo):
    photo.quantize(32).save(tmp_path / "a.gif")
    path = once(tmp_path / "a.gif", tmp_path)
    assert path.name == "a.gif.png"
    with pytest.raises(BadInput, match="exists"):
        once(tmp_path / "a.gif", tmp_path)
    expected = twice(np.asarray(Image.open(tmp_path / "a.gif").convert("RGB")))
    assert np.array_equal(np.asarray(Image.open(path)), expected)
    pixels = np.zeros((4, 9000, 3), np.uint8)
    assert target_name("wide.webp", Photo(pixels), 2) == "wide.webp.png"
    assert target_name("wide.jpg", Photo(pixels), 2) == "wide.jpg"
    assert target_name("a.jpg", Photo(pixels, pixels[..., 0]), 2) == "a.jpg.png"
    assert target_name("a.pgm", Photo(pixels), 2) == "a.pgm.png"
    assert target_name("a.bmp", Photo(pixels.astype(np.uint16)), 2) == "a.bmp.png"


def test_alpha_is_enlarged_bicubically(tmp_path, photo):
    alpha = Image.linear_gradient("L").resize(photo.size)
    image = photo.copy()
    image.putalpha(alpha)
    image.save(tmp_path / "a.png")
    with Image.open(once(tmp_path / "a.png", tmp_path)) as result:
        assert result.mode == "RGBA"
        expected = alpha.resize((180, 120), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(result.getchannel("A")), np.asarray(expected))
        assert np.array_equal(np.asarray(result)[..., :3], twice(np.asarray(photo)))


def test_palette_with_transparency(tmp_path, photo):
    image = photo.quantize(16)
    image.info["transparency"] = 3
    image.save(tmp_path / "a.png", transparency=3)
    with Image.open(once(tmp_path / "a.png", tmp_path)) as result:
        assert result.mode == "RGBA" and {0, 255} <= set(np.asarray(result)[..., 3].ravel().tolist())


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_stays_grey(tmp_path, photo, mode):
    image = photo.convert("L").convert(mode)
    if mode == "LA":
        image.putalpha(100)
    image.save(tmp_path / "a.png")
    with Image.open(once(tmp_path / "a.png", tmp_path)) as result:
        assert result.mode == ("LA" if mode == "LA" else "L")
        expected = np.asarray(image.convert("L") if mode != "LA" else image.getchannel("L"))
        assert np.array_equal(np.asarray(result.getchannel(0)), twice(expected))


def test_cmyk_becomes_rgb(tmp_path, photo):
    photo.convert("CMYK").save(tmp_path / "a.jpg", icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 200)
    with Image.open(once(tmp_path / "a.jpg", tmp_path)) as result:
        assert result.mode == "RGB" and "icc_profile" not in result.info


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_deep_grey_keeps_its_depth_and_place(tmp_path, name, orientation):
    values = (np.arange(20 * 30).reshape(20, 30) * 109).astype(np.uint16)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(values).save(tmp_path / name, exif=exif)
    path = once(tmp_path / name, tmp_path)
    assert np.array_equal(upright(path), twice(upright(tmp_path / name)))
    if name == "a.png":
        with Image.open(path) as result:
            assert np.array_equal(np.asarray(result), twice(values))
            assert result.getexif().get(274, 1) == orientation


def deep_png(path, values):
    """A 16-bit colour PNG, written by FFmpeg."""
    pixel = "rgb48be" if values.shape[2] == 3 else "rgba64be"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *values.shape[:2], pixel
        frame = av.VideoFrame.from_ndarray(values, format=pixel)
        container.mux(stream.encode(frame) + stream.encode(None))


def deep_read(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray()


@pytest.mark.parametrize("channels", [3, 4])
def test_deep_colour_png(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 65536, (150, 20, channels)).astype(np.uint16)
    deep_png(tmp_path / "a.png", values)
    path = once(tmp_path / "a.png", tmp_path)
    result = deep_read(path)
    assert np.array_equal(result[..., :3], twice(values[..., :3]))
    assert channels == 3 or np.abs(result[::2, ::2, 3].astype(int) - values[..., 3]).mean() < 20_000
    with Image.open(path) as again:
        again.load()
        assert np.abs(np.asarray(again)[..., :3].astype(int) - twice(values[..., :3] >> 8)).max() <= 1


def test_deep_colour_tiff_with_orientation_and_profile(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    values = np.random.default_rng(0).integers(0, 65536, (25, 20, 3)).astype(np.uint16)
    tags = [(274, 3, 1, 6, True)]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", iccprofile=profile, extratags=tags)
    path = once(tmp_path / "a.tif", tmp_path)
    assert np.array_equal(tifffile.imread(path), twice(values))
    with Image.open(path) as result:
        assert result.getexif()[274] == 6 and result.info["icc_profile"] == profile


def test_deep_png_keeps_orientation_and_profile(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[274] = 8
    values = np.random.default_rng(0).integers(0, 65536, (70, 20, 3)).astype(np.uint16)
    path = write_photo(Photo(values, exif=exif, profile=profile), tmp_path / "a.png")
    again = read_photo(path)
    assert np.array_equal(again.pixels, values) and again.exif[274] == 8 and again.profile == profile


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_orientation_record_and_profile_stay(tmp_path, photo, name):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[274], exif[271] = 6, "Maker"
    exif.get_ifd(0x8769)[0x829D] = 2.8
    exif.get_ifd(0x8769)[0xA002] = 90
    photo.save(tmp_path / name, exif=exif, icc_profile=profile)
    path = once(tmp_path / name, tmp_path)
    with Image.open(path) as result:
        record = result.getexif()
        assert record[271] == "Maker" and (record.get(274) == 6 or name == "a.tif")
        if name != "a.tif":  # Pillow writes no sub-record into TIFF files
            assert float(record.get_ifd(0x8769)[0x829D]) == pytest.approx(2.8)
        assert 0xA002 not in record.get_ifd(0x8769)
        assert result.info["icc_profile"] == profile
    error = np.abs(upright(path).astype(int) - twice(upright(tmp_path / name)))
    assert upright(path).shape == (180, 120, 3) and error.mean() < 3


def test_folder_keeps_structure_names_and_goes_on(tmp_path, photo, capfd):
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    photo.save(folder / "a.png")
    photo.save(folder / "deeper" / "b.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("not a photo")
    out = folder / "larger"  # inside the source: must not be restored in its turn
    result = restore(folder, model=Twice(), output=out, progress=False)
    assert list(result) == [out / "a.png", out / "deeper" / "b.png"]
    assert [path.name for path, _ in result.skipped] == ["broken.png"] and "broken.png" in result.skipped[0][1]
    (out / "a.png").unlink()
    again = restore(folder, model=Twice(), output=out, progress=False)
    assert list(again) == [out / "a.png"] and again.there == [out / "deeper" / "b.png"]


def test_nothing_is_overwritten(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    path = once(tmp_path / "a.png", tmp_path)
    path.write_bytes(b"mine")
    with pytest.raises(BadInput, match="--force"):
        once(tmp_path / "a.png", tmp_path)
    assert path.read_bytes() == b"mine"
    once(tmp_path / "a.png", tmp_path, force=True)
    assert Image.open(path).size == (180, 120)
    before = (tmp_path / "a.png").read_bytes()
    for output in (tmp_path, tmp_path / "a.png"):
        with pytest.raises(BadInput):
            restore(tmp_path / "a.png", model=Twice(), output=output, force=True, progress=False)
    with pytest.raises(BadInput, match="another"):
        restore(tmp_path, model=Twice(), output=tmp_path, force=True, progress=False)
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_failed_write_leaves_nothing(tmp_path, photo):
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.raises(BadInput, match="cannot be written"):
        write_photo(Photo(np.asarray(photo)), tmp_path / "file" / "a.png")
    photo.save(tmp_path / "a.png")
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    with pytest.raises(BadInput):
        once(tmp_path / "a.png", tmp_path, force=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


def test_single_photo_to_a_named_file(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    target = tmp_path / "deep" / "large.jpg"
    assert restore(tmp_path / "a.png", model=Twice(), output=target, progress=False) == [target]
    assert Image.open(target).format == "JPEG"
    photo.convert("RGBA").point(lambda v: v // 2).save(tmp_path / "b.png")
    with pytest.raises(BadInput, match=r"take \.png"):
        restore(tmp_path / "b.png", model=Twice(), output=tmp_path / "b.jpg", progress=False)


def test_side_by_side(tmp_path, photo):
    exif = Image.Exif()
    exif[274] = 6
    photo.save(tmp_path / "a.png", exif=exif)
    paths = restore(tmp_path / "a.png", model=Twice(), output=tmp_path / "out", side_by_side=True, progress=False)
    assert [p.name for p in paths] == ["a.png", "a.png.side_by_side.png"]
    picture = np.asarray(Image.open(paths[1]))
    assert picture.shape == (180 + 16, 2 * 120 + 4, 3)
    upright = photo.transpose(Image.Transpose.ROTATE_270)
    bicubic = np.asarray(upright.resize((120, 180), Image.Resampling.BICUBIC))
    assert np.array_equal(picture[16:, :120], bicubic)
    assert np.array_equal(picture[16:, 124:], twice(np.asarray(upright)))
    paths[0].unlink()
    with pytest.raises(BadInput, match="side_by_side"):
        restore(tmp_path / "a.png", model=Twice(), output=tmp_path / "out", side_by_side=True, progress=False)
    assert not paths[0].exists()


def test_side_by_side_of_a_large_photo_is_its_middle():
    pixels = np.arange(3000 * 10, dtype=np.uint32).reshape(3000, 10, 1).astype(np.uint8)
    picture = compare(Photo(pixels), Photo(twice(pixels)), 2, "net")
    assert picture.size == (44, 2048 + 16)
    assert np.array_equal(np.asarray(picture)[16:, 24:, 0], twice(pixels[988:2012])[..., 0])


def test_grey_goes_through_a_colour_network():
    class Colour(Twice):
        channels = (3,)

        def forward(self, x):
            assert x.shape[1] == 3
            return super().forward(x)

    values = np.arange(200, dtype=np.uint8).reshape(10, 20, 1)
    assert np.array_equal(restore_photo(Colour(), Photo(values)).pixels, twice(values))


def test_the_verb_agrees_with_the_network(tmp_path, photo):
    from opsin.restore.espcn import ESPCN

    photo.save(tmp_path / "a.png")
    net = ESPCN(2).eval()
    path = restore(tmp_path / "a.png", model=net, output=tmp_path / "out", tile=16, progress=False)[0]
    x = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = (net(x)[0] * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(path)).astype(int) - expected).max() <= 1  # a rounding at .5 may differ
    assert (np.asarray(Image.open(path)) != expected).mean() < 1e-3


def test_choosing_a_network():
    assert default_model("sr", 3) == "espcn_x3"
    with pytest.raises(BadInput, match="scales 2, 3, 4"):
        default_model("sr", 7)
    with pytest.raises(BadInput, match="task 'paint'"):
        default_model("paint", 2)
    with pytest.raises(UnknownName):
        restore(".", model="espcm_x2", output="x")


def test_command_line(tmp_path, photo, capsys):
    photo.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    out = str(tmp_path / "out")
    assert run(["restore", str(tmp_path), "--scale", "3", "-o", out, "--max-memory", "64M"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "out" / "a.png")
    assert "b.png" in printed.err and "1 skipped" in printed.err
    assert Image.open(tmp_path / "out" / "a.png").size == (270, 180)
    assert run(["restore", str(tmp_path / "a.png"), "-o", out]) == 2
    assert "--force" in capsys.readouterr().err
    for wrong in (["nothing.png"], [str(tmp_path / "b.png")], [str(tmp_path), "--max-memory", "much"],
                  [str(tmp_path), "--scale", "9"], [str(tmp_path / "a.png"), "--tile", "3", "--force"],
                  [str(tmp_path), "--model", "nonsense"]):  # fmt: skip
        assert run(["restore", *wrong, "-o", out]) == 2, wrong
        err = capsys.readouterr().err
        assert err.startswith("opsin: ") and "Traceback" not in err


def test_progress_counts_every_tile():
    seen = []
    net, x = Twice(), torch.rand(1, 1, 40, 70)
    restore_tiles(net, (40, 70), lambda r, c: x[..., r, c], lambda *_: None, tile=20, tick=lambda *n: seen.append(n))
    assert seen == [(i, 8) for i in range(1, 9)]


@pytest.mark.slow
def test_a_photo_of_24_megapixels_takes_less_than_two_gigabytes(tmp_path):
    """From file to file, in a process of its own: interpreter, PyTorch, decoder and encoder included."""
    pattern = np.tile(data.astronaut(), (8, 12, 1))[:4000, :6000]
    Image.fromarray(pattern).save(tmp_path / "large.jpg")
    code = (
        "import resource, sys; from opsin.cli import run; code = run(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "restore", str(tmp_path / "large.jpg"), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 2e9
    with Image.open(tmp_path / "out" / "large.jpg") as result:
        assert result.size == (12_000, 8_000)
