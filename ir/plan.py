"""The Plan: what is left of a model when only kernels and buffers remain.

A plan is a flat list of steps over named buffers.  A step binds a :data:`KernelSpec` (hashable, says
everything that code generation needs and nothing else; layers of the same structure share one) to
operands, or is an extern step that torch runs.  Activations are row-major ``[rows, width]`` where rows is
the step's token count ``T`` or its count of selected output rows ``R``; an operand may be a column range of a
buffer, so splitting and joining along columns cost nothing.  A plan is made for a kind of device: on a CPU
activations are fp32, on a GPU most are bf16 (:mod:`passes.narrow`), and matrices that kernels multiply with
are stored in the order that reads best there (:mod:`ir.packing`).

>>> spec = Linear(n=64, k=32, format="int8")
>>> spec.params
('x', 'q', 'scale', 'out')
>>> load_spec(dump_spec(spec)) == spec
True
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from . import quant
from .cache import CacheSpec, Part
from .router import RouterSpec

PLAN_VERSION = 1

# --- buffers ----------------------------------------------------------------------------------------

Rows: TypeAlias = Literal["tokens", "rows", "fixed"]
Device: TypeAlias = Literal["cpu", "cuda"]
DTYPE_BYTES = {
    "f32": 4,
    "bf16": 2,
    "f16": 2,
    "i8": 1,
    "u8": 1,
    "e4m3": 1,
    "i32": 4,
    "i64": 8,
    "bool": 1,
}


@dataclass(frozen=True)
class Buffer:
    """A named array.

    ``input``  what the runtime fills per step: ids, positions, rows, starts, block_table
    ``weight`` a tensor in weights/*.safetensors, under the same name, of ``shape``
    ``cache``  the paged rows of one CacheSpec
    ``arena``  an activation ``[rows, width]`` at byte ``offset`` of the arena, planned for the capacity
    """

    name: str
    kind: Literal["input", "weight", "cache", "arena"]
    dtype: str
    rows: Rows = "fixed"
    width: int = 1
    shape: tuple[int, ...] = ()
    offset: int = -1

    def bytes(self, capacity: Capacity) -> int:
        count = {"tokens": capacity.tokens, "rows": capacity.rows, "fixed": 1}[self.rows]
        return count * self.width * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Operand:
    """A buffer, or the columns from ``column`` on of an arena buffer (whose width stays the row pitch)."""

    buffer: str
    column: int = 0


@dataclass(frozen=True)
class Capacity:
    """The most that one step may carry; the arena is planned for it."""

    tokens: int = 512
    rows: int = 64


# --- kernel specs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embed:
    """out[t] = table[ids[t]]; ``index`` is the input that selects: ids, or positions for a RoPE table.

    The table is in rows, whatever the device: ``[vocab, width]``, INT8 with one scale per row.
    """

    kind: ClassVar[str] = "embed"
    vocab: int
    width: int
    format: Literal["fp32", "bf16", "int8"]

    @property
    def params(self) -> tuple[str, ...]:
        return ("index", *quant.parse(self.format).parts, "out")


@dataclass(frozen=True)
class SelectRows:
    """out[r] = x[rows[r]]: the rows that go through the head."""

    kind: ClassVar[str] = "select_rows"
    width: int

    @property
    def params(self) -> tuple[str, ...]:
        return ("x", "index", "out")


@dataclass(frozen=True)
class Norm:
    """Per row and head: x / rms(x) * weight, or layer norm; with ``residual`` first x += r, kept in ``sum``.

    Row layout ``[heads, width]``; the weight ``[width]`` is shared by the heads (q/k norms).
    """

    kind: ClassVar[str] = "norm"
    width: int
    eps: float
    heads: int = 1
    center: bool = False
    weight: bool = True
    bias: bool = False
    residual: bool = False

    @property
    def params(self) -> tuple[str, ...]:
        return (
            "x",
            *(("residual",) if self.residual else ()),
            *(("weight",) if self.weight else ()),
            *(("bias",) if self.bias else ()),
            *(("sum",) if self.residual else ()),
            "out",
        )


@dataclass(frozen=True)
class Linear:
    """out = epilogue(x W^T + bias).

    ``parts = 2``: the weight is ``[2n, k]``, and the epilogue sees ``acc0`` (row i) and ``acc1`` (row
    n + i), which is how SwiGLU is fused.  Extra operands ``e0, e1, ...`` of the epilogue are ``row`` (an
    activation [rows, n]) or ``channel`` (a weight [n], fp32).
    """

    kind: ClassVar[str] = "linear"
    n: int
    k: int
    format: str
    bias: bool = False
    parts: int = 1
    epilogue: str = "acc0"
    extras: tuple[Literal["row", "channel"], ...] = ()

    @property
    def params(self) -> tuple[str, ...]:
        return (
            "x",
            *quant.parse(self.format).parts,
            *(("bias",) if self.bias else ()),
            *(f"e{i}" for i in range(len(self.extras))),
            "out",
        )


@dataclass(frozen=True)
class Pointwise:
    """out[r, i] = expr(x0, x1, ...); inputs are ``row`` [rows, width], ``scalar`` [rows, 1], ``channel``."""

    kind: ClassVar[str] = "pointwise"
    width: int
    expr: str
    inputs: tuple[Literal["row", "scalar", "channel"], ...]

    @property
    def params(self) -> tuple[str, ...]:
        return (*(f"x{i}" for i in range(len(self.inputs))), "out")


@dataclass(frozen=True)
class Rope:
    """Rotate columns offset:offset+rotary of each head by the angles whose cos/sin rows are given.

    Pairs are (i, i + rotary/2), or (2i, 2i+1) if interleaved; cos and sin are ``[T, rotary/2]``.  Other
    columns are copied.  In place when out is x.
    """

    kind: ClassVar[str] = "rope"
    heads: int
    head_dim: int
    rotary: int
    offset: int = 0
    interleaved: bool = False

    @property
    def params(self) -> tuple[str, ...]:
        return ("x", "cos", "sin", "out")


@dataclass(frozen=True)
class CacheWrite:
    """Store each token's parts in its row of the paged cache."""

    kind: ClassVar[str] = "cache_write"
    format: str
    parts: tuple[Part, ...]

    @property
    def params(self) -> tuple[str, ...]:
        return (*(f"p{i}" for i in range(len(self.parts))), "cache")

    @property
    def cache(self) -> CacheSpec:
        return CacheSpec("", self.format, self.parts)


@dataclass(frozen=True)
class Attend:
    """Causal grouped-query attention over a paged cache of keys [heads_kv, head_dim] and values.

    A query at position p sees keys j with p - window < j <= p (window 0: all before it).  ``softcap`` c
    maps scores to c tanh(s / c); ``sinks`` adds one logit per head to the denominator; ``slopes`` one times
    j - p to every score (ALiBi).
    """

    kind: ClassVar[str] = "attend"
    heads: int
    heads_kv: int
    head_dim: int
    value_dim: int
    scale: float
    cache_format: str
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    slopes: bool = False

    @property
    def params(self) -> tuple[str, ...]:
        flags = {"sinks": self.sinks, "slopes": self.slopes}
        return ("q", *(name for name, there in flags.items() if there), "cache", "out")

    @property
    def cache(self) -> CacheSpec:
        return gqa_cache("", self.cache_format, self.heads_kv, self.head_dim, self.value_dim)


# What ``LatentAttend.absorb_below`` is on a device.  Counting the expansion, absorbed attention of Sq queries
# and Skv keys takes fewer operations for Sq < 171 (1 - Sq / Skv).  On a GPU buckets with room for a longer
# chunk have launches for it, which a step of many sequences with a token each is spared.
ABSORB_BELOW: dict[Device, int] = {"cpu": 128, "cuda": 256}


@dataclass(frozen=True)
class LatentAttend:
    """Multi-head latent attention over a paged cache of latents [latent] and shared rotary keys [rope].

    ``q`` is [heads, nope + rope]; w_uk [heads, nope, latent] and w_uv [heads, value, latent].  Panels of
    w_uk have the latents as rows and nope as inputs; its INT8 scales stay [heads, nope].
    Absorbed: score = scale (q_nope w_uk . c + q_pe . k_pe), out = w_uv sum(p c).  Expanded: k =
    [w_uk c, k_pe], v = w_uv c.  Both are this op; a kernel picks by query count (``absorb_below``).
    """

    kind: ClassVar[str] = "latent_attend"
    heads: int
    nope: int
    rope: int
    latent: int
    value: int
    scale: float
    cache_format: str
    up_format: Literal["fp32", "bf16", "int8"] = "bf16"
    absorb_below: int = ABSORB_BELOW["cpu"]

    @property
    def params(self) -> tuple[str, ...]:
        parts = quant.parse(self.up_format).parts
        ups = (f"{up}_{part}" for up in ("w_uk", "w_uv") for part in parts)
        return ("q", *ups, "cache", "out")

    @property
    def cache(self) -> CacheSpec:
        return latent_cache("", self.cache_format, self.latent, self.rope)


@dataclass(frozen=True)
class Route:
    """ids i32 [T, top_k], weights [T, top_k] = route(logits [T, experts], bias [experts])."""

    kind: ClassVar[str] = "route"
    experts: int
    router: RouterSpec

    @property
    def params(self) -> tuple[str, ...]:
        return ("logits", *(("bias",) if self.router.bias else ()), "ids", "weights")


@dataclass(frozen=True)
class Experts:
    """out[t] = (residual[t] +) sum_j weights[t, j] down_e(act(gate_up_e(x[t]))), e = ids[t, j].

    ``gate_up`` is [experts, 2 inter, hidden] (gate rows first; [experts, inter, hidden] if not
    ``gated``), ``down`` [experts, hidden, inter], both with biases if ``biased``.  ``activation`` is an
    expression of acc0 (and acc1).
    Weights of experts that no token chose are never read.
    """

    kind: ClassVar[str] = "experts"
    experts: int
    top_k: int
    hidden: int
    inter: int
    gate_up_format: str
    down_format: str
    activation: str = "silu(acc0) * acc1"
    gated: bool = True
    residual: bool = False
    biased: bool = False

    @property
    def params(self) -> tuple[str, ...]:
        up = tuple(f"gate_up_{p}" for p in quant.parse(self.gate_up_format).parts)
        down = tuple(f"down_{p}" for p in quant.parse(self.down_format).parts)
        biases = ("gate_up_bias", "down_bias") if self.biased else ()
        residual = ("residual",) if self.residual else ()
        return ("x", "ids", "weights", *up, *down, *biases, *residual, "out")


@dataclass(frozen=True)
class Extern:
    """A step that torch runs, ``op`` an overload name such as ``aten.cumsum.default``.

    ``args`` is JSON text ``{"args": [...], "kwargs": {...}}`` of the op's arguments.  Plain values stand
    for themselves, objects for what JSON cannot say:

    ``{"operand": "x0", "columns": 8, "shape": [1, -1, 2, 4], "dtype": "float32"}``
        a parameter: 8 columns of every row, reshaped (-1: the dim that counts rows), as that torch dtype
    ``{"size": "tokens", "times": 4}``
        four times the step's token count (or, with "rows", its count of selected rows)
    ``{"dtype": "float32"}``
        ``torch.float32``

    ``item`` picks one of several results (-1: there is just one).  The result has ``out_shape`` (-1 as
    above); its numbers, cast to ``out_dtype``, fill the rows of ``out`` in order.  Between steps integers
    are i32.
    """

    kind: ClassVar[str] = "extern"
    op: str
    operands: tuple[str, ...]
    args: str
    out_dtype: str
    out_shape: tuple[int, ...]
    item: int = -1

    @property
    def params(self) -> tuple[str, ...]:
        return (*self.operands, "out")


@dataclass(frozen=True)
class Shaped:
    """A tensor that a custom op takes: a row of an activation has ``shape``, a weight is whole."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    weight: bool = False

    @property
    def width(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


@dataclass(frozen=True)
class Custom:
    """out = op(operands, attributes) for every row by itself, an ``op`` of :mod:`tokenmill.extend`.

    ``attributes`` are the arguments that are no tensors, by name; a row of the result has ``shape``.
    """

    kind: ClassVar[str] = "custom"
    op: str
    operands: tuple[Shaped, ...]
    attributes: tuple[tuple[str, int | float | bool | str | None], ...]
    shape: tuple[int, ...]

    @property
    def params(self) -> tuple[str, ...]:
        return (*(o.name for o in self.operands), "out")

    @property
    def out(self) -> Shaped:
        return Shaped("out", self.shape, "f32")


Link: TypeAlias = Norm | Pointwise | Rope | CacheWrite


@dataclass(frozen=True)
class Chain:
    """Kernels that work on every token by itself, in one launch.

    Links of a branch run one after the other, and branches in any order: they share nothing that one of them
    writes.  Parameters are those of all links, numbered: ``x_0`` of the first, ``x_1`` of the next.
    """

    kind: ClassVar[str] = "chain"
    branches: tuple[tuple[Link, ...], ...]

    @property
    def links(self) -> tuple[Link, ...]:
        return tuple(link for branch in self.branches for link in branch)

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(f"{p}_{i}" for i, link in enumerate(self.links) for p in link.params)


KernelSpec: TypeAlias = (
    Embed
    | SelectRows
    | Norm
    | Linear
    | Pointwise
    | Rope
    | CacheWrite
    | Attend
    | LatentAttend
    | Route
    | Experts
    | Custom
    | Chain
    | Extern
)
KINDS: dict[str, type[KernelSpec]] = {cls.kind: cls for cls in get_args(KernelSpec)}


def gqa_cache(name: str, fmt: str, heads_kv: int, head_dim: int, value_dim: int) -> CacheSpec:
    key = Part("key", heads_kv * head_dim, head_dim)
    return CacheSpec(name, fmt, (key, Part("value", heads_kv * value_dim, value_dim)))


def latent_cache(name: str, fmt: str, latent: int, rope: int) -> CacheSpec:
    """FP8 is for latents: rotary keys, of which there are few, would lose most, and stay BF16 then."""
    rotary = Part("rope", rope, 128, "bf16" if fmt == "fp8" else None)
    return CacheSpec(name, fmt, (Part("latent", latent, 128), rotary))


def operand_width(spec: KernelSpec, param: str) -> int:
    """Columns that a kernel reads or writes of an activation; 0 where it takes what is there."""
    match spec, param:
        case Linear(), "x":
            return spec.k
        case Linear(), _:
            return spec.n
        case Norm(), _:
            return spec.heads * spec.width
        case Rope(), "cos" | "sin":
            return spec.rotary // 2
        case Rope(), _:
            return spec.heads * spec.head_dim
        case Pointwise(), str(p) if p != "out" and spec.inputs[int(p[1:])] == "scalar":
            return 1
        case ((Embed() | SelectRows() | Pointwise()), _):
            return spec.width
        case CacheWrite(), str(p) if p != "cache":
            return spec.parts[int(param[1:])].width
        case Attend(), "q":
            return spec.heads * spec.head_dim
        case Attend(), _:
            return spec.heads * spec.value_dim
        case LatentAttend(), "q":
            return spec.heads * (spec.nope + spec.rope)
        case LatentAttend(), _:
            return spec.heads * spec.value
        case Route(), "logits":
            return spec.experts
        case Route(), _:
            return spec.router.top_k
        case Experts(), "ids" | "weights":
            return spec.top_k
        case Experts(), _:
            return spec.hidden
        case Custom(), _:
            shaped = next(o for o in (*spec.operands, spec.out) if o.name == param)
            return 0 if shaped.weight else shaped.width
        case Chain(), _:
            name, _, link = param.rpartition("_")
            return operand_width(spec.links[int(link)], name)
        case Extern(), "out":
            return prod(size for size in spec.out_shape if size >= 0)
    return 0


# --- the plan ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """``where`` is the place in the user's model that the step computes; ``rows`` what it iterates over."""

    spec: KernelSpec
    bind: Mapping[str, Operand]
    rows: Rows
    where: str = ""

    @property
    def links(self) -> tuple[Step, ...]:
        """The steps that a chain stands for; any other step itself."""
        if not isinstance(self.spec, Chain):
            return (self,)
        return tuple(
            Step(link, {p: self.bind[f"{p}_{i}"] for p in link.params}, self.rows, self.where)
            for i, link in enumerate(self.spec.links)
        )


@dataclass(frozen=True)
class Plan:
    """``output`` names the arena buffer of logits ``[R, vocab]``; ``positions`` bounds a sequence."""

    buffers: Mapping[str, Buffer]
    steps: tuple[Step, ...]
    caches: tuple[CacheSpec, ...]
    capacity: Capacity
    arena_bytes: int
    output: str
    vocab: int
    positions: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    device: Device = "cpu"

    @property
    def specs(self) -> list[KernelSpec]:
        """Distinct kernels, in order of first use."""
        return list(dict.fromkeys(s.spec for s in self.steps))

    @property
    def extern_steps(self) -> list[Step]:
        return [s for s in self.steps if isinstance(s.spec, Extern)]


def dump_spec(spec: KernelSpec) -> dict[str, Any]:
    if isinstance(spec, Chain):
        branches = [[dump_spec(link) for link in branch] for branch in spec.branches]
        return {"kind": spec.kind, "branches": branches}
    return {"kind": spec.kind, **dataclasses.asdict(spec)}


def load_spec(data: Mapping[str, Any]) -> KernelSpec:
    fields: dict[str, Any] = {k: v for k, v in data.items() if k != "kind"}
    cls = KINDS[data["kind"]]
    if cls is Chain:
        return Chain(tuple(tuple(map(_load_link, branch)) for branch in fields["branches"]))
    if cls is Route:
        fields["router"] = RouterSpec(**fields["router"])
    if cls is CacheWrite:
        fields["parts"] = [Part(**p) for p in fields["parts"]]
    if cls is Custom:
        shaped = [o | {"shape": tuple(o["shape"])} for o in fields["operands"]]
        fields["operands"] = [Shaped(**o) for o in shaped]
        fields["attributes"] = [(name, value) for name, value in fields["attributes"]]
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return cls(**values)


def _load_link(data: Mapping[str, Any]) -> Link:
    link = load_spec(data)
    assert isinstance(link, Link)
    return link


def dump(plan: Plan) -> dict[str, Any]:
    """JSON form: specs once, steps refer to them by index."""
    specs = plan.specs
    index = {spec: i for i, spec in enumerate(specs)}
    return {
        "version": PLAN_VERSION,
        "device": plan.device,
        "capacity": dataclasses.asdict(plan.capacity),
        "arena_bytes": plan.arena_bytes,
        "output": plan.output,
        "vocab": plan.vocab,
        "positions": plan.positions,
        "meta": dict(plan.meta),
        "caches": [dataclasses.asdict(c) | {"row_bytes": c.row_bytes} for c in plan.caches],
        "buffers": [dataclasses.asdict(b) for b in plan.buffers.values()],
        "specs": [dump_spec(s) for s in specs],
        "steps": [
            {
                "spec": index[s.spec],
                "rows": s.rows,
                "where": s.where,
                "bind": {p: [s.bind[p].buffer, s.bind[p].column] for p in s.spec.params},
            }
            for s in plan.steps
        ],
    }


def load(data: Mapping[str, Any]) -> Plan:
    """The inverse of :func:`dump`."""
    specs = [load_spec(s) for s in data["specs"]]
    buffers = [Buffer(**{**b, "shape": tuple(b["shape"])}) for b in data["buffers"]]
    return Plan(
        buffers={b.name: b for b in buffers},
        steps=tuple(
            Step(
                specs[s["spec"]],
                {p: Operand(*at) for p, at in s["bind"].items()},
                s["rows"],
                s["where"],
            )
            for s in data["steps"]
        ),
        caches=tuple(
            CacheSpec(c["name"], c["format"], tuple(Part(**p) for p in c["parts"]))
            for c in data["caches"]
        ),
        capacity=Capacity(**data["capacity"]),
        arena_bytes=data["arena_bytes"],
        output=data["output"],
        vocab=data["vocab"],
        positions=data["positions"],
        meta=data["meta"],
        device=data["device"],
    )
