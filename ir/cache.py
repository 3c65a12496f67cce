"""The KV cache: pages of token rows, one tensor per layer.

A cache is ``[pages, PAGE, row_bytes]`` uint8.  A row is one token: the values of all parts, then, four bytes
aligned, one fp32 scale per tile of the parts that have scales (INT8, and FP8 in E4M3).  Rows begin at
multiples of 16 bytes.  A latent cache has parts ``latent`` and ``rope``; grouped-query attention has ``key``
and ``value``.  Token ``j`` of sequence ``b`` is row ``j % PAGE`` of page ``block_table[b, j // PAGE]``.

>>> spec = CacheSpec("layer0", "int8", (Part("latent", 512, 128), Part("rope", 64, 64)))
>>> spec.width, spec.row_bytes
(576, 608)

A part may keep a format of its own where three bits of fraction are too few for it, as rotary keys do in an
FP8 cache of latents: 512 bytes of E4M3, 64 values of BF16 from byte 512 on, four scales from byte 640 on.

>>> mixed = CacheSpec("layer0", "fp8", (Part("latent", 512, 128), Part("rope", 64, 64, "bf16")))
>>> [(place.format, place.values, place.scales) for place in mixed.places], mixed.row_bytes
([('fp8', 0, 640), ('bf16', 512, None)], 656)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 64
ROW_ALIGN = 16  # bytes: the widest copies of a GPU move so many, from multiples of them
FORMATS = {"fp32": 4, "bf16": 2, "int8": 1, "fp8": 1}  # bytes of a value
# Formats with scales, and what they make of the number in a tile that is largest.
LARGEST = {"int8": 127.0, "fp8": 448.0}
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class Part:
    """``width`` values per token; with scales, one per ``tile`` of them (the last may be shorter).

    ``format`` is that of its values, None the cache's.
    """

    name: str
    width: int
    tile: int
    format: str | None = None

    @property
    def tiles(self) -> int:
        return -(-self.width // self.tile)


class Place(NamedTuple):
    """Where a part stands in a row: the bytes where its values begin, and its scales (None: it has none)."""

    part: Part
    format: str
    values: int
    scales: int | None

    @property
    def bytes(self) -> int:
        """Of the values."""
        return self.part.width * FORMATS[self.format]


@dataclass(frozen=True)
class CacheSpec:
    name: str
    format: str
    parts: tuple[Part, ...]

    @property
    def width(self) -> int:
        """Values per token."""
        return sum(p.width for p in self.parts)

    @property
    def places(self) -> list[Place]:
        """The parts in their order; values begin at a multiple of their size."""
        found: list[Place] = []
        scale = self.scale_offset
        for part, begin in zip(self.parts, self._begins, strict=False):
            format = part.format or self.format
            scaled = format in LARGEST
            found.append(Place(part, format, begin, scale if scaled else None))
            scale += 4 * part.tiles if scaled else 0
        return found

    @property
    def _begins(self) -> list[int]:
        """The bytes at which the values of each part begin, and those of the last one end."""
        found = [0]
        for part in self.parts:
            size = FORMATS[part.format or self.format]
            begin = _aligned(found.pop(), size)
            found += [begin, begin + part.width * size]
        return found

    @property
    def scale_offset(self) -> int:
        """Byte offset of the first scale in a row, aligned for fp32."""
        return _aligned(self._begins[-1], 4)

    @property
    def row_bytes(self) -> int:
        tiles = sum(place.part.tiles for place in self.places if place.scales is not None)
        end = self.scale_offset + 4 * tiles if tiles else self._begins[-1]
        return _aligned(end, ROW_ALIGN)


def _aligned(at: int, size: int) -> int:
    return -(-at // size) * size


class Batch(NamedTuple):
    """Which token belongs where: the metadata that makes one graph serve any ragged batch.

    ``positions [T]`` int32 within its own sequence; ``starts [B+1]`` int32: sequence ``b`` owns tokens
    ``starts[b]:starts[b+1]``, at consecutive positions; ``block_table [B, pages]`` int32.
    """

    positions: Tensor
    starts: Tensor
    block_table: Tensor


def single_sequence(tokens: int, device: torch.device | str = "cpu") -> Batch:
    """Metadata of one sequence of ``tokens`` tokens that starts at position 0."""
    pages = max(1, -(-tokens // PAGE))
    arange = torch.arange(max(tokens, pages), dtype=torch.int32, device=device)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    return Batch(arange[:tokens], starts, arange[:pages][None])


def allocate(spec: CacheSpec, pages: int) -> Tensor:
    return torch.zeros(pages, PAGE, spec.row_bytes, dtype=torch.uint8)


def encode(spec: CacheSpec, parts: list[Tensor]) -> Tensor:
    """Token rows ``[T, row_bytes]`` uint8 of parts ``[T, width]``; bytes between values and scales are 0."""
    rows = torch.zeros(len(parts[0]), spec.row_bytes, dtype=torch.uint8, device=parts[0].device)
    for place, x in zip(spec.places, parts, strict=True):
        values = x.float()
        if place.scales is not None:
            values, scale = _scaled(place, values)
            rows[:, place.scales : place.scales + 4 * place.part.tiles] = _bytes(scale)
        stored = _bytes(values.to(_DTYPES[place.format]))
        rows[:, place.values : place.values + place.bytes] = stored
    return rows


def _bytes(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _scaled(place: Place, x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers ``[T, width]`` in the range of a part's format, and the scales ``[T, tiles]`` of its tiles."""
    part, largest = place.part, LARGEST[place.format]
    tiles = torch.nn.functional.pad(x, (0, -part.width % part.tile)).unflatten(-1, (-1, part.tile))
    scale = tiles.abs().amax(-1) / largest
    q = (tiles / torch.where(scale == 0, 1.0, scale)[..., None]).clamp(-largest, largest)
    q = q.round() if place.format == "int8" else q
    return q.flatten(-2)[..., : part.width], scale


def decode(spec: CacheSpec, rows: Tensor) -> list[Tensor]:
    """fp32 parts ``[T, width]`` of token rows ``[T, row_bytes]``."""

    def read(at: int, size: int, dtype: torch.dtype) -> Tensor:
        part = rows[:, at : at + size].clone(memory_format=torch.contiguous_format)
        return part.view(dtype).float()

    found = []
    for place in spec.places:
        values = read(place.values, place.bytes, _DTYPES[place.format])
        if place.scales is not None:
            scale = read(place.scales, 4 * place.part.tiles, torch.float32)
            values = values * scale.repeat_interleave(place.part.tile, -1)[:, : place.part.width]
        found.append(values)
    return found


def write(spec: CacheSpec, cache: Tensor, batch: Batch, parts: list[Tensor]) -> None:
    """Store the step's tokens; a sequence's pages must be in its block table already."""
    rows = encode(spec, parts)
    for b in range(batch.block_table.shape[0]):
        lo, hi = int(batch.starts[b]), int(batch.starts[b + 1])
        at = batch.positions[lo:hi].long()
        cache[batch.block_table[b, at // PAGE].long(), at % PAGE] = rows[lo:hi]


def read(spec: CacheSpec, cache: Tensor, batch: Batch, sequence: int, length: int) -> list[Tensor]:
    """The first ``length`` tokens of a sequence, as fp32 parts."""
    at = torch.arange(length)
    rows = cache[batch.block_table[sequence, at // PAGE].long(), at % PAGE]
    return decode(spec, rows)
