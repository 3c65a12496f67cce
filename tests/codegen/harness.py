"""Kernels under test: a plan of independent steps, something that runs it, its reference in torch.

Every activation sits in the arena at an odd column of a wider buffer, and outputs are poisoned with NaN,
so that a kernel that ignores a pitch or leaves an element unwritten shows.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from tokenmill import codegen
from tokenmill.codegen import reference
from tokenmill.codegen.cpp import build
from tokenmill.codegen.cpp.target import parse_target
from tokenmill.ir import cache, packing, quant
from tokenmill.ir.cache import PAGE, Batch, CacheSpec
from tokenmill.ir.plan import (
    Attend,
    Buffer,
    CacheWrite,
    Capacity,
    Custom,
    Device,
    Embed,
    Experts,
    KernelSpec,
    LatentAttend,
    Linear,
    Norm,
    Operand,
    Plan,
    Pointwise,
    Route,
    SelectRows,
    Step,
)
from torch import Tensor

CAPACITY = Capacity(tokens=200, rows=16)
COLUMN, PITCH_EXTRA = 3, 8
PAGES = 24
DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i32": torch.int32,
}


def weights_of(spec: KernelSpec, rng: torch.Generator, device: Device = "cpu") -> dict[str, Tensor]:
    """Random weight operands of a kernel, in the order of ``device``."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    def matrix(name: str, *shape: int, prefix: str = "", parts: int = 1) -> dict[str, Tensor]:
        fmt = quant.parse(name)
        packed = quant.quantize(randn(*shape) * shape[-1] ** -0.5, fmt)
        if device == "cpu":
            packed = packing.pack(packed, fmt, parts)
        elif fmt.group:
            packed["q"] = packing.pack_halves(packed["q"])
        return {prefix + part: tensor for part, tensor in packed.items()}

    match spec:
        case Embed():
            return quant.quantize(randn(spec.vocab, spec.width), quant.parse(spec.format))
        case Norm():
            wanted = {"weight": spec.weight, "bias": spec.bias}
            return {name: randn(spec.width) for name, there in wanted.items() if there}
        case Linear():
            out = matrix(spec.format, spec.parts * spec.n, spec.k, parts=spec.parts)
            out |= {"bias": randn(spec.parts * spec.n)} if spec.bias else {}
            return out | {
                f"e{i}": randn(spec.n) for i, k in enumerate(spec.extras) if k == "channel"
            }
        case Pointwise():
            kinds = enumerate(spec.inputs)
            return {f"x{i}": randn(spec.width) for i, kind in kinds if kind == "channel"}
        case Custom():
            return {o.name: randn(*o.shape) for o in spec.operands if o.weight}
        case Attend():
            flags = {"sinks": (spec.sinks, 3.0), "slopes": (spec.slopes, 0.1)}
            return {name: size * randn(spec.heads) for name, (on, size) in flags.items() if on}
        case LatentAttend():
            up, fmt = (spec.heads, spec.nope, spec.latent), quant.parse(spec.up_format)
            w_uk = quant.quantize(randn(*up) * spec.latent**-0.5, fmt)
            if device == "cpu":
                turned = w_uk.pop(fmt.parts[0]).transpose(-1, -2)
                w_uk[fmt.parts[0]] = packing.pack_part(fmt.parts[0], turned, fmt, spec.latent)
            out = {f"w_uk_{name}": part for name, part in w_uk.items()}
            down = (spec.heads, spec.value, spec.latent)
            return out | matrix(spec.up_format, *down, prefix="w_uv_")
        case Route():
            return {"bias": randn(spec.experts)} if spec.router.bias else {}
        case Experts():
            parts = 2 if spec.gated else 1
            up = (spec.experts, parts * spec.inter, spec.hidden)
            down = (spec.experts, spec.hidden, spec.inter)
            biases = {"gate_up_bias": randn(*up[:2]), "down_bias": randn(*down[:2])}
            return (
                matrix(spec.gate_up_format, *up, prefix="gate_up_", parts=parts)
                | matrix(spec.down_format, *down, prefix="down_")
                | (biases if spec.biased else {})
            )
    return {}


