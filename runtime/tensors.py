"""Weights on disk: safetensors files, written as a stream and read by mapping.

A file is ``u64 header length | JSON header | tensor data``; the format wants the data without
holes.  The header is padded so that the data starts at a multiple of 64, and tensors are ordered by
the largest power of two that divides their size, so each is aligned at least as well as its size.

>>> [s.name for s in ordered([TensorSpec("a", "i8", (3,)), TensorSpec("b", "f32", (16,))])]
['b', 'a']
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import errors

Bytes: TypeAlias = bytes | bytearray | memoryview
Data: TypeAlias = NDArray[Any] | Bytes

ALIGN = 64

# Our name of a dtype -> its name in safetensors, and the numpy dtype that carries its bits.
DTYPES: dict[str, tuple[str, str]] = {
    "f32": ("F32", "<f4"),
    "f16": ("F16", "<f2"),
    "bf16": ("BF16", "<u2"),
    "e4m3": ("F8_E4M3", "u1"),
    "i8": ("I8", "i1"),
    "u8": ("U8", "u1"),
    "i32": ("I32", "<i4"),
    "i64": ("I64", "<i8"),
    "bool": ("BOOL", "?"),
}
_OURS = {theirs: ours for ours, (theirs, _) in DTYPES.items()}


class TensorSpec(NamedTuple):
    """A tensor before its data is there; ``dtype`` is a key of :data:`DTYPES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype][1]).itemsize


class Tensor(NamedTuple):
    """Mapped data; bf16 and e4m3 come as raw uint16 and uint8 arrays."""

    dtype: str
    array: NDArray[Any]


class Place(NamedTuple):
    """Where in which file the data of a tensor goes."""

    file: Path
    offset: int
    nbytes: int


def ordered(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order of the tensors within one file: best aligned sizes first, then by name."""
    return sorted(specs, key=lambda s: (-math.gcd(s.nbytes, ALIGN), s.name))


def split(specs: Iterable[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    """Consecutive groups of at most ``limit`` bytes (a larger tensor stands alone)."""
    group: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if group and size + spec.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(spec)
        size += spec.nbytes
    if group:
        yield group


def write_header(file: Path, specs: Sequence[TensorSpec]) -> dict[str, Place]:
    """Create ``file`` with the header for ``specs``; returns the place of each tensor's data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        span = [at, at + spec.nbytes]
        dtype = DTYPES[spec.dtype][0]
        header[spec.name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": span}
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGN)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    data = 8 + len(text)
    return {s.name: Place(file, data + header[s.name]["data_offsets"][0], s.nbytes) for s in specs}


def write_tensors(
    folder: Path,
    index: Sequence[TensorSpec],
    data: Iterable[tuple[str, Data]],
    shard_bytes: int,
    called: Callable[[int, int], str] = lambda number, count: f"shard-{number:05d}.safetensors",
) -> dict[str, str]:
    """Write the shards of ``index``, taking ``data`` in any order, one tensor in memory at a time.

    Shard ``number`` of ``count`` is ``called`` so; returns the shard of every tensor.  Raises ValueError for
    a name that is unknown, given twice or missing, or data of the wrong size.
    """
    places: dict[str, Place] = {}
    groups = list(split(index, shard_bytes))
    for number, group in enumerate(groups):
        places |= write_header(folder / called(number, len(groups)), ordered(group))
    if len(places) != len(index):
        raise ValueError("the index names a tensor twice")
    shards = {name: place.file.name for name, place in places.items()}
    for name, values in data:
        if name not in places:
            raise ValueError(f"tensor {name!r} is not in the index, or came twice")
        _write_at(places.pop(name), name, values)
    if places:
        raise ValueError(f"no data came for tensors {sorted(places)[:3]}")
    return shards


def _write_at(place: Place, name: str, values: Data) -> None:
    if isinstance(values, np.ndarray):
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    else:
        flat = np.frombuffer(values, np.uint8)
    if flat.nbytes != place.nbytes:
        raise ValueError(f"tensor {name!r} has {flat.nbytes} bytes, the index says {place.nbytes}")
    with place.file.open("r+b") as stream:
        stream.seek(place.offset)
        stream.write(flat.data)


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Read-only views of every tensor in ``file``; nothing is read until it is used.

    Raises ArtifactDamaged if the header does not describe the file.
    """
    with file.open("rb") as stream:
        try:
            raw = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            start = 8 + int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8:start])
            header.pop("__metadata__", None)
            return {name: _view(raw, start, fact) for name, fact in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise errors.ArtifactDamaged(file=str(file), reason=f"bad header: {error}") from error


def _view(raw: mmap.mmap, start: int, fact: dict[str, Any]) -> Tensor:
    first, last = fact["data_offsets"]
    dtype = _OURS[fact["dtype"]]
    carrier = np.dtype(DTYPES[dtype][1])
    count = math.prod(fact["shape"])
    if not 0 <= first <= last <= len(raw) - start or count * carrier.itemsize != last - first:
        raise ValueError("tensor offsets do not fit")
    if count == 0:
        return Tensor(dtype, np.empty(fact["shape"], carrier))
    flat = np.frombuffer(raw, carrier, count, start + first)
    return Tensor(dtype, flat.reshape(fact["shape"]))
