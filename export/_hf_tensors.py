"""Tensors of a checkpoint, put together again from the weights of an artifact, row by row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import Unsupported
from ..ir import quant
from ..ir.program import Weights
from ..ir.provenance import ZEROS, Run
from ..ir.serialize import DTYPES, TORCH_DTYPES
from ..runtime.tensors import TensorSpec
from .parameters import Use

_ADVICE = (
    "export --format onnx keeps the graph as it is; or compile without the pass that computes it"
)


@dataclass(frozen=True)
class Holder:
    """A stored weight that holds rows of a tensor, and the runs that say which."""

    use: Use
    edited: bool
    transposed: bool
    runs: tuple[Run, ...]


@dataclass
class Original:
    """A tensor of the checkpoint: what it was, and which stored weights hold its rows."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    holders: list[Holder] = field(default_factory=list)

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of one linear map, as formats know them."""
        return len(self.shape) == 2 and self.name.endswith(".weight")

    @property
    def rows(self) -> int:
        """How many rows it has, or columns if these are what is stored as rows."""
        *lead, last = self.shape
        if not lead:
            return last
        matrices = torch.Size(lead[:-1]).numel()
        return matrices * (last if self.transposed else lead[-1])

    @property
    def width(self) -> int:
        """How long these rows are."""
        return 1 if len(self.shape) < 2 else self.shape[-2 if self.transposed else -1]

    @property
    def transposed(self) -> bool:
        return any(h.transposed for h in self.holders)

    def places(self) -> tuple[Tensor, Tensor]:
        """Of each row, the number of its holder and the row there; raises Unsupported if one has none."""
        owner = torch.full((self.rows,), -1)
        row = torch.zeros(self.rows, dtype=torch.int64)
        for number, holder in enumerate(self.holders):
            for _, start, step, at, count in holder.runs:
                here = start + step * torch.arange(count)
                free = owner[here] < 0
                owner[here[free]] = number
                row[here[free]] = at + torch.arange(count)[free]
        if bool((owner < 0).any()):
            raise Unsupported(
                reason=f"the artifact holds no weight with the numbers of {self.name}",
                where=self.name, advice=_ADVICE,
            )  # fmt: skip
        return owner, row


def originals(record: Mapping[str, Any]) -> tuple[list[Original], list[str]]:
    """The tensors of a checkpoint from what the artifact says of them, and the names of those that were tied
    to another and are no more.
    """
    found = {
        name: Original(name, tuple(fact["shape"]), TORCH_DTYPES[fact["dtype"]])
        for name, fact in record["tensors"].items()
    }
    stored = sorted(record["stored"], key=lambda s: -quant.parse(s["format"]).bits)
    lookups = {(s["name"], s["format"]) for s in stored if s["role"] == "embedding"}
    aliases = {tensor: alias for alias, tensor in record["tied"].items()}
    untied: list[str] = []
    for fact in stored:
        by_tensor: dict[str, list[Run]] = {}
        for run in (Run(*r) for r in fact["rows"]):
            if run.source != ZEROS:
                by_tensor.setdefault(run.source, []).append(run)
        use = Use(fact["name"], fact["format"], fact["role"])
        for name, runs in by_tensor.items():
            if name in aliases and use.role == "head":
                if (use.name, use.format) in lookups:
                    continue
                untied.append(name)
                alias = Original(aliases[name], found[name].shape, found[name].dtype)
                name = found.setdefault(alias.name, alias).name
            holder = Holder(use, fact["edited"], fact["transposed"], tuple(runs))
            found[name].holders.append(holder)
    return sorted(found.values(), key=lambda o: _natural(o.name)), untied


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer 2 comes before layer 10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


class Form(NamedTuple):
    """How a tensor is written: in a format of :mod:`..ir.quant` or plain, and why not as it is stored."""

    format: str
    reason: str = ""


def form(original: Original, weights: Weights) -> Form:
    """The format of the artifact if checkpoints can hold it, else 16 or 32 bits."""
    owner, row = original.places()
    used = [original.holders[i] for i in owner.unique().tolist()]
    formats = {h.use.format for h in used}
    narrow = sorted(f for f in formats if quant.parse(f).bits < 16)
    if not narrow:
        return Form("fp32" if "fp32" in formats else "bf16")
    plain = "fp32" if "fp32" in formats else "bf16"
    if reason := _unfit(original, used, narrow, formats, weights, owner, row):
        return Form(plain, reason)
    return Form(narrow[0])


def _unfit(
    original: Original,
    used: list[Holder],
    narrow: list[str],
    formats: set[str],
    weights: Weights,
    owner: Tensor,
    row: Tensor,
) -> str:
    """Why a tensor cannot be written in the format of its rows; empty if it can."""
    fmt = quant.parse(narrow[0])
    if len(formats) > 1:
        return f"its rows are in several formats ({', '.join(sorted(formats))})"
    if any(h.use.role == "embedding" for h in used):
        return "loaders look embeddings up in 16 or 32 bits"
    if not original.is_matrix or original.transposed:
        return "its file holds more than one plain matrix under this name"
    if fmt.name == "fp8" and original.shape[-1] % quant.FP8_BLOCK:
        return f"its rows are no whole blocks of {quant.FP8_BLOCK}"
    if fmt.name == "fp8":
        blocks = _blocks(original, weights, owner, row)
        return (
            ""
            if blocks is not None
            else "its blocks of 128 rows are cut differently in the artifact"
        )
    if fmt.name == "int8":
        return ""
    if fmt.name.startswith("int4-g"):
        return (
            ""
            if original.shape[-1] % fmt.group == 0
            else f"its rows are no whole groups of {fmt.group}"
        )
    return "compressed-tensors has no such format"


def _blocks(
    original: Original, weights: Weights, owner: Tensor, row: Tensor
) -> list[tuple[int, int]] | None:
    """Of each block of rows, the holder of its scales and their row there; None if it has several."""
    found: list[tuple[int, int]] = []
    number = torch.empty_like(row)
    for i, holder in enumerate(original.holders):
        n = weights.like(holder.use.parts["q"]).shape[-2]
        here = row[owner == i]
        number[owner == i] = here // n * -(-n // quant.FP8_BLOCK) + here % n // quant.FP8_BLOCK
    for begin in range(0, len(row), quant.FP8_BLOCK):
        block = slice(begin, begin + quant.FP8_BLOCK)
        holder, scale = owner[block].unique(), number[block].unique()
        if len(holder) > 1 or len(scale) > 1:
            return None
        found.append((int(holder), int(scale)))
    return found


# --- what is written --------------------------------------------------------------------------------


class Writable(NamedTuple):
    spec: TensorSpec
    data: Callable[[], Tensor]


def writables(
    original: Original, chosen: Form, weights: Weights, scale_name: str, packed: bool = True
) -> Iterator[Writable]:
    """The tensors that stand for one of the checkpoint; FP8 scales are called ``scale_name``.

    INT8 is ``packed`` into words, or as it is.
    """
    n, k = (1, 1, *original.shape)[-2:]
    module, fmt = original.module, quant.parse(chosen.format)

    def writable(
        name: str, dtype: str, shape: tuple[int, ...], data: Callable[[], Tensor]
    ) -> Writable:
        return Writable(TensorSpec(name, dtype, shape), data)

    if fmt.bits >= 16:
        dtype = plain_dtype(original, chosen)
        data = partial(_plain, original, weights, dtype)
        yield writable(original.name, DTYPES[dtype], original.shape, data)
        return
    gather = partial(_gather, original, weights)
    if fmt.name == "fp8":
        blocks = (-(-n // quant.FP8_BLOCK), -(-k // quant.FP8_BLOCK))
        yield writable(original.name, "e4m3", (n, k), lambda: gather("q"))
        yield writable(
            f"{module}.{scale_name}", "f32", blocks, partial(_block_scales, original, weights)
        )
        return
    groups = (k // fmt.group, "bf16") if fmt.group else (1, "f32")
    yield writable(
        f"{module}.weight_scale", groups[1], (n, groups[0]), lambda: gather("scale").reshape(n, -1)
    )
    if not packed:
        yield writable(original.name, "i8", (n, k), lambda: gather("q"))
        return
    words = -(-k * fmt.bits // 32)
    yield writable(f"{module}.weight_packed", "i32", (n, words), lambda: pack(gather("q"), fmt))
    yield writable(f"{module}.weight_shape", "i64", (2,), lambda: torch.tensor([n, k]))


def plain_dtype(original: Original, chosen: Form) -> torch.dtype:
    """That of the checkpoint where it loses nothing, else that of the artifact."""
    kept = not any(h.edited or h.use.format != "fp32" for h in original.holders)
    if kept and original.dtype in (torch.bfloat16, torch.float16):
        return original.dtype
    return torch.float32 if chosen.format == "fp32" else torch.bfloat16


def pack(q: Tensor, fmt: quant.Format) -> Tensor:
    """Stored integers ``[N, ...]`` as int32 words, from the lowest bits on; INT8 with 128 added."""
    values = q if fmt.bits == 4 else q.view(torch.uint8) ^ 128
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % 4)).view(torch.int32)


def values(original: Original, weights: Weights) -> Tensor:
    """The numbers of a tensor in fp32, whatever formats they are stored in."""
    owner, row = original.places()
    made = torch.empty(original.rows, original.width)
    for number, holder in enumerate(original.holders):
        here = owner == number
        if here.any():
            made[here] = _dequantized(holder.use, weights, row[here], original.width)
    if not original.transposed:
        return made.reshape(original.shape)
    *lead, n, k = original.shape
    return made.view(*lead, k, n).mT.contiguous()


def _plain(original: Original, weights: Weights, dtype: torch.dtype) -> Tensor:
    return values(original, weights).to(dtype)


def _gather(original: Original, weights: Weights, part: str) -> Tensor:
    """The rows of one part."""
    owner, row = original.places()
    pieces = [
        (owner == i, _rows(weights, h.use, part, row[owner == i]))
        for i, h in enumerate(original.holders)
        if (owner == i).any()
    ]
    if len(pieces) == 1:
        return pieces[0][1]
    first = pieces[0][1]
    made = torch.empty(len(row), *first.shape[1:], dtype=first.dtype)
    for here, piece in pieces:
        _bits(made)[here] = _bits(piece)
    return made


def _block_scales(original: Original, weights: Weights) -> Tensor:
    blocks = _blocks(original, weights, *original.places())
    assert blocks is not None
    scales = {
        i: weights[h.use.parts["scale"]].flatten(0, -2) for i, h in enumerate(original.holders)
    }
    return torch.stack([scales[holder][at] for holder, at in blocks])


def _dequantized(use: Use, weights: Weights, rows: Tensor, width: int) -> Tensor:
    """Rows of a stored weight in fp32."""
    fmt = quant.parse(use.format)
    parts = {p: _rows(weights, use, p, rows) for p in fmt.parts if fmt.name != "fp8" or p == "q"}
    if fmt.name != "fp8":
        whole = {"w": parts["w"].reshape(len(rows), -1)} if "w" in parts else parts
        return quant.dequantize(whole, fmt, width)
    n = weights.like(use.parts["q"]).shape[-2]
    scales = weights[use.parts["scale"]]
    blocks = rows // n * scales.shape[-2] + rows % n // quant.FP8_BLOCK
    each = scales.flatten(0, -2)[blocks].repeat_interleave(quant.FP8_BLOCK, 1)
    return parts["q"].float() * each[:, :width]


def _rows(weights: Weights, use: Use, part: str, rows: Tensor) -> Tensor:
    """Rows of a part, counted over the matrices of a stack; of a stack no more is read than they need."""
    name = use.parts[part]
    like = weights.like(name)
    inner = 1 if part == "scale" and use.format == "int8" else min(like.dim(), 2)
    n = like.shape[-inner]
    if like.dim() > inner and like.dim() - inner == 1 and len(members := (rows // n).unique()) == 1:
        matrix = weights.matrices(name)(int(members))
        return _taken(matrix, rows % n)
    return _taken(weights[name].reshape(-1, *like.shape[like.dim() - inner + 1 :]), rows)


def _taken(matrix: Tensor, rows: Tensor) -> Tensor:
    if torch.equal(rows, torch.arange(len(matrix))):
        return matrix
    return _bits(matrix)[rows].view(matrix.dtype)


def _bits(x: Tensor) -> Tensor:
    """FP8 as bytes, which can be indexed anywhere."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