def outputs_of(spec: KernelSpec) -> tuple[str, ...]:
    match spec:
        case CacheWrite():
            return ()
        case Route():
            return ("ids", "weights")
        case Norm(residual=True):
            return ("sum", "out")
    return ("out",)


def aligned(size: int) -> Tensor:
    """``size`` bytes on a cache line, all ones: NaN as float."""
    space = torch.full((size + 64,), 255, dtype=torch.uint8)
    return space[-space.data_ptr() % 64 :][:size]


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))


def load_library(binary: bytes) -> ctypes.CDLL:
    """The library, with the results of its functions typed."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        Path(file.name).write_bytes(binary)
        library = ctypes.CDLL(file.name)
    library.tm_isa.restype = ctypes.c_char_p
    library.tm_pool_create.restype = ctypes.c_void_p
    library.tm_workspace_bytes.restype = ctypes.c_int64
    return library


@dataclass
class Kernels:
    """A plan whose step ``i`` runs ``specs[i]`` alone on buffers of its own; subclasses execute it."""

    device: ClassVar[Device]

    specs: Sequence[KernelSpec]
    target: str
    # Out shares this operand's buffer.
    in_place: Mapping[KernelSpec, str] = field(default_factory=dict)
    column: int = COLUMN
    rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self.weights = [weights_of(spec, self.rng, self.device) for spec in self.specs]
        self.plan = self.planned(
            _plan(self.specs, self.weights, self.in_place, self.column, self.device)
        )
        self.caches = {c.name: cache.allocate(c, PAGES) for c in self.plan.caches}
        self.arena = aligned(self.plan.arena_bytes)
        self.files = codegen.emit(self.plan, self.target)

    def planned(self, plan: Plan) -> Plan:
        return plan

    def execute(self, index: int, batch: Batch, ids: Tensor, rows: Tensor, threads: int) -> None:
        """Run one step on the arena."""
        raise NotImplementedError

    def index(self, spec: KernelSpec) -> int:
        return list(self.specs).index(spec)

    def cache_of(self, spec: KernelSpec) -> Tensor:
        return self.caches[f"{self.index(spec)}.cache"]

    def operand(self, spec: KernelSpec, param: str, rows: int) -> Tensor:
        """The columns of an activation in the arena."""
        step = self.plan.steps[self.index(spec)]
        buffer = self.plan.buffers[step.bind[param].buffer]
        whole = self.arena[buffer.offset :].view(DTYPES[buffer.dtype])[: rows * buffer.width]
        width = reference.operand_width(spec, param)
        return whole.view(rows, buffer.width)[:, self.column : self.column + width]

    def run(
        self,
        spec: KernelSpec,
        batch: Batch,
        inputs: dict[str, Tensor],
        threads: int = 1,
        rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Outputs of the compiled kernel; everything around them must stay poisoned."""
        index = self.index(spec)
        step, count = self.plan.steps[index], len(batch.positions)
        selected = rows if rows is not None else torch.zeros(0, dtype=torch.int32)
        extent = len(selected) if step.rows == "rows" else count
        self.arena.fill_(255)  # NaN as float, -1 as int
        ids = inputs.get("index", torch.zeros(count, dtype=torch.int32))
        for name, value in inputs.items():
            if name in step.bind and self.plan.buffers[step.bind[name].buffer].kind == "arena":
                self.operand(spec, name, len(value))[:] = value
        before = self.arena.clone()
        self.execute(index, batch, ids, selected, threads)
        names = outputs_of(spec)
        out = {n: self.operand(spec, n, extent).clone() for n in names}
        after, self.arena = self.arena, before
        for name in names:  # put the outputs in place: then nothing else may differ
            self.operand(spec, name, extent)[:] = out[name]
        self.arena, same = after, torch.equal(after, before)
        assert same, "written outside of the outputs"
        return out

    def expected(
        self,
        spec: KernelSpec,
        batch: Batch,
        inputs: dict[str, Tensor],
        rows: Tensor | None = None,
        e4m3: bool = False,
    ) -> dict[str, Tensor]:
        """The same by the torch reference."""
        bind = self.plan.steps[self.index(spec)].bind
        operands = {**self.weights[self.index(spec)], **inputs}
        for name in inputs:  # as the arena holds it
            if name in bind and (buffer := self.plan.buffers[bind[name].buffer]).kind == "arena":
                operands[name] = inputs[name].to(DTYPES[buffer.dtype])
        if f"{self.index(spec)}.cache" in self.caches:
            operands["cache"] = self.cache_of(spec)
        if isinstance(spec, SelectRows) and rows is not None:
            operands["index"] = rows
        if isinstance(spec, Pointwise):
            operands["out"] = torch.empty(len(batch.positions), spec.width)
        return reference.run(spec, operands, batch, self.device, e4m3)


