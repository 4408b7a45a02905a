"""Parquet tables of images in Hugging Face's layout: one file, or a folder of shards named after their splits.

Columns: the image (`image` or `img`: the bytes of a file, or a struct of bytes and path), and the class (`label`,
`labels`, `fine_label` or `class`: an integer or a text). Names of the classes come from the table's Hugging Face
metadata, else from classes.txt beside it. Tables of up to `IN_MEMORY` bytes are held in memory; larger ones are read by
row group when asked for (Hugging Face writes groups of 100 rows for images).
"""

import json
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from opsin.data.splits import SPLIT_NAMES, Item, Listing
from opsin.errors import BadInput

IN_MEMORY = 2 * 1024**3
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")


class Shard:
    """The encoded images of one Parquet file."""

    def __init__(self, path: Path, column: str, in_memory: bool):
        self.path, self.column = path, column
        self.rows = pq.read_table(path, columns=[column]).column(0) if in_memory else None
        metadata = pq.read_metadata(path)
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = [0, *accumulate(counts)]
        self.groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> bytes:
        if self.rows is not None:
            value = self.rows[row].as_py()
        else:
            group = bisect_right(self.starts, row) - 1
            value = self._group(group)[row - self.starts[group]].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        return value if isinstance(value, bytes) else b""

    def _group(self, group: int) -> pa.ChunkedArray:
        rows = self.groups.get(group)
        if rows is None:
            rows = pq.ParquetFile(self.path).read_row_group(group, columns=[self.column]).column(0)
            self.groups[group] = rows
            while len(self.groups) > 4:
                self.groups.pop(next(iter(self.groups)), None)
        return rows


class Row(NamedTuple):
    """The image of one row."""

    shard: Shard
    row: int

    def read_bytes(self) -> bytes:
        return self.shard[self.row]

    def __str__(self) -> str:
        return f"{self.shard.path}, row {self.row}"


def parquet(path: Path) -> Listing:
    """Lists the rows; the splits follow from the files' or their folders' names (train*, validation*, test*)."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise BadInput(f"the folder {path} holds no .parquet file")
    in_memory = sum(file.stat().st_size for file in files) <= IN_MEMORY
    home = path.parent if path.is_file() else path
    listing = Listing(path.stem, "", {})
    labels: dict[str, list[Any]] = {}
    for file in files:
        split = "" if len(files) == 1 and path.is_file() else _split_of(file, home)
        schema = _schema(file)
        image, label = _column(schema, IMAGE_COLUMNS), _column(schema, LABEL_COLUMNS)
        if image is None or not _holds_bytes(schema.field(image).type):
            raise BadInput(
                f"the table {file} has no column of image bytes ({' or '.join(IMAGE_COLUMNS)}); it has: "
                f"{', '.join(schema.names)}"
            )
        values = pq.read_table(file, columns=[label]).column(0).to_pylist() if label else None
        shard = Shard(file, image, in_memory)
        listing.splits.setdefault(split, []).extend(Item(Row(shard, row)) for row in range(len(shard)))
        labels.setdefault(split, []).extend(values if values is not None else [None] * len(shard))
        listing.classes = listing.classes or _names(schema, label)
    return _labelled(listing, labels, home, path)


def _labelled(listing: Listing, labels: dict[str, list[Any]], home: Path, path: Path) -> Listing:
    """Puts the classes into the items; a table without labels becomes one of plain images."""
    values = {value for part in labels.values() for value in part}
    if values == {None} or not values:
        listing.task = "images"
        return listing
    if None in values:
        raise BadInput(f"the table {path} has rows without a label; fill them in or take the column out")
    if all(isinstance(value, int) for value in values):
        file = home / "classes.txt"
        from_file = tuple(file.read_text(encoding="utf-8").split("\n")) if file.is_file() else ()
        names = listing.classes or tuple(line.strip() for line in from_file if line.strip())
        listing.classes = names or tuple(str(number) for number in range(max(values) + 1))
        number = {value: value for value in values}
        if min(values) < 0 or max(values) >= len(listing.classes):
            raise BadInput(f"the table {path} holds labels {min(values)} to {max(values)} for {len(names)} classes")
    else:
        listing.classes = tuple(sorted(str(value) for value in values))
        number = {value: listing.classes.index(str(value)) for value in values}
    if len(listing.classes) == 1:
        raise BadInput(f"the table {path} holds one class only ('{listing.classes[0]}'); at least two are needed")
    listing.task = "classify"
    for split, items in listing.splits.items():
        listing.splits[split] = [Item(row, number[value]) for (row, _), value in zip(items, labels[split])]
    return listing


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"the file {file} is no readable Parquet table: {' '.join(str(error).split())[:120]}") from error


def _column(schema: pa.Schema, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in schema.names), None)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _names(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """The classes' names that Hugging Face's `datasets` writes into the schema."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if not raw or not label:
        return ()
    features = json.loads(raw).get("info", {}).get("features", {})
    return tuple(features.get(label, {}).get("names") or ())


def _split_of(file: Path, home: Path) -> str:
    for part in reversed(file.relative_to(home).parts):
        word = part.lower().split("-")[0].split("_")[0].split(".")[0]
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return "train"
