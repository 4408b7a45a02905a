"""Predicting: images through an exported file or a run, to labels with probabilities."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsin._verbs import make_callable
from opsin.data.images import SUFFIXES, read_image
from opsin.deploy.facts import Facts
from opsin.deploy.runner import Runner, open_runner
from opsin.errors import BadInput


@dataclass(frozen=True)
class Prediction:
    """One image. top: classes with their probabilities, best first."""

    file: str
    top: tuple[tuple[str, float], ...]

    @property
    def label(self) -> str:
        return self.top[0][0]

    @property
    def probability(self) -> float:
        return self.top[0][1]


@dataclass
class Predictions:
    """What was predicted, and the files that could not be read, each with the reason."""

    rows: list[Prediction]
    skipped: list[tuple[str, str]]
    facts: Facts = field(default_factory=Facts)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        images = [
            {"file": row.file, "label": row.label, "probability": row.probability, "top": dict(row.top)}
            for row in self.rows
        ]
        return {
            "model": self.facts.name,
            "images": images,
            "skipped": [{"file": f, "reason": r} for f, r in self.skipped],
        }

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes `.csv` (file, label, probability, then the runners-up) or `.json`. Raises BadInput."""
        path = Path(path)
        check_output(path, force)
        if path.suffix.lower() == ".json":
            path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            return path
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            places = max((len(row.top) for row in self.rows), default=1)
            more = [f"{name}_{place}" for place in range(2, places + 1) for name in ("label", "probability")]
            writer.writerow(["file", "label", "probability", *more])
            writer.writerows(
                [row.file, *(cell for label, p in row.top for cell in (label, f"{p:.6f}"))] for row in self.rows
            )
        return path


def check_output(path: Path, force: bool) -> None:
    """Raises BadInput where predictions cannot be written to this path."""
    if path.suffix.lower() not in (".csv", ".json"):
        raise BadInput(f"'{path}' does not say the format; end it in .csv or .json")
    if path.exists() and not force:
        raise BadInput(f"'{path}' exists already; use --force to replace it, or another name")
    if not path.parent.is_dir():
        raise BadInput(f"there is no folder '{path.parent}' to write '{path.name}' in; make it first")


def predict(
    source: str | Path | Sequence[str | Path],
    model: str | Path | Any,
    *,
    top: int = 3,
    batch_size: int = 64,
    progress: bool = False,
) -> Predictions:
    """Classifies images.

    source: an image, a folder (searched through), or a list of these.
    model: an `.onnx` or `.pt2` file that `export` wrote, a run or its folder, or an opened `Runner`.
    top: how many classes to keep for each image.
    Images are scaled to cover the model's input and cropped at the centre, as in training. Unreadable ones are left out
    and listed in `skipped`. Raises BadInput (no images, all unreadable, not a classifier), MissingExtra.
    """
    runner = model if hasattr(model, "facts") and callable(model) else open_runner(model)
    facts = runner.facts
    if facts.task != "classify":
        what = f"is for the task '{facts.task}'" if facts.task else "has no task"
        raise BadInput(f"predict labels images with a classifier, and '{facts.name or model}' {what}")
    if 0 in facts.size:
        raise BadInput(f"'{facts.name}' was trained on images of many sizes; export it with --input, and use that file")
    if top < 1:
        raise BadInput(f"--top is {top}; it must be at least 1")
    files = list(_files([source] if isinstance(source, str | os.PathLike) else source))
    found = Predictions([], [], facts)
    queue = iter(_progress(files, progress))
    while chunk := list(islice(queue, batch_size)):
        _add(found, runner, chunk, top)
    if not found.rows:
        raise BadInput(f"none of the {len(files)} images can be read; the first: {found.skipped[0][1]}")
    return found


def _add(found: Predictions, runner: Runner, files: Iterable[Path], top: int) -> None:
    facts, images, names = runner.facts, [], []
    for file in files:
        try:
            images.append(read_image(file, facts.channels, size=facts.size))
            names.append(str(file))
        except BadInput as error:
            found.skipped.append((str(file), str(error)))
    if images:
        found.rows += [Prediction(n, t) for n, t in zip(names, _best(runner(torch.stack(images)), facts, top))]


def _best(logits: Tensor, facts: Facts, top: int) -> Iterator[tuple[tuple[str, float], ...]]:
    values, indices = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    for probabilities, classes in zip(values.tolist(), indices.tolist()):
        yield tuple((facts.label(c), p) for c, p in zip(classes, probabilities))


def _files(sources: Iterable[str | Path]) -> Iterator[Path]:
    """Image files: those that are named, whatever their suffix, and those below folders by suffix."""
    for source in map(Path, sources):
        if source.is_dir():
            inside = [p for p in sorted(source.rglob("*")) if p.is_file() and p.suffix.lower() in SUFFIXES]
            if not inside:
                raise BadInput(f"the folder '{source}' holds no images")
            yield from inside
        elif source.is_file():
            yield source
        else:
            raise BadInput(f"there is no image or folder '{source}'")


def _progress(files: list[Path], show: bool) -> Iterable[Path]:
    if not show:
        return files
    from rich.console import Console
    from rich.progress import track

    return track(files, description="predicting", console=Console(stderr=True), transient=True)


make_callable(__name__)
