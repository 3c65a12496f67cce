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

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_BLOCK = 128
FP8_MAX = 448.0
INPUT_GROUP = 32


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
    w = w.float()
    match fmt.name:
        case "fp32":
            return {"w": w.contiguous()}
        case "bf16":
            return {"w": w.bfloat16().contiguous()}
        case "int8":
            scale = w.abs().amax(-1).div(127.0)
            return {"q": _round(w / _divisor(scale)[..., None], 127).to(torch.int8), "scale": scale}
        case "fp8":
            blocks = _fp8_blocks(w)
            scale = blocks.abs().amax((-1, -3)).div(FP8_MAX)
            q = blocks / _divisor(scale)[..., :, None, :, None]
            n, k = w.shape[-2:]
            q = q.clamp(-FP8_MAX, FP8_MAX).flatten(-2).flatten(-3, -2)[..., :n, :k]
            return {"q": q.to(torch.float8_e4m3fn).contiguous(), "scale": scale}
        case _:
            groups = _int4_groups(w, fmt.group)
            # The entry of largest magnitude maps to -8, the one value that has no positive twin.
            peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
            scale = peak.div(-8.0).bfloat16()
            q = _round(groups / _divisor(scale.float())[..., None], 8).clamp(max=7.0)
            q = (q + 8.0).to(torch.uint8).flatten(-2)[..., : w.shape[-1] + w.shape[-1] % 2]
            return {"q": (q[..., 0::2] | (q[..., 1::2] << 4)).contiguous(), "scale": scale}


def dequantize(parts: Mapping[str, Tensor], fmt: Format, k: int) -> Tensor:
    """The fp32 ``[..., N, k]`` matrix that the parts stand for: every kernel's meaning of a weight."""
    if "w" in parts:
        return parts["w"].float()
    q, scale = parts["q"], parts["scale"].float()
    match fmt.name:
        case "int8":
            return q.float() * scale[..., None]
        case "fp8":
            n = q.shape[-2]
            spread = scale.repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)
            return q.float() * spread[..., :n, :k]
        case _:
            values = torch.stack((q & 15, q >> 4), -1).flatten(-2)[..., :k].float() - 8.0
            return values * scale.repeat_interleave(fmt.group, -1)[..., :k]


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


def _divisor(scale: Tensor) -> Tensor:
    """An all-zero group has scale 0; dividing by 1 instead keeps its zeros."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _round(x: Tensor, bound: int) -> Tensor:
    return x.round().clamp(-bound, bound)


def _int4_groups(w: Tensor, group: int) -> Tensor:
    """``[..., N, ceil(K/G), G]``, zero-padded."""
    return F.pad(w, (0, -w.shape[-1] % group)).unflatten(-1, (-1, group))


def _fp8_blocks(w: Tensor) -> Tensor:
    """``[..., N/128, 128, K/128, 128]``, zero-padded."""
    n, k = w.shape[-2:]
    w = F.pad(w, (0, -k % FP8_BLOCK, 0, -n % FP8_BLOCK))
    return w.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
