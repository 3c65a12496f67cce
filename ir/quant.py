"""Weight formats: what each stores, and how to get the numbers back.

A weight is ``[..., N, K]``: ``N`` output channels, ``K`` inputs, any leading dims (experts).  A format
turns it into *parts*, plain tensors with a fixed layout:

==========  ==============================================  ===================================
format      values                                          scale
==========  ==============================================  ===================================
fp32, bf16  ``w  [..., N, K]``                              none
int8        ``q  [..., N, K]`` int8                         fp32 ``[..., N]``
int4-gG     ``q  [..., N, ceil(K/2)]`` uint8                bf16 ``[..., N, ceil(K/G)]``
fp8         ``q  [..., N, K]`` float8_e4m3fn                fp32 ``[..., ceil(N/128), ceil(K/128)]``
==========  ==============================================  ===================================

INT4 stores ``value + 8``, the element with the even index in the low nibble; the last group of a row
may be shorter than G, and an odd K is padded with one zero (nibble 8).

Kernels on a CPU multiply in the arithmetic of the weight: BF16 weights with inputs rounded to BF16, INT8 and
INT4 weights with inputs rounded to INT8, one scale per 32 of them and token (:func:`round_inputs`).

>>> w = torch.tensor([[-8.0, 7.0, 2.0]])
>>> parts = quantize(w, parse("int4-g32"))
>>> [f"{byte:02x}" for byte in parts["q"][0].tolist()], parts["scale"].tolist()
(['f0', '8a'], [[1.0]])
>>> dequantize(parts, parse("int4-g32"), 3).tolist()
[[-8.0, 7.0, 2.0]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_BLOCK = 128
FP8_MAX = 448.0
INPUT_GROUP = 32
_ROWS = (
    64 * FP8_BLOCK
)  # of a large matrix that are rounded together, so that temporaries stay small


@dataclass(frozen=True)
class Format:
    """A weight format; ``group`` counts inputs that share one scale (INT4), 0 where it does not apply."""

    name: str
    bits: int
    group: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        return ("w",) if self.bits >= 16 else ("q", "scale")

    def bytes(self, n: int, k: int) -> int:
        """Stored bytes of one ``[n, k]`` matrix, scales included."""
        match self.name:
            case "fp32" | "bf16":
                return n * k * self.bits // 8
            case "int8":
                return n * k + 4 * n
            case "fp8":
                return n * k + 4 * -(-n // FP8_BLOCK) * -(-k // FP8_BLOCK)
            case _:
                return n * -(-k // 2) + 2 * n * -(-k // self.group)


_FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 32),
        Format("bf16", 16),
        Format("int8", 8),
        Format("fp8", 8),
        *(Format(f"int4-g{g}", 4, g) for g in (32, 64, 128)),
    )
}
NAMES = tuple(_FORMATS)


@lru_cache(maxsize=64)
def parse(name: str) -> Format:
    """A format by name; raises ValueError with the known names."""
    if name not in _FORMATS:
        raise ValueError(f"unknown weight format {name!r}: one of {', '.join(_FORMATS)}")
    return _FORMATS[name]


def quantize(w: Tensor, fmt: Format) -> dict[str, Tensor]:
    """Round to nearest.  ``w`` is ``[..., N, K]`` in any float dtype; the parts are contiguous."""
    if w.dim() > 2 and len(w):  # matrix by matrix: experts are too many for temporaries of all
        each = [quantize(one, fmt) for one in w]
        return {part: torch.stack([parts[part] for parts in each]) for part in fmt.parts}
    if w.dim() == 2 and len(w) > _ROWS:
        each = [quantize(rows, fmt) for rows in w.split(_ROWS)]
        return {part: torch.cat([parts[part] for parts in each]) for part in fmt.parts}
    w = w.float()
    match fmt.name:
        case "fp32":
            return {"w": w.contiguous()}
        case "bf16":
            return {"w": w.bfloat16().contiguous()}
    scale = scales(w, fmt)
    return {"q": pack(snap(w / divisors(scale, fmt, w.shape), fmt), fmt), "scale": scale}


def scales(w: Tensor, fmt: Format) -> Tensor:
    """The scales with which no value of ``w [..., N, K]`` (fp32) leaves the format's range."""
    match fmt.name:
        case "int8":
            return w.abs().amax(-1).div(127.0)
        case "fp8":
            return _fp8_blocks(w).abs().amax((-1, -3)).div(FP8_MAX)
        case _:
            groups = int4_groups(w, fmt.group)
            # The entry of largest magnitude maps to -8, the one value that has no positive twin.
            peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
            return peak.div(-8.0).bfloat16()


