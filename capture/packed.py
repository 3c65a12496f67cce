"""Checkpoints that are quantized already, read as the weights that they stand for.

Known: block FP8 as DeepSeek publishes it (``weight_scale_inv``, which multiplies), compressed-tensors
(packed integers, plain INT8, FP8), AWQ in the order of its GEMM kernels, GPTQ in both versions.  A linear
map's tensors appear as one matrix ``<name>.weight [N, K]`` in fp32.  Where a format of :mod:`..ir.quant` can
hold exactly what is stored, its parts can be had too.  config.json must agree with the tensors' shapes.

Layouts: the documentation of compressed-tensors, AutoAWQ, AutoGPTQ and GPTQModel; DeepSeek-V3's
README_WEIGHTS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import Unsupported
from ..ir import quant
from .shards import Part, Shards, Stored

# The column that each nibble of an int32 holds, from the lowest.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ADVICE = (
    "use a bf16 or fp32 checkpoint of this model, or one quantized in a way that is known: {known}"
)
_KNOWN = "block FP8, compressed-tensors, AWQ (gemm), GPTQ"


@dataclass(frozen=True)
class Matrix:
    """A quantized ``[N, K]`` matrix; ``stored`` if a format of ours holds exactly the same."""

    shape: tuple[int, int]
    read: Callable[[], Tensor]
    stored: Stored | None = None


class Packed:
    """The tensors of a quantized checkpoint by name, its matrices as fp32 ``<name>.weight``."""

    def __init__(self, shards: Shards, config: Mapping[str, Any], where: str) -> None:
        self._shards = shards
        self._matrices: dict[str, Matrix] = {}
        self._companions: set[str] = set()
        scheme = _scheme(config, where)
        marked = [n.rpartition(".") for n in shards]
        for prefix in dict.fromkeys(p for p, _, name in marked if name in scheme.marks):
            inside = _Inside(shards, prefix, where)
            self._matrices[f"{prefix}.weight"] = scheme.matrix(inside)
            self._companions |= {f"{prefix}.{n}" for n in scheme.companions}
        for name in self:
            if name not in self._matrices and shards.like(name).dtype in _FP8:
                _refuse(where, f"{name} is FP8 and has no scale")

    def __contains__(self, name: object) -> bool:
        return name in self._matrices or (name in self._shards and name not in self._companions)

    def __iter__(self) -> Iterator[str]:
        yield from self._matrices
        yield from (n for n in self._shards if not (n in self._companions or n in self._matrices))

    def like(self, name: str) -> Tensor:
        if name in self._matrices:
            return torch.empty(self._matrices[name].shape, device="meta")
        return self._shards.like(name)

    def read(self, name: str, index: int | None = None) -> Tensor:
        if name in self._matrices:
            value = self._matrices[name].read()
            return value if index is None else value[index]
        return self._shards.read(name, index)

    def stored(self, name: str) -> Stored | None:
        """The matrix in a format of ours, if that is the same bits."""
        return self._matrices[name].stored if name in self._matrices else None


@dataclass(frozen=True)
class _Inside:
    """The tensors of one linear map, by the last part of their names."""

    shards: Shards
    prefix: str
    where: str

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}.{name}" in self.shards

    def like(self, name: str) -> Tensor:
        if name not in self:
            self.refuse(f"there is no {name}")
        return self.shards.like(f"{self.prefix}.{name}")

    def read(self, name: str) -> Tensor:
        return self.shards.read(f"{self.prefix}.{name}")

    def refuse(self, reason: str) -> NoReturn:
        _refuse(self.where, f"{self.prefix}: {reason}")

    def expect(self, name: str, *shape: int) -> None:
        found = tuple(self.like(name).shape)
        if found != shape:
            self.refuse(f"{name} is {list(found)}, and {list(shape)} is expected")


@dataclass(frozen=True)
class _Scheme:
    """``marks`` tell a quantized linear map, ``companions`` are what its tensors may be called."""

    marks: tuple[str, ...]
    companions: tuple[str, ...]
    matrix: Callable[[_Inside], Matrix]


def _refuse(where: str, reason: str) -> NoReturn:
    raise Unsupported(reason=reason, where=where, advice=_ADVICE.format(known=_KNOWN))


def _scheme(config: Mapping[str, Any], where: str) -> _Scheme:
    method = config.get("quant_method")
    scheme = _SCHEMES.get(str(method))
    if scheme is None:
        _refuse(where, f"the checkpoint is quantized in a way that is not known ({method})")
    return scheme(config, where)


# --- FP8 --------------------------------------------------------------------------------------------

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _block_fp8(config: Mapping[str, Any], where: str) -> _Scheme:
    if config.get("fmt", "e4m3") != "e4m3":
        _refuse(where, f"FP8 of the kind {config['fmt']}")
    block = config.get("weight_block_size") or [0, 0]
    return _Scheme(
        ("weight_scale_inv",),
        ("weight_scale_inv", "weight", "input_scale", "activation_scale"),
        lambda inside: _fp8(inside, "weight_scale_inv", (int(block[0]), int(block[1]))),
    )


def _fp8(inside: _Inside, scale_name: str, block: tuple[int, int]) -> Matrix:
    """Scales multiply, one per block; (0, 0): one for all.

    A scale in bf16 or E8M0 is a number in fp32 too, so it is taken as it is.
    """
    weight, scale = inside.like("weight"), inside.like(scale_name)
    if weight.dtype != torch.float8_e4m3fn or weight.dim() != 2:
        inside.refuse(f"weight is {weight.dtype} {list(weight.shape)}, not a matrix in FP8 E4M3")
    n, k = weight.shape
    rows, columns = (block[0] or n, block[1] or k)
    count = (-(-n // rows), -(-k // columns))
    if scale.numel() != count[0] * count[1] or (scale.dim() == 2 and scale.shape != count):
        inside.refuse(f"{scale_name} is {list(scale.shape)}, and {list(count)} is expected")

    def scales() -> Tensor:
        return inside.read(scale_name).float().reshape(count)

    def read() -> Tensor:
        each = scales().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return inside.read("weight").float() * each[:n, :k]

    if block != (quant.FP8_BLOCK, quant.FP8_BLOCK):
        return Matrix((n, k), read)
    q = Part(weight, partial(inside.read, "weight"))
    scale_part = Part(torch.empty(count, device="meta"), scales)
    return Matrix((n, k), read, Stored("fp8", {"q": q, "scale": scale_part}))


# --- integers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Integers:
    """``w = (values - zeros) * scales``, with values ``[N, K]``, the others ``[N, G]``; groups along K.

    ``zeros`` yields None where all are ``2^(bits - 1)``; ``groups`` yields each input's group ``[K]``, None
    if they follow one another.
    """

    bits: int
    shape: tuple[int, int]
    group: int
    values: Callable[[], Tensor]
    scales: Callable[[], Tensor]
    zeros: Callable[[], Tensor | None]
    groups: Callable[[], Tensor | None]

    def matrix(self) -> Matrix:
        return Matrix(self.shape, self.read, self.stored())

    def read(self) -> Tensor:
        groups, zeros = self.groups(), self.zeros()
        if groups is None:
            groups = torch.arange(self.shape[1]) // self.group
        centred = self.values().float()
        centred -= 2 ** (self.bits - 1) if zeros is None else zeros.float()[:, groups]
        return centred.mul_(self.scales().float()[:, groups])

    def stored(self) -> Stored | None:
        n, k = self.shape
        name = f"int4-g{self.group}" if self.bits == 4 else "int8"
        whole = self.bits == 4 or self.group >= k
        if name not in quant.NAMES or not whole or self.groups() is not None:
            return None
        fmt = quant.parse(name)
        scales = self.scales()
        dtype = torch.bfloat16 if fmt.group else torch.float32
        if self.zeros() is not None or not torch.equal(scales.to(dtype).to(scales.dtype), scales):
            return None

        def q() -> Tensor:
            return quant.pack(self.values().float() - 2 ** (self.bits - 1), fmt)

        def scale() -> Tensor:
            return self.scales().to(dtype) if fmt.group else self.scales()[:, 0].float()

        like = quant.pack(torch.empty(n, k, device="meta"), fmt)
        shape = tuple(scales.shape) if fmt.group else (n,)
        scale_like = torch.empty(shape, dtype=dtype, device="meta")
        return Stored(name, {"q": Part(like, q), "scale": Part(scale_like, scale)})


def _unpack(packed: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words as the unsigned integers inside them along ``dim``, the lowest bits first."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    if order is not None:
        shifts = shifts[torch.tensor(order).argsort()]
    words = packed.movedim(dim, -1)[..., None] >> shifts
    return (words & (2**bits - 1)).to(torch.uint8).flatten(-2).movedim(-1, dim)


def _bits(inside: _Inside, claimed: Any, words: int, count: int) -> int:
    """How many bits each of ``count`` numbers in so many int32 words has."""
    fitting = [b for b in (4, 8) if words == -(-count * b // 32)]
    if not fitting:
        inside.refuse(f"{words} words for {count} numbers are neither 4 nor 8 bits each")
    if claimed is not None and int(claimed) not in fitting:
        inside.refuse(f"its tensors hold {fitting[0]} bits, and config.json says {claimed}")
    return int(claimed) if claimed is not None else fitting[0]


def _group(inside: _Inside, claimed: Any, count: int, k: int) -> int:
    """How many inputs share a scale, of which a row has ``count``."""
    group = int(claimed) if claimed and int(claimed) > 0 else k
    if -(-k // group) != count:
        inside.refuse(f"{count} scales for {k} inputs, and config.json says groups of {claimed}")
    return group


def _in_order(group: int, found: Tensor) -> Tensor | None:
    """The group of each input, None if that is what their places say."""
    if (found < 0).all() or torch.equal(found.long(), torch.arange(len(found)) // group):
        return None
    return found.long()


def _compressed_tensors(config: Mapping[str, Any], where: str) -> _Scheme:
    groups = [g for g in (config.get("config_groups") or {}).values() if g.get("weights")]
    if not groups:
        _refuse(where, "compressed-tensors without config_groups")
    if config.get("sparsity_config") not in (None, {}):
        _refuse(where, "compressed-tensors with sparsity")

    def matrix(inside: _Inside) -> Matrix:
        how = _group_of(inside, groups)
        if "weight_packed" in inside:
            return _pack_quantized(inside, how)
        dtype = inside.like("weight").dtype
        if dtype == torch.float8_e4m3fn:
            return _fp8(inside, "weight_scale", _fp8_block(inside, how))
        if dtype == torch.int8:
            return _int_quantized(inside, how)
        return inside.refuse(f"weight is {dtype}")

    def _fp8_block(inside: _Inside, how: Mapping[str, Any]) -> tuple[int, int]:
        if how.get("strategy") == "block":
            rows, columns = how["block_structure"]
            return int(rows), int(columns)
        return (1, 0) if inside.like("weight_scale").numel() > 1 else (0, 0)

    return _Scheme(
        ("weight_scale",),
        ("weight_scale", "weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx",
         "input_scale", "input_zero_point"),
        matrix,
    )  # fmt: skip


def _group_of(inside: _Inside, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What the config says of one map's weights: by its name, else by its class, of which there is one."""
    kinds = [g["weights"] for g in groups]
    if all(kind == kinds[0] for kind in kinds):
        return dict(kinds[0])
    for by_name in (True, False):
        for group in groups:
            if any(_targets(t, inside, by_name) for t in group.get("targets") or ()):
                return dict(group["weights"])
    return inside.refuse("no group of config.json has a target that is this map")