@dataclass
class CpuKernels(Kernels):
    """The plan's library, through ctypes."""

    device: ClassVar[Device] = "cpu"

    target: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.library = load_library(build.build_cpu(self.files, parse_target(self.target)))
        self.pools: dict[int, tuple[ctypes.c_void_p, Tensor]] = {}

    def pool(self, threads: int) -> tuple[ctypes.c_void_p, Tensor]:
        """A pool with its workspace, which starts as NaN."""
        if threads not in self.pools:
            pool = ctypes.c_void_p(self.library.tm_pool_create(threads))
            self.pools[threads] = pool, aligned(self.library.tm_workspace_bytes(threads))
        return self.pools[threads]

    def close(self) -> None:
        for pool, _ in self.pools.values():
            self.library.tm_pool_destroy(pool)

    def execute(self, index: int, batch: Batch, ids: Tensor, rows: Tensor, threads: int) -> None:
        args, keep = self._args(batch, ids, rows, threads)
        code = self.library.tm_run(self.pool(threads)[0], ctypes.byref(args), index, index + 1)
        assert code == 0
        assert keep

    def _args(
        self, batch: Batch, ids: Tensor, rows: Tensor, threads: int
    ) -> tuple[Args, list[object]]:
        flat = [t for parts in self.weights for t in parts.values()]
        weights, caches = pointers(flat), pointers(list(self.caches.values()))
        ints = [t.int().contiguous() for t in (ids, *batch[:1], rows, *batch[1:])]
        ids, positions, rows, starts, table = ints
        args = Args(
            len(positions), len(starts) - 1, len(rows), table.shape[1],
            ids.data_ptr(), positions.data_ptr(), rows.data_ptr(), starts.data_ptr(), table.data_ptr(),
            ctypes.cast(weights, ctypes.c_void_p), ctypes.cast(caches, ctypes.c_void_p),
            self.arena.data_ptr(), self.pool(threads)[1].data_ptr(),
        )  # fmt: skip
        return args, [weights, caches, ints]


