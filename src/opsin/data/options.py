"""What `opsin.data.open` takes besides the source, checked before anything is read."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from opsin.errors import BadInput, UnknownName

KINDS = ("classes", "images", "parquet", "masks", "coco", "voc", "pairs", "video")


@dataclass(frozen=True)
class Options:
    """What `open` takes besides the source.

    kind: the layout, one of `KINDS`, where it should not be found from the path.
    channels: 1 or 3; by default 1 if every image is grey.
    size: (height, width) or one number: scale and centre-crop images (and masks) to it.
    limit: at most so many samples of each split, chosen by a fixed permutation.
    degrade: makes restoration data of clean images: "bicubic:3", "noise:25", ... (see `opsin.data.degrade`).
    crop: random square crops of the training split (side in pixels, of the clean image where there are pairs).
    images: the folder that COCO's file names refer to.
    ignore: the number in masks that stands for no class.
    stride: every how many frames of a video.
    """

    kind: str | None = None
    channels: int | None = None
    size: int | tuple[int, int] | None = None
    limit: int | None = None
    degrade: str | None = None
    crop: int | None = None
    images: str | Path | None = None
    ignore: int | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        if self.channels not in (None, 1, 3):
            raise BadInput(f"channels={self.channels!r}: images have 1 channel (grey) or 3 (RGB)")
        if self.kind is not None and self.kind not in KINDS:
            raise UnknownName("kind of data", self.kind, KINDS)
        for name in ("limit", "crop", "stride"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise BadInput(f"{name}={value!r}: a whole number of at least 1 is needed")
        sides = (self.size,) if not isinstance(self.size, tuple) else self.size
        if self.size is not None and not (len(sides) in (1, 2) and all(isinstance(s, int) and s > 0 for s in sides)):
            raise BadInput(f"size={self.size!r}: give one side or (height, width), in pixels")

    @property
    def shape(self) -> tuple[int, int] | None:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Options":
        """From keyword arguments. Raises UnknownName for one that is none of the fields."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise UnknownName("option of data", name, known)
        return cls(**given)
