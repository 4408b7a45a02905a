"""`opsin.restore(...)`: photos into better photos."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from opsin.catalog import Card, Variant, create, find, list_cards, parse_spec
from opsin.errors import BadInput, OpsinError
from opsin.restore import Restorer
from opsin.restore.photo import Photo, is_image, read_photo, target_name, write_photo
from opsin.restore.tiling import MEMORY, Tick, restore_tiles

BESIDE = ".side_by_side.png"
WIDEST = 2048  # of each half of a side-by-side picture


class Restored(list[Path]):
    """The files written. skipped: unreadable files, each with the reason. there: files that were there already."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[tuple[Path, str]] = []
        self.there: list[Path] = []


@dataclass(frozen=True)
class Job:
    """What is the same for every photo of a call."""

    net: Restorer
    name: str
    force: bool
    side_by_side: bool
    tile: int | None
    max_memory: int


def restore(
    source: str | Path, *, task: str = "sr", scale: int = 2, model: str | Restorer | None = None,
    weights: str = "shipped", output: str | Path, force: bool = False, side_by_side: bool = False,
    tile: int | None = None, max_memory: int = MEMORY, device: str = "cpu", progress: bool = True,
) -> Restored:  # fmt: skip
    """Restores a photo, or every photo of a folder and its subfolders, and returns the files written.

    task, scale: what to do ("sr" enlarges by `scale`); the network that ships with weights for it is taken.
    model: a restorer of the catalogue, or one that you built, instead; then `task` and `scale` are its own.
    weights: of a model given by name: "shipped", "hub" or a file.
    output: a folder, in which photos keep their names; for a single photo also a file with an image's suffix.
    force: replace files of the output that are there; otherwise a single photo is refused, and a folder goes on with
        those that are missing.
    side_by_side: also write a picture of the plain (bicubic) and the restored photo, or of their middle parts.
    tile: the side of the tiles in pixels; by default what `max_memory` bytes allow.
    Raises BadInput: nothing to restore, an unreadable single photo, a file in the way, no network for the task.
    """
    source, output = Path(source), Path(output)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(f"there is no CUDA device here for '{device}'; take device cpu")
    net, name = _network(task, scale, model, weights)
    job = Job(net.to(device).eval(), name, force, side_by_side, tile, max_memory)
    result = Restored()
    with _bar(progress) as bar:
        if source.is_dir():
            _folder(job, source, output, result, bar)
        elif source.is_file():
            target = output if is_file_name(output) else output / source.name
            result.extend(_one(job, source, target, bar(source.name), exact_name=is_file_name(output)))
        else:
            raise BadInput(f"there is no photo or folder '{source}'")
    return result


def is_file_name(output: Path) -> bool:
    """Whether an output names a file and not a folder."""
    from opsin.restore.photo import WRITTEN

    return output.suffix.lower() in WRITTEN and not output.is_dir()


def _folder(job: Job, source: Path, output: Path, result: Restored, bar: "Bar") -> None:
    if output.resolve() == source.resolve():
        raise BadInput(f"the output folder '{output}' is the folder of the photos; choose another")
    results = output.resolve() if source.resolve() in output.resolve().parents else None
    photos = sorted(p for p in source.rglob("*") if is_image(p) and results not in p.resolve().parents)
    if not photos:
        raise BadInput(f"the folder '{source}' holds no photo")
    for i, photo in enumerate(photos, 1):
        target = output / photo.relative_to(source)
        try:
            result.extend(_one(job, photo, target, bar(f"{photo.name} ({i} of {len(photos)})")))
        except InTheWay as error:
            result.there.append(error.path)
        except OpsinError as error:
            result.skipped.append((photo, str(error)))
    if not result and not result.there:
        reason = result.skipped[0][1]
        raise BadInput(f"none of the {len(photos)} photos in '{source}' could be restored; the first: {reason}")


class InTheWay(BadInput):
    """A file of the output exists."""

    def __init__(self, path: Path):
        super().__init__(f"'{path}' exists; use --force to replace it, or -o to write elsewhere")
        self.path = path


def _one(job: Job, source: Path, target: Path, tick: Tick, *, exact_name: bool = False) -> list[Path]:
    if target.exists() and not job.force and target.resolve() != source.resolve():
        raise InTheWay(target)
    photo = read_photo(source)
    name = target_name(target.name, photo, job.net.scale)
    if exact_name and name != target.name:
        raise BadInput(f"'{target}': this format cannot hold the result of '{source}'; take .png")
    target = target.with_name(name)
    beside = target.with_name(target.name + BESIDE)
    if target.resolve() == source.resolve():
        raise BadInput(f"'{target}' is the photo itself; choose another output folder")
    for path in (target, beside) if job.side_by_side else (target,):
        if path.exists() and not job.force:
            raise InTheWay(path)
    restored = restore_photo(job.net, photo, tile=job.tile, max_memory=job.max_memory, tick=tick)
    plain = photo if job.side_by_side else None
    del photo
    write_photo(restored, target)
    if plain is None:
        return [target]
    compare(plain, restored, job.net.scale, job.name).save(beside, format="PNG")
    return [target, beside]


