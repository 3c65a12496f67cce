"""Tensors of safetensors files, read one at a time.

Nothing stays open or mapped, so what a process holds is what it asked for last, however large the files.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ir.provenance import Rows

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_PIECE = 16 << 20  # bytes that are looked at together


@dataclass(frozen=True)
class Source:
    """Where the numbers of a weight are: ``like`` is a meta tensor of them.

    ``whole`` yields all, ``member`` one member of a stack, such as one expert of ``[E, N, K]``.  ``stored``
    are the parts (``int4-g32.q``) that hold the same in a format of :mod:`..ir.quant`, if they came so.
    ``files`` are meta tensors of what it is made of, by their names in the files, and ``rows`` finds out
    which row of it is where in these; None if it is computed.
    """

    like: Tensor
    whole: Callable[[], Tensor]
    member: Callable[[int], Tensor] | None = None
    stored: Mapping[str, Source] = field(default_factory=dict)
    files: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Callable[[], Rows | None] = lambda: None


class Part(NamedTuple):
    like: Tensor
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Stored:
    """A matrix as the parts of a format of :mod:`..ir.quant`, bit for bit."""

    format: str
    parts: Mapping[str, Part]


class _Entry(NamedTuple):
    file: Path
    offset: int  # of the first byte in the file
    like: Tensor


def header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors file by name, and where its data begin; ValueError if it has none."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError("the file ends inside its header")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


class Shards:
    """The tensors of several files by name."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        for file in files:
            entries, start = header(file)
            for name, entry in entries.items():
                dtype, shape, span = (entry[k] for k in ("dtype", "shape", "data_offsets"))
                like = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
                self._entries[name] = _Entry(file, start + int(span[0]), like)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        yield from self._entries

    def like(self, name: str) -> Tensor:
        """A meta tensor of the shape and dtype in the file."""
        return self._entries[name].like

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor as it is stored, or its member ``index`` along the first dim."""
        file, offset, like = self._entries[name]
        shape = like.shape if index is None else like.shape[1:]
        size = math.prod(shape) * like.itemsize
        if not size:
            return torch.empty(shape, dtype=like.dtype)
        data = _bytes(file, offset + (index or 0) * size, size)
        return torch.from_numpy(data).view(like.dtype).reshape(shape)

    def stored(self, name: str) -> Stored | None:
        """A tensor in a format of ours: none is, here."""
        return None

    def invalid(self, name: str) -> int:
        """How many NaN and Inf values a tensor holds."""
        file, offset, like = self._entries[name]
        if not like.dtype.is_floating_point:
            return 0
        found = 0
        for begin in range(0, like.nbytes, _PIECE):
            data = _bytes(file, offset + begin, min(_PIECE, like.nbytes - begin))
            found += _invalid(torch.from_numpy(data).view(like.dtype))
        return found


def _bytes(file: Path, offset: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.fromfile(file, np.uint8, size, offset=offset)


def _invalid(values: Tensor) -> int:
    if values.itemsize == 1:
        values = values.float()
    low, high = torch.aminmax(values)  # NaN if any value is, and many times faster than isfinite
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return int((~torch.isfinite(values)).sum())