class Args(ctypes.Structure):
    """``tm_args`` of codegen/ABI.md."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("tokens", "sequences", "rows", "table_stride")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("ids", "positions", "row_index", "starts", "block_table"),
                *("weights", "caches", "arena", "workspace"),
            )
        ),
    ]


def _plan(
    specs: Sequence[KernelSpec],
    weights: Sequence[dict[str, Tensor]],
    in_place: Mapping[KernelSpec, str],
    column: int,
    device: Device,
) -> Plan:
    buffers: dict[str, Buffer] = {n: Buffer(n, "input", "i32") for n in ("ids", "rows")}
    caches: list[CacheSpec] = []
    steps: list[Step] = []
    offset = 0
    for i, (spec, parts) in enumerate(zip(specs, weights, strict=True)):
        rows = "rows" if isinstance(spec, SelectRows) else "tokens"
        bind: dict[str, Operand] = {}
        for name, tensor in parts.items():
            dtype = next(n for n, torch_dtype in DTYPES.items() if torch_dtype == tensor.dtype)
            buffers[f"{i}.{name}"] = Buffer(
                f"{i}.{name}", "weight", dtype, shape=tuple(tensor.shape)
            )
        for param in spec.params:
            name = f"{i}.{param}"
            if param in parts:
                bind[param] = Operand(name)
            elif param == "index":
                bind[param] = Operand("rows" if isinstance(spec, SelectRows) else "ids")
            elif param == "out" and spec in in_place:
                bind[param] = bind[in_place[spec]]
            elif param == "cache":
                caches.append(replace(spec.cache, name=name))
                buffers[name] = Buffer(name, "cache", "u8", width=spec.cache.row_bytes)
                bind[param] = Operand(name)
            else:
                width = -(-reference.operand_width(spec, param) // 8) * 8 + PITCH_EXTRA
                dtype = "i32" if param == "ids" else "f32"
                buffers[name] = Buffer(name, "arena", dtype, rows, width, offset=offset)
                offset += -(-CAPACITY.tokens * width * 4 // 64) * 64
                bind[param] = Operand(name, column)
        steps.append(Step(spec, bind, rows, f"layer {i}"))
    positions = PAGES * PAGE
    return Plan(
        buffers, tuple(steps), tuple(caches), CAPACITY, offset, "", 1, positions, device=device
    )


def batch_of(*sequences: tuple[int, int]) -> Batch:
    """Sequences of (tokens already in the cache, tokens of this step), on shuffled pages."""
    pages = iter(torch.randperm(PAGES, generator=torch.Generator().manual_seed(1)).tolist())
    positions, starts, tables = [], [0], []
    for past, new in sequences:
        positions += range(past, past + new)
        starts.append(starts[-1] + new)
        tables.append([next(pages) for _ in range(-(-(past + new) // PAGE))])
    width = max((len(t) for t in tables), default=0) + 1
    rows = [table + [-1] * (width - len(table)) for table in tables]
    return Batch(
        torch.tensor(positions, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(rows, dtype=torch.int32).view(len(rows), width),
    )


def inputs_of(kernels: Kernels, spec: KernelSpec, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
    """Random activations of a kernel; its cache gets random rows, and garbage where nothing lives."""
    rng = torch.Generator().manual_seed(seed)
    count = len(batch.positions)
    found: dict[str, Tensor] = {}
    for param in spec.params:
        width = reference.operand_width(spec, param)
        if param in outputs_of(spec) or param in kernels.weights[kernels.index(spec)]:
            continue
        if param == "index":
            vocab = spec.vocab if isinstance(spec, Embed) else 1
            found[param] = torch.randint(vocab, (count,), generator=rng, dtype=torch.int32)
        elif param == "ids":
            scores = torch.rand(count, spec.experts, generator=rng)
            found[param] = scores.topk(spec.top_k, -1).indices.int()
        elif param == "cache":
            _fill_cache(spec.cache, kernels.cache_of(spec), batch, rng)
        else:
            found[param] = torch.randn(count, width, generator=rng)
    return found


def _fill_cache(spec: CacheSpec, rows: Tensor, batch: Batch, rng: torch.Generator) -> None:
    """All contexts up to the newest token; every other row holds NaN bits."""
    rows.fill_(255)
    for b in range(len(batch.starts) - 1):
        lo, hi = batch.starts[b : b + 2].tolist()
        if hi > lo:
            at = torch.arange(int(batch.positions[hi - 1]) + 1)
            parts = [torch.randn(len(at), p.width, generator=rng) for p in spec.parts]
            rows[batch.block_table[b, at // PAGE].long(), at % PAGE] = cache.encode(spec, parts)


def used_bytes(spec: CacheSpec) -> Tensor:
    """Which bytes of a row mean something: those between values and scales only align them."""
    used = torch.zeros(spec.row_bytes, dtype=torch.bool)
    for place in spec.places:
        used[place.values : place.values + place.bytes] = True
        if place.scales is not None:
            used[place.scales : place.scales + 4 * place.part.tiles] = True
    return used


def e4m3_ladder() -> Tensor:
    """Every finite E4M3 number, every number halfway to the next, and those just beside."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(halves, torch.tensor(limit)) for limit in (0.0, 448.0)]
    positive = torch.cat([codes, halves, *beside])  # 505, and their opposites
    return torch.cat([positive, -positive, torch.zeros(-2 * len(positive) % 15)])
