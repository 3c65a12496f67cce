"""Matrices in the formats that ONNX has for them.

==========  =========================================================================================
artifact    in the file
==========  =========================================================================================
fp32        fp32, transposed
bf16        bfloat16, transposed; cast to fp32, which onnxruntime does once, when it loads the file
int8        MatMulNBits of 8 bits: one scale per row is that of each of its blocks
int4-gG     MatMulNBits of 4 bits in blocks of G: the same nibbles, scales in fp32
fp8         float8e4m3fn and its scales; multiplied to fp32 when the file is loaded
codebooks   fp32
==========  =========================================================================================

Sums are in fp32 everywhere; whether a kernel may round what it multiplies with is the graph's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..ir import quant
from ..ir.program import Weights, shape
from ._onnx_graph import CONTRIB, Graph

BLOCK = quant.FP8_BLOCK
ZERO_NIBBLES = 0x88  # two INT4 zeros


@dataclass(frozen=True)
class Matrix:
    """A weight ``[..., N, K]`` of a program: the names of its parts, its format, and ``k``."""

    parts: tuple[str, ...]
    format: str
    lead: tuple[int, ...]
    n: int
    k: int
    weights: Weights = field(repr=False, compare=False)

    @staticmethod
    def of(nodes: Sequence[fx.Node], format: str, k: int, weights: Weights) -> Matrix:
        sizes = shape(nodes[0])
        names = tuple(node.target for node in nodes)
        return Matrix(names, format, tuple(sizes[:-2]), int(sizes[-2]), k, weights)

    @property
    def spec(self) -> quant.Format:
        return quant.parse(self.format)

    def part(self, name: str) -> Tensor:
        return self.weights[self.parts[self.spec.parts.index(name)]]

    def values(self) -> Tensor:
        """fp32 ``[..., N, K]``."""
        parts = {name: self.part(name) for name in self.spec.parts}
        return quant.dequantize(parts, self.spec, self.k)

    @property
    def is_codebook(self) -> bool:
        return isinstance(self.spec, quant.Codebook)

    def stored(
        self,
        g: Graph,
        what: str,
        read: Callable[[], Tensor],
        dtype: torch.dtype,
        *sizes: int,
    ) -> ir.Value:
        return g.weight(f"{self.parts[0]}.{what}", read, dtype, [*self.lead, *sizes])


# --- linear maps ------------------------------------------------------------------------------------

Stored = dict[str, ir.Value]


def store(g: Graph, m: Matrix) -> Stored:
    """What :func:`multiply` takes, ``[..., a part's dims]``; a stack's members can be gathered from it."""
    match m.format:
        case "int8":
            block = _block(m.k)
            count = -(-m.k // block)
            return {
                "q": m.stored(g, "u8", lambda: _bytes(m, block), torch.uint8, m.n, count, block),
                "scale": m.stored(
                    g, "scales", lambda: _per_block(m.part("scale"), count), torch.float32,
                    m.n, count,
                ),
            }  # fmt: skip
        case str(name) if name.startswith("int4"):
            block = m.spec.group
            count = -(-m.k // block)
            return {
                "q": m.stored(
                    g, "u4", lambda: _nibbles(m, block), torch.uint8, m.n, count, block // 2
                ),
                "scale": m.stored(
                    g, "scales", lambda: m.part("scale").float(), torch.float32, m.n, count
                ),
            }
        case "fp8":
            return _store_fp8(g, m)
    dtype = torch.bfloat16 if m.format == "bf16" else torch.float32
    read = (lambda: m.values().mT) if m.is_codebook else (lambda: m.part("w").mT)
    return {"w": m.stored(g, "turned", read, dtype, m.k, m.n)}


def multiply(g: Graph, x: ir.Value, m: Matrix, stored: Stored, bias: ir.Value | None) -> ir.Value:
    """``x W^T + bias`` for ``x [..., K]`` and one matrix."""
    if "w" in stored or m.format == "fp8":
        g.widened.add(m.format)
    if "w" in stored:
        weight = stored["w"] if m.format != "bf16" else g.cast(stored["w"], torch.float32)
    elif m.format == "fp8":
        weight = g.transpose(_decode_fp8(g, m, stored, ()), 1, 0)
    else:
        y: ir.Value = g.op(
            "MatMulNBits", x, stored["q"], stored["scale"], domain=CONTRIB,
            K=m.k, N=m.n, bits=m.spec.bits, block_size=m.spec.group or _block(m.k),
            accuracy_level=g.accuracy_level,
        )  # fmt: skip
        return y if bias is None else g.op("Add", y, bias)
    y = g.op("MatMul", x, weight)
    return y if bias is None else g.op("Add", y, bias)


def dense(g: Graph, m: Matrix) -> ir.Value:
    """The fp32 weight ``[..., N, K]``, for ops that know no formats."""
    g.widened.add(m.format)
    match m.format:
        case "bf16":
            return g.cast(
                m.stored(g, "w", lambda: m.part("w"), torch.bfloat16, m.n, m.k), torch.float32
            )
        case "int8":
            q = m.stored(g, "q", lambda: m.part("q"), torch.int8, m.n, m.k)
            scale = m.stored(g, "column", lambda: m.part("scale")[..., None], torch.float32, m.n, 1)
            return g.op("Mul", g.cast(q, torch.float32), scale)
        case "fp8":
            return _decode_fp8(g, m, _store_fp8(g, m), m.lead)
    return m.stored(g, "fp32", m.values, torch.float32, m.n, m.k)


def gather(g: Graph, index: ir.Value, m: Matrix) -> ir.Value:
    """fp32 rows of a table by index."""
    if m.format not in ("fp32", "bf16", "int8"):
        return g.op("Gather", dense(g, m), index)
    name = m.spec.parts[0]
    like = m.weights.like(m.parts[0])
    rows = g.op("Gather", m.stored(g, name, lambda: m.part(name), like.dtype, m.n, m.k), index)
    rows = rows if m.format == "fp32" else g.cast(rows, torch.float32)
    if m.format != "int8":
        return rows
    scale = m.stored(g, "column", lambda: m.part("scale")[..., None], torch.float32, m.n, 1)
    return g.op("Mul", rows, g.op("Gather", scale, index))


# --- layouts ----------------------------------------------------------------------------------------


def _block(k: int) -> int:
    """Inputs of an INT8 row that share a copy of its scale: kernels want a power of two from 32 on."""
    return next((b for b in (32, 64) if k <= b), 128)


def _bytes(m: Matrix, block: int) -> Tensor:
    """INT8 as value + 128 in blocks, the last padded with zeros."""
    values = (m.part("q").short() + 128).to(torch.uint8)
    return F.pad(values, (0, -m.k % block), value=128).unflatten(-1, (-1, block))


def _nibbles(m: Matrix, block: int) -> Tensor:
    q = m.part("q")
    return F.pad(q, (0, -q.shape[-1] % (block // 2)), value=ZERO_NIBBLES).unflatten(
        -1, (-1, block // 2)
    )


def _per_block(scale: Tensor, count: int) -> Tensor:
    return scale[..., None].expand(*scale.shape, count)


def _store_fp8(g: Graph, m: Matrix) -> Stored:
    blocks = -(-m.n // BLOCK), -(-m.k // BLOCK)

    def padded() -> Tensor:
        raw = m.part("q").view(torch.uint8)
        return F.pad(raw, (0, -m.k % BLOCK, 0, -m.n % BLOCK)).view(torch.float8_e4m3fn)

    sizes = [count * BLOCK for count in blocks]
    return {
        "q": m.stored(g, "e4m3", padded, torch.float8_e4m3fn, *sizes),
        "scale": m.stored(g, "blocks", lambda: m.part("scale"), torch.float32, *blocks),
    }


def _decode_fp8(g: Graph, m: Matrix, stored: Stored, lead: tuple[int, ...]) -> ir.Value:
    blocks = -(-m.n // BLOCK), -(-m.k // BLOCK)
    tiles = g.reshape(g.cast(stored["q"], torch.float32), *lead, blocks[0], BLOCK, blocks[1], BLOCK)
    scale = g.reshape(stored["scale"], *lead, blocks[0], 1, blocks[1], 1)
    whole = g.reshape(g.op("Mul", tiles, scale), *lead, blocks[0] * BLOCK, blocks[1] * BLOCK)
    for axis, size in ((-2, m.n), (-1, m.k)):
        whole = whole if size % BLOCK == 0 else g.cut(whole, axis, 0, size)
    return whole
