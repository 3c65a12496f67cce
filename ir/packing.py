"""The order in which kernels read weights.

On a CPU: panels of 16 rows, inputs outermost.  A matrix ``[..., N, K]`` becomes panels
``[..., ceil(N/16), ceil(K/32) * 32 / u, 16 * u]``: for every ``u`` inputs the 16 rows of the panel stand side
by side, so a kernel that walks along K reads one stream, finds 16 outputs in the lanes of a vector, and never
sums over lanes.  ``u`` is what a multiply instruction sums per lane: 1 (fp32, fp8), 2 (bf16) or 4 (int8); of
INT4, 64 bytes hold 8 inputs of 16 rows, the first four in the low nibbles; of a codebook, one word of 32
inputs of each row.  INT8 is stored as value + 128,
for that instruction multiplies unsigned by signed bytes.  Scales ``[..., N, C]`` become
``[..., ceil(N/16), C, 16]`` (INT8: C = 1).  Rows and inputs that do not exist are zeros.  Where ``N`` is
several ``parts`` (gate and up), a panel of the first is followed by that of the second which holds the same
rows, for a kernel needs both at once.

On a GPU: as :mod:`ir.quant` has it, except INT4.  There 64 bytes hold 128 inputs of a row, the first 64 in
the low nibbles and the others in the high ones (:func:`pack_halves`), so that neither half of a tile has to
be interleaved with the other.

>>> fmt = quant.parse("int8")
>>> parts = pack(quant.quantize(torch.eye(3, 5), fmt), fmt)
>>> {name: tuple(part.shape) for name, part in parts.items()}
{'q': (1, 8, 64), 'scale': (1, 1, 16)}
>>> parts["q"][0, 0, :9].tolist()  # inputs 0-3 of row 0, of row 1, the first of row 2
[255, 128, 128, 128, 128, 255, 128, 128, 128]
>>> torch.equal(quant.dequantize(unpack(parts, fmt, 3, 5), fmt, 5), torch.eye(3, 5))
True
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import quant

PANEL = 16  # rows that stand side by side
STEP = 32  # a row's inputs are padded to a multiple of this, one group of rounded activations
CHUNK = 128  # inputs of a row whose INT4 values stand together on a GPU

_UNITS = {"fp32": 1, "fp8": 1, "bf16": 2, "int8": 4}


def pack(weight: Mapping[str, Tensor], fmt: quant.Format, parts: int = 1) -> dict[str, Tensor]:
    """A quantized weight (:mod:`ir.quant`) as panels."""
    rows = next(iter(weight.values())).shape[-2]
    return {name: pack_part(name, part, fmt, rows, parts) for name, part in weight.items()}


def pack_part(name: str, part: Tensor, fmt: quant.Format, rows: int, parts: int = 1) -> Tensor:
    """One of the tensors of a weight of ``rows`` rows as panels."""
    if name == "scale":
        if fmt.name == "int8":
            part = part[..., None]
        if fmt.name == "fp8":
            part = part.repeat_interleave(quant.FP8_BLOCK, -2)[..., :rows, :]
        return _panels(part, 1, 0, parts, step=1)
    if isinstance(fmt, quant.Codebook):
        return _panels(part, 1, 0, parts, step=fmt.bits)
    if fmt.group:
        nibbles = torch.stack((part & 15, part >> 4), -1).flatten(-2)
        low, high = _panels(nibbles, 8, 8, parts).unflatten(-1, (PANEL, 2, 4)).unbind(-2)
        return (low | (high << 4)).flatten(-2).contiguous()
    if fmt.name == "int8":
        return _panels((part.short() + 128).to(torch.uint8), 4, 128, parts)
    if fmt.name == "fp8":
        return _panels(part.view(torch.uint8), 1, 0, parts).view(part.dtype)
    return _panels(part, _UNITS[fmt.name], 0, parts)


def pack_halves(q: Tensor) -> Tensor:
    """INT4 values ``[..., N, ceil(K/2)]`` as ``[..., N, ceil(K/128) * 64]``, padded with nibbles 8 (zero).

    >>> pack_halves(torch.tensor([[0x21, 0x43]], dtype=torch.uint8))[0, :5].tolist()  # inputs 1 2 3 4
    [129, 130, 131, 132, 136]
    """
    nibbles = torch.stack((q & 15, q >> 4), -1).flatten(-2)
    chunks = F.pad(nibbles, (0, -nibbles.shape[-1] % CHUNK), value=8).unflatten(
        -1, (-1, 2, CHUNK // 2)
    )
    low, high = chunks.unbind(-2)
    return (low | (high << 4)).flatten(-2).contiguous()


def unpack_halves(q: Tensor, k: int) -> Tensor:
    """The inverse of :func:`pack_halves` for a row of ``k`` inputs."""
    chunks = q.unflatten(-1, (-1, CHUNK // 2))
    nibbles = torch.stack((chunks & 15, chunks >> 4), -2).flatten(-3)[..., : k + k % 2]
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous()


def unpack(
    weight: Mapping[str, Tensor], fmt: quant.Format, n: int, k: int, parts: int = 1
) -> dict[str, Tensor]:
    """A weight ``[..., parts * n, k]`` as :mod:`ir.quant` has it."""
    return {name: _unpack_part(name, part, fmt, n, k, parts) for name, part in weight.items()}


def _unpack_part(name: str, part: Tensor, fmt: quant.Format, n: int, k: int, parts: int) -> Tensor:
    if name == "scale":
        rows = _rows(part, 1, n, part.shape[-2], parts)
        if fmt.name == "int8":
            return rows[..., 0]
        return rows[..., :: quant.FP8_BLOCK, :] if fmt.name == "fp8" else rows
    if isinstance(fmt, quant.Codebook):
        return _rows(part, 1, n, part.shape[-2], parts)
    if fmt.group:
        halves = part.unflatten(-1, (PANEL, 4))
        values = torch.stack((halves & 15, halves >> 4), -2).flatten(-3)
        rows = _rows(values, 8, n, k + k % 2, parts)
        return rows[..., 0::2] | (rows[..., 1::2] << 4)
    if fmt.name == "int8":
        return (_rows(part, 4, n, k, parts).short() - 128).to(torch.int8)
    if fmt.name == "fp8":
        return _rows(part.view(torch.uint8), 1, n, k, parts).view(part.dtype)
    return _rows(part, _UNITS[fmt.name], n, k, parts)


def _panels(values: Tensor, unit: int, zero: int, parts: int, step: int = STEP) -> Tensor:
    """``[..., N, K]`` as ``[..., ceil(N/parts/16) * parts, K/unit, 16 * unit]``, padded with ``zero``."""
    values = values.unflatten(-2, (parts, -1))
    n, k = values.shape[-2:]
    values = F.pad(values, (0, -k % step, 0, -n % PANEL), value=zero)
    blocks = values.unflatten(-1, (-1, unit)).unflatten(
        -3, (-1, PANEL)
    )  # part, panel, row, k, unit
    panels = blocks.transpose(-3, -2).transpose(-5, -4)  # panel, part, k, row, unit
    return panels.flatten(-2).flatten(-4, -3).contiguous()


def _rows(panels: Tensor, unit: int, n: int, k: int, parts: int) -> Tensor:
    """The inverse of :func:`_panels`, without the padding: ``[..., parts * n, k]``."""
    blocks = panels.unflatten(-1, (PANEL, unit)).unflatten(-4, (-1, parts))
    rows = blocks.transpose(-5, -4).transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :n, :k]
    return rows.flatten(-3, -2).contiguous()