def spread(scale: Tensor, fmt: Format, shape: Sequence[int]) -> Tensor:
    """The fp32 scale of every element of a weight of ``shape [..., N, K]``."""
    n, k = shape[-2:]
    scale = scale.float()
    match fmt.name:
        case "int8":
            return scale[..., None].expand(*scale.shape, k)
        case "fp8":
            return _repeat(_repeat(scale, FP8_BLOCK).mT, FP8_BLOCK).mT[..., :n, :k]
        case _:
            return _repeat(scale, fmt.group)[..., :k]


def divisors(scale: Tensor, fmt: Format, shape: Sequence[int]) -> Tensor:
    """:func:`spread` to divide by: an all-zero group has scale 0, and dividing by 1 keeps its zeros."""
    return spread(_divisor(scale.float()), fmt, shape)


def snap(x: Tensor, fmt: Format) -> Tensor:
    """The nearest numbers, in units of the scale, that INT8, INT4 or FP8 can hold; fp32.

    >>> snap(torch.tensor([7.6, -9.0, 0.5]), parse("int4-g32")).tolist()
    [7.0, -8.0, 0.0]
    """
    match fmt.name:
        case "int8":
            return x.round().clamp(-127.0, 127.0)
        case "fp8":
            return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
        case _:
            return x.round().clamp(-8.0, 7.0)


def pack(values: Tensor, fmt: Format) -> Tensor:
    """The part ``q`` that stores numbers which :func:`snap` yields."""
    match fmt.name:
        case "int8":
            return values.to(torch.int8)
        case "fp8":
            return values.to(torch.float8_e4m3fn)
        case _:
            nibbles = F.pad(values, (0, values.shape[-1] % 2)).add(8.0).to(torch.uint8)
            return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def dequantize(parts: Mapping[str, Tensor], fmt: Format, k: int) -> Tensor:
    """The fp32 ``[..., N, k]`` matrix that the parts stand for: every kernel's meaning of a weight."""
    if "w" in parts:
        return parts["w"].float()
    q, scale = parts["q"], parts["scale"]
    values = q.float()
    if fmt.bits == 4:
        values = torch.stack((q & 15, q >> 4), -1).flatten(-2)[..., :k].float() - 8.0
    return values * spread(scale, fmt, (*q.shape[:-1], k))


def round_inputs(x: Tensor, fmt: Format) -> Tensor:
    """The fp32 numbers ``[..., K]`` that a CPU kernel multiplies weights of this format with."""
    match fmt.name:
        case "fp32" | "fp8":
            return x
        case "bf16":
            return x.bfloat16().float()
    k = x.shape[-1]
    groups = F.pad(x, (0, -k % INPUT_GROUP)).unflatten(-1, (-1, INPUT_GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127.0
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    q = (groups * (1.0 / _divisor(scale))).round()
    return (q * scale).flatten(-2)[..., :k]


def _repeat(x: Tensor, times: int) -> Tensor:
    """Each number of a row ``times`` times, as ``repeat_interleave`` has it, only faster."""
    return x[..., None].expand(*x.shape, times).flatten(-2)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def int4_groups(w: Tensor, group: int) -> Tensor:
    """``[..., N, ceil(K/G), G]``, zero-padded."""
    return F.pad(w, (0, -w.shape[-1] % group)).unflatten(-1, (-1, group))


def _fp8_blocks(w: Tensor) -> Tensor:
    """``[..., N/128, 128, K/128, 128]``, zero-padded."""
    n, k = w.shape[-2:]
    w = F.pad(w, (0, -k % FP8_BLOCK, 0, -n % FP8_BLOCK))
    return w.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