def _targets(target: str, inside: _Inside, by_name: bool) -> bool:
    if not by_name:
        return target == "Linear"
    if not target.startswith("re:"):
        return target == inside.prefix
    try:
        return re.match(target.removeprefix("re:"), inside.prefix) is not None
    except re.error as error:
        return inside.refuse(f"the target {target!r} is no regular expression ({error})")


def _pack_quantized(inside: _Inside, how: Mapping[str, Any]) -> Matrix:
    if how.get("type", "int") != "int":
        inside.refuse(f"packed numbers of the type {how['type']}")
    n, k = (int(size) for size in inside.read("weight_shape"))
    packed, scale = inside.like("weight_packed"), inside.like("weight_scale")
    bits = _bits(inside, how.get("num_bits"), packed.shape[-1], k)
    inside.expect("weight_packed", n, -(-k * bits // 32))
    group = _group(inside, how.get("group_size"), scale.shape[-1], k)
    inside.expect("weight_scale", n, -(-k // group))

    def zeros() -> Tensor | None:
        if "weight_zero_point" not in inside:
            return None
        found = inside.read("weight_zero_point")
        if found.shape == scale.shape and found.dtype == torch.int8:
            found = found.short() + 2 ** (bits - 1)
        else:
            inside.expect("weight_zero_point", -(-n * bits // 32), scale.shape[1])
            found = _unpack(found, bits, 0)[:n]
        return None if (found == 2 ** (bits - 1)).all() else found

    def groups() -> Tensor | None:
        return _in_order(group, inside.read("weight_g_idx")) if "weight_g_idx" in inside else None

    values = partial(_read_packed, inside, bits, k)
    scales = partial(inside.read, "weight_scale")
    return _Integers(bits, (n, k), group, values, scales, zeros, groups).matrix()


def _read_packed(inside: _Inside, bits: int, k: int) -> Tensor:
    return _unpack(inside.read("weight_packed"), bits, 1)[:, :k]


def _int_quantized(inside: _Inside, how: Mapping[str, Any]) -> Matrix:
    n, k = inside.like("weight").shape
    if "weight_zero_point" in inside and inside.read("weight_zero_point").any():
        inside.refuse("plain INT8 with zero points")
    scale = inside.like("weight_scale")
    if scale.numel() == 1:
        return _Integers(
            8, (n, k), k, lambda: inside.read("weight").short() + 128,
            lambda: inside.read("weight_scale").reshape(1, 1).expand(n, 1), _none, _none,
        ).matrix()  # fmt: skip
    group = _group(inside, how.get("group_size"), scale.shape[-1] if scale.dim() > 1 else 1, k)
    count = -(-k // group)
    if scale.numel() != n * count:
        inside.refuse(f"weight_scale is {list(scale.shape)}, and {[n, count]} is expected")
    return _Integers(
        8, (n, k), group, lambda: inside.read("weight").short() + 128,
        lambda: inside.read("weight_scale").reshape(n, count), _none, _none,
    ).matrix()  # fmt: skip


def _none() -> None:
    return None


_PACKED_BY_INPUT = ("qweight", "qzeros", "scales", "g_idx")


def _awq(config: Mapping[str, Any], where: str) -> _Scheme:
    if str(config.get("version", "gemm")).lower() != "gemm":
        _refuse(where, f"AWQ in the layout {config['version']}")

    def matrix(inside: _Inside) -> Matrix:
        k, words = inside.like("qweight").shape
        n, count = inside.like("scales").shape[1], inside.like("scales").shape[0]
        if _bits(inside, config.get("bits"), words, n) != 4:
            inside.refuse("AWQ of 8 bits")
        group = _group(inside, config.get("group_size"), count, k)
        inside.expect("qzeros", count, words)

        def unpacked(name: str) -> Tensor:
            return _unpack(inside.read(name), 4, 1, _AWQ_ORDER).T

        def zeros() -> Tensor | None:
            return None if ((found := unpacked("qzeros")) == 8).all() else found

        return _Integers(
            4, (n, k), group, lambda: unpacked("qweight"), lambda: inside.read("scales").T, zeros, _none
        ).matrix()  # fmt: skip

    return _Scheme(("qweight",), (*_PACKED_BY_INPUT, "weight"), matrix)


def _gptq(config: Mapping[str, Any], where: str) -> _Scheme:
    version = config.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        _refuse(where, f"GPTQ in the layout {version}")

    def matrix(inside: _Inside) -> Matrix:
        words, n = inside.like("qweight").shape
        count = inside.like("scales").shape[0]
        inside.expect("scales", count, n)
        bits = int(config.get("bits", 4))
        if bits not in (4, 8):
            inside.refuse(f"GPTQ of {bits} bits")
        k = words * 32 // bits
        group = _group(inside, config.get("group_size"), count, k)
        inside.expect("qzeros", count, -(-n * bits // 32))
        if "g_idx" in inside:
            inside.expect("g_idx", k)

        def zeros() -> Tensor | None:
            found = _unpack(inside.read("qzeros"), bits, 1)[:, :n].T
            middle = 2 ** (bits - 1)
            if config.get("sym"):
                # What the stored zeros are tells the version better than config.json does.
                if not ((found == middle).all() or (found == middle - 1).all()):
                    inside.refuse(
                        "config.json says that it is symmetric, and its zero points differ"
                    )
                return None
            if version == "gptq":
                found = (found + 1) & (2**bits - 1)
            return None if (found == middle).all() else found

        def groups() -> Tensor | None:
            return _in_order(group, inside.read("g_idx")) if "g_idx" in inside else None

        return _Integers(
            bits, (n, k), group, lambda: _unpack(inside.read("qweight"), bits, 0).T,
            lambda: inside.read("scales").T, zeros, groups,
        ).matrix()  # fmt: skip

    return _Scheme(("qweight",), (*_PACKED_BY_INPUT, "weight"), matrix)


_SCHEMES: dict[str, Callable[[Mapping[str, Any], str], _Scheme]] = {
    "fp8": _block_fp8,
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
}
