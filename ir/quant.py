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
codebook    ``q  [..., N, bits * ceil(K/32)]`` int32        bf16 ``[..., N, ceil(K/G)]``
==========  ==============================================  ===================================

INT4 stores ``value + 8``, the element with the even index in the low nibble; the last group of a row
may be shorter than G, and an odd K is padded with one zero (nibble 8).

A codebook is a format of the user's own (:class:`Codebook`).  It stores numbers of table entries, 32 inputs
in ``bits`` words: bit i of the word b is bit b of the number of input i.

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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_BLOCK = 128
FP8_MAX = 448.0
INPUT_GROUP = 32
CODES = 32  # of a codebook that stand together
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


@dataclass(frozen=True)
class Codebook(Format):
    """A weight is ``values[code] * scale``; one bf16 scale per row and ``group`` inputs.

    ``values`` are up to 256 rising numbers.  ``fit`` chooses scales ``[...]`` for the weights ``[..., G]``
    that share one; left out, the largest magnitude of a group maps to that of the table.

    >>> ternary = Codebook("ternary", values=(-1.0, 0.0, 1.0), group=32)
    >>> parts = quantize(torch.tensor([[0.5, -0.125, 0.0, -0.5]]), ternary)
    >>> parts["q"].tolist(), parts["scale"].tolist()  # codes 2 1 1 0: their low bits, their high bits
    ([[6, 1]], [[0.5]])
    >>> dequantize(parts, ternary, 4).tolist()
    [[0.5, 0.0, 0.0, -0.5]]
    """

    bits: int = field(init=False, default=0)
    values: tuple[float, ...] = ()
    fit: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        values = torch.tensor(self.values, dtype=torch.float32)
        if not 2 <= len(values) <= 256 or not bool((values.diff() > 0).all()):
            raise ValueError(f"format {self.name!r}: values must be 2 to 256 numbers that rise")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"format {self.name!r}: values must be finite")
        if self.group < CODES or self.group % CODES:
            raise ValueError(f"format {self.name!r}: group must be a multiple of {CODES}")
        object.__setattr__(self, "values", tuple(values.tolist()))
        object.__setattr__(self, "bits", (len(values) - 1).bit_length())

    def bytes(self, n: int, k: int) -> int:
        return n * (4 * self.bits * -(-k // CODES) + 2 * -(-k // self.group))

    def codes(self, x: Tensor) -> Tensor:
        """Numbers of the entries next to ``x``, which is in units of the scale."""
        table = torch.tensor(self.values, device=x.device)
        return torch.bucketize(x, (table[1:] + table[:-1]) / 2)

    def decode(self, codes: Tensor) -> Tensor:
        """The entries, fp32."""
        return torch.tensor(self.values, device=codes.device)[codes]

    def scales(self, w: Tensor) -> Tensor:
        whole = w.shape[-1] // self.group * self.group
        parts = [w[..., :whole].unflatten(-1, (-1, self.group)), w[..., None, whole:]]
        return torch.cat([self._fitted(p) for p in parts if p.numel()], -1).bfloat16()

    def _fitted(self, groups: Tensor) -> Tensor:
        if self.fit is not None:
            return self.fit(groups)
        return groups.abs().amax(-1) / max(map(abs, self.values))

    def pack(self, codes: Tensor) -> Tensor:
        inputs = F.pad(codes.int(), (0, -codes.shape[-1] % CODES)).unflatten(-1, (-1, CODES))
        at = torch.arange(CODES, dtype=torch.int32, device=codes.device)
        words = [((inputs >> b & 1) << at).sum(-1, dtype=torch.int32) for b in range(self.bits)]
        return torch.stack(words, -1).flatten(-2)

    def unpack(self, q: Tensor, k: int) -> Tensor:
        """The codes ``[..., k]`` that :meth:`pack` was given."""
        at = torch.arange(CODES, dtype=torch.int32, device=q.device)
        words = q.unflatten(-1, (-1, self.bits)).unbind(-1)
        codes = sum((word[..., None] >> at & 1) << b for b, word in enumerate(words))
        return codes.flatten(-2)[..., :k]


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
NAMES = tuple(_FORMATS)  # without the codebooks that users add


def parse(name: str) -> Format:
    """A format by name; raises ValueError with the known names."""
    if name not in _FORMATS:
        raise ValueError(f"unknown weight format {name!r}: one of {', '.join(_FORMATS)}")
    return _FORMATS[name]


def known(name: str) -> bool:
    """Whether :func:`parse` knows a format."""
    return name in _FORMATS


def register(book: Codebook) -> None:
    """Let :func:`parse` know a codebook; raises ValueError if the name stands for another format."""
    if _FORMATS.setdefault(book.name, book) != book:
        raise ValueError(f"format {book.name!r} exists already, and is another one")


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
    if isinstance(fmt, Codebook):
        return fmt.scales(w)
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
    if isinstance(fmt, Codebook):
        return fmt.decode(fmt.codes(x))
    match fmt.name:
        case "int8":
            return x.round().clamp(-127.0, 127.0)
        case "fp8":
            return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
        case _:
            return x.round().clamp(-8.0, 7.0)


def pack(values: Tensor, fmt: Format) -> Tensor:
    """The part ``q`` that stores numbers which :func:`snap` yields."""
    if isinstance(fmt, Codebook):
        return fmt.pack(fmt.codes(values))
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
    if isinstance(fmt, Codebook):
        values = fmt.decode(fmt.unpack(q, k))
    elif fmt.bits == 4:
        values = torch.stack((q & 15, q >> 4), -1).flatten(-2)[..., :k].float() - 8.0
    else:
        values = q.float()
    return values * spread(scale, fmt, (*q.shape[:-1], k))


def round_inputs(x: Tensor, fmt: Format) -> Tensor:
    """The fp32 numbers ``[..., K]`` that a CPU kernel multiplies weights of this format with."""
    match fmt.name:
        case "fp32" | "fp8":
            return x
        case "bf16":
            return x.bfloat16().float()
    if isinstance(fmt, Codebook):
        return x
    k = x.shape[-1]
    groups = F.pad(x, (0, -k % INPUT_GROUP)).unflatten(-1, (-1, INPUT_GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127.0
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    q = (groups * (1.0 / _divisor(scale))).round()
    return (q * scale).flatten(-2)[..., :k]


def round_e4m3(x: Tensor) -> Tensor:
    """The fp32 numbers ``[..., K]`` that a GPU multiplies FP8 weights with where there are many rows.

    E4M3, one scale per row and 128 of them.
    """
    groups = F.pad(x, (0, -x.shape[-1] % FP8_BLOCK)).unflatten(-1, (-1, FP8_BLOCK))
    scale = groups.abs().amax(-1, keepdim=True) / FP8_MAX
    q = (groups / _divisor(scale)).to(torch.float8_e4m3fn)
    return (q.float() * scale).flatten(-2)[..., : x.shape[-1]]


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
