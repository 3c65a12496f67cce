"""The KV cache: pages of token rows, one tensor per layer.

A cache is ``[pages, PAGE, row_bytes]`` uint8.  A row is one token: the values of all parts, then (INT8)
one fp32 scale per tile of a part.  A latent cache has parts ``latent`` and ``rope``; grouped-query
attention has ``key`` and ``value``.  Token ``j`` of sequence ``b`` is row ``j % PAGE`` of page
``block_table[b, j // PAGE]``.

>>> spec = CacheSpec("layer0", "int8", (Part("latent", 512, 128), Part("rope", 64, 64)))
>>> spec.width, spec.row_bytes
(576, 596)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 64
FORMATS = {"fp32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Part:
    """``width`` values per token; INT8 has one scale per ``tile`` of them (the last may be shorter)."""

    name: str
    width: int
    tile: int

    @property
    def tiles(self) -> int:
        return -(-self.width // self.tile)


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
    def scale_offset(self) -> int:
        """Byte offset of the first scale in a row (INT8 only), aligned for fp32."""
        return -(-self.width // 4) * 4

    @property
    def row_bytes(self) -> int:
        if self.format == "int8":
            return self.scale_offset + 4 * sum(p.tiles for p in self.parts)
        return self.width * FORMATS[self.format]


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
    """Token rows ``[T, row_bytes]`` uint8 of parts ``[T, width]``."""
    match spec.format:
        case "fp32":
            return torch.cat([p.float() for p in parts], -1).contiguous().view(torch.uint8)
        case "bf16":
            return torch.cat([p.bfloat16() for p in parts], -1).contiguous().view(torch.uint8)
    values, scales = [], []
    for part, x in zip(spec.parts, parts, strict=True):
        tiles = torch.nn.functional.pad(x.float(), (0, -part.width % part.tile))
        tiles = tiles.unflatten(-1, (-1, part.tile))
        scale = tiles.abs().amax(-1) / 127.0
        q = (tiles / torch.where(scale == 0, 1.0, scale)[..., None]).round().clamp(-127, 127)
        values.append(q.to(torch.int8).flatten(-2)[..., : part.width])
        scales.append(scale)
    gap = values[0].new_zeros(values[0].shape[0], spec.scale_offset - spec.width)
    packed = torch.cat([*values, gap], -1).view(torch.uint8)
    return torch.cat([packed, torch.cat(scales, -1).contiguous().view(torch.uint8)], -1)


def decode(spec: CacheSpec, rows: Tensor) -> list[Tensor]:
    """fp32 parts ``[T, width]`` of token rows ``[T, row_bytes]``."""
    widths = [p.width for p in spec.parts]
    rows = rows.contiguous()
    if spec.format != "int8":
        dtype = torch.float32 if spec.format == "fp32" else torch.bfloat16
        return list(rows.view(dtype).float().split(widths, -1))
    values = rows[:, : spec.width].contiguous().view(torch.int8).float().split(widths, -1)
    scales = rows[:, spec.scale_offset :].contiguous().view(torch.float32)
    per_part = scales.split([p.tiles for p in spec.parts], -1)
    return [
        v * s.repeat_interleave(p.tile, -1)[:, : p.width]
        for p, v, s in zip(spec.parts, values, per_part, strict=True)
    ]


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