def restore_photo(
    net: Restorer, photo: Photo, *, tile: int | None = None, max_memory: int = MEMORY, tick: Tick | None = None
) -> Photo:
    """A photo through the network in tiles, in the photo's depth; transparency is enlarged bicubically."""
    height, width, channels = photo.pixels.shape
    out = _blank(height * net.scale, width * net.scale, channels, photo.pixels.dtype)
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    repeat = channels not in net.channels  # grey through a network for colour

    def read(rows: slice, columns: slice) -> Tensor:
        part = torch.from_numpy(photo.pixels[rows, columns].astype(np.float32)).to(device)
        part = (part / photo.top).permute(2, 0, 1)[None]
        return part.expand(-1, 3, -1, -1) if repeat else part

    def write(top: int, left: int, pixels: Tensor) -> None:
        pixels = pixels.mean(1, keepdim=True) if repeat else pixels
        levels = (pixels[0].clamp(0, 1) * photo.top).round().permute(1, 2, 0).cpu().numpy()
        out[top : top + levels.shape[0], left : left + levels.shape[1]] = levels.astype(out.dtype)

    restore_tiles(net, (height, width), read, write, tile=tile, max_memory=max_memory, tick=tick)
    return Photo(out, None if photo.alpha is None else _bicubic(photo.alpha, net.scale), photo.exif, photo.profile)


def _blank(height: int, width: int, channels: int, dtype: np.dtype) -> np.ndarray:
    try:
        return np.empty((height, width, channels), dtype)
    except MemoryError as error:
        raise BadInput(f"there is no memory for a result of {width} x {height} pixels; take a smaller photo") from error


def _bicubic(plane: np.ndarray, scale: int) -> np.ndarray:
    """One channel of 8 or 16 bits, enlarged."""
    size = (plane.shape[1] * scale, plane.shape[0] * scale)
    if plane.dtype == np.uint8:
        return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC))
    enlarged = Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(enlarged).round().clip(0, 65535).astype(np.uint16)


def compare(plain: Photo, restored: Photo, scale: int, name: str) -> Image.Image:
    """Bicubic on the left, restored on the right, each at most 2048 pixels of the middle, with a line saying which."""
    before, after = _middle(plain, WIDEST // scale, 1).upright(), _middle(restored, WIDEST // scale, scale).upright()
    before = before.resize(after.size, Image.Resampling.BICUBIC)
    line = 16
    picture = Image.new("RGB", (2 * after.width + 4, after.height + line), "white")
    for half, x, label in ((before, 0, "bicubic" if scale > 1 else "input"), (after, after.width + 4, name)):
        picture.paste(half, (x, line))
        ImageDraw.Draw(picture).text((x + 2, 2), label, fill="black")
    return picture


def _middle(photo: Photo, side: int, scale: int) -> Photo:
    """At most side x side pixels of the middle, counted in pixels of the unrestored photo."""
    edges = []
    for length in (photo.pixels.shape[0] // scale, photo.pixels.shape[1] // scale):
        start = max(0, length - side) // 2
        edges.append(slice(start * scale, (start + min(length, side)) * scale))
    return Photo(photo.pixels[edges[0], edges[1]], exif=photo.exif)


def _network(task: str, scale: int, model: str | Restorer | None, weights: str) -> tuple[Restorer, str]:
    """The network and what to call it."""
    if isinstance(model, Restorer):
        return model, type(model).__name__
    name = model if model is not None else default_model(task, scale)
    card, _ = find(parse_spec(name)[0])
    if card.kind != "restorer":
        raise BadInput(f"'{name}' is a {card.kind}, not a restorer; `opsin list --kind restorer` shows those")
    return create(name, weights=weights), name


def default_model(task: str, scale: int) -> str:
    """The shipped variant for a task and scale; a card that calls itself the default goes first. Raises BadInput."""
    choices: list[tuple[Card, Variant]] = [
        (card, variant)
        for card in sorted(list_cards("restorer"), key=lambda card: not card.facts.get("default"))
        for variant in card.variants.values()
        if variant.weights and (card.path.parent / variant.weights).is_file()
    ]
    of_task = [(c, v) for c, v in choices if c.facts.get("task") == task]
    if not of_task:
        tasks = sorted({str(card.facts.get("task")) for card, _ in choices})
        raise BadInput(f"no network ships for the task '{task}'; there are {', '.join(tasks)}")
    for _, variant in of_task:
        if variant.published.get("scale", 1) == scale:
            return variant.name
    scales = sorted({str(v.published.get("scale", 1)) for _, v in of_task})
    raise BadInput(f"no network ships for '{task}' at scale {scale}; there are scales {', '.join(scales)}")


class Bar:
    """Progress on the error stream, if somebody is looking: one line for the photo in work."""

    def __init__(self, show: bool):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.progress = Progress(console=console, transient=True, disable=not (show and console.is_terminal))
        self.line = self.progress.add_task("", total=None)

    def __call__(self, name: str) -> Tick:
        self.progress.reset(self.line, description=name, total=None)
        return lambda done, total: self.progress.update(self.line, completed=done, total=total)


@contextmanager
def _bar(show: bool) -> Iterator[Bar]:
    bar = Bar(show)
    with bar.progress:
        yield bar
