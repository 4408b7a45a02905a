"""Adapters as files of a few kilobytes: codes packed into bytes, with mean and deviation of each matrix.

Per matrix: its code indices, row by row, the first in the lowest bits of a byte; then mean and standard deviation as
little-endian float32. Matrices follow each other in module order; a full-precision head comes last, as float32 weight
and bias (the layout of the files published with arXiv:2307.16867).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from opsin.adapt.quantised import codebook
from opsin.errors import BadInput


class Packed(NamedTuple):
    """One matrix: code indices, mean and standard deviation."""

    indices: Int[Tensor, "o i"]
    mean: float
    std: float

    def weight(self, bits: int) -> Tensor:
        """The matrix that the codes stand for."""
        return torch.tensor(codebook(bits))[self.indices] * self.std + self.mean


def pack(matrices: Sequence[Packed], bits: int) -> bytes:
    """The bytes of some matrices, each filling whole bytes."""
    parts = []
    for matrix in matrices:
        index = matrix.indices.flatten().numpy().astype(np.uint8)
        if len(index) % (8 // bits):
            raise BadInput(f"a matrix of {len(index)} weights does not fill whole bytes at {bits} bits")
        planes = (index[:, None] >> np.arange(bits)) & 1
        parts.append(np.packbits(planes.flatten().astype(np.uint8), bitorder="little").tobytes())
        parts.append(np.array([matrix.mean, matrix.std], "<f4").tobytes())
    return b"".join(parts)


def unpack(data: bytes, shapes: Sequence[tuple[int, int]], bits: int) -> tuple[list[Packed], bytes]:
    """Matrices of the given shapes from the front of `data`, and what is left of it. Raises BadInput: too short."""
    matrices = []
    for rows, columns in shapes:
        size = rows * columns * bits // 8
        if len(data) < size + 8:
            raise BadInput("the adapter file is too short for this model; was it made for another width or bit count?")
        planes = np.unpackbits(np.frombuffer(data[:size], np.uint8), bitorder="little").reshape(-1, bits)
        index = (planes << np.arange(bits)).sum(1).reshape(rows, columns)
        mean, std = np.frombuffer(data[size : size + 8], "<f4")
        matrices.append(Packed(torch.from_numpy(index), float(mean), float(std)))
        data = data[size + 8 :]
    return matrices, data
