"""Small programs written by hand, and what tests do with them: run, compare, execute a plan."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenmill.codegen import reference
from tokenmill.ir import cache as kv
from tokenmill.ir.ops import dump_router
from tokenmill.ir.plan import DTYPE_BYTES, Extern, Plan, Step, gqa_cache, latent_cache
from tokenmill.ir.program import Program, Stage, Weights
from tokenmill.ir.router import RouterSpec
from tokenmill.passes.base import Pass
from tokenmill.passes.memory import lifetimes
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

aten, mill = torch.ops.aten, torch.ops.tokenmill
LENGTHS = (1, 2, 7, 65)
VOCAB, HIDDEN, POSITIONS = 11, 8, 128


class Builder:
    """Writes a program node by node; weights are random, the first node is at module ``path``."""

    def __init__(self, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        graph = fx.Graph()
        self.program = Program(graph, Weights({}), VOCAB, POSITIONS, Stage.CACHED)
        self.path = "model"
        ids = torch.zeros(1, 7, dtype=torch.int64)
        mode = FakeTensorMode(shape_env=ShapeEnv())
        dynamic = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC])
        symbolic = mode.from_tensor(ids, symbolic_context=dynamic)
        self.ids, self.positions = (self._input(n, symbolic) for n in ("ids", "positions"))
        self.rows = self._input("rows", symbolic[0])
        self.starts = self._input("starts", _fake(mode, 2))
        self.table = self._input("block_table", _fake(mode, 1, 1))

    def _input(self, name: str, value: Tensor) -> fx.Node:
        node = self.program.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def weight(self, name: str, *shape: int, scale: float = 0.5) -> fx.Node:
        if name not in self.program.weights:
            self.program.weights.add(name, torch.randn(shape, generator=self.random) * scale)
        return self.program.weight(name)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.program.call(target, *args, **kwargs)
        node.meta["nn_module_stack"] = {"here": (f"model.{self.path}", None)}
        return node

    def embed(self, name: str = "embed.weight", width: int = HIDDEN) -> fx.Node:
        return self(mill.embed.default, [self.weight(name, VOCAB, width)], self.ids, "fp32")

    def linear(self, x: fx.Node, name: str, n: int, bias: bool = False) -> fx.Node:
        k = x.meta["val"].shape[-1]
        extra = (self.weight(f"{name}.bias", n),) if bias else ()
        return self(aten.linear.default, x, self.weight(f"{name}.weight", n, k), *extra)

    def norm(self, x: fx.Node, name: str) -> fx.Node:
        return self(mill.rms_norm.default, x, self.weight(name, x.meta["val"].shape[-1]), 1e-6)

    def view(self, x: fx.Node, *sizes: int) -> fx.Node:
        return self(aten.reshape.default, x, list(sizes))

    def cut(self, x: fx.Node, start: int, end: int) -> fx.Node:
        return self(aten.slice.Tensor, x, len(x.meta["val"].shape) - 1, start, end)

    def cache(self, spec: kv.CacheSpec) -> fx.Node:
        self.program.caches.append(spec)
        with self.program.graph.inserting_after(self.table):
            value = _fake(self.table.meta["val"].fake_mode, 1, kv.PAGE, spec.row_bytes)
            return self._input(spec.name, value)

    def finish(self, x: fx.Node, head: str = "head.weight") -> Program:
        """Select rows, go through the head, and end."""
        x = self(mill.select_rows.default, x, self.rows)
        k = x.meta["val"].shape[-1]
        return self.end(self(aten.linear.default, x, self.weight(head, VOCAB, k)))

    def end(self, logits: fx.Node) -> Program:
        self.program.graph.output(logits)
        self.program.graph.lint()
        return self.program

    # --- the blocks of a decoder ---

    def angles(self, pairs: int) -> tuple[fx.Node, fx.Node]:
        tables = [self.weight(f"rope.{n}", POSITIONS, pairs) for n in ("cos", "sin")]
        cos, sin = (self(mill.embed.default, [t], self.positions, "fp32") for t in tables)
        return cos, sin

    def attention(self, x: fx.Node, angles: tuple[fx.Node, fx.Node]) -> fx.Node:
        """Grouped-query attention with q/k norms: 4 query heads, 2 key heads of 4."""
        q, k, v = (
            self.linear(x, f"{self.path}.{n}", w) for n, w in (("q", 16), ("k", 8), ("v", 8))
        )
        q, k, v = self.view(q, 1, -1, 4, 4), self.view(k, 1, -1, 2, 4), self.view(v, 1, -1, 2, 4)
        q, k = (
            self(mill.rope.default, self.norm(h, f"{self.path}.{n}_norm"), *angles, 0, False)
            for h, n in ((q, "q"), (k, "k"))
        )
        cache = self.cache(gqa_cache(f"cache.{self.path}", "fp32", 2, 4, 4))
        batch = (cache, self.positions, self.starts, self.table)
        out = self(mill.cached_attention.default, q, k, v, None, *batch, 0.5, 0, 0.0, "fp32")
        return self.linear(self.view(out, 1, -1, 16), f"{self.path}.o", HIDDEN)

    def latent_attention(self, x: fx.Node, angles: tuple[fx.Node, fx.Node]) -> fx.Node:
        """Multi-head latent attention: 2 heads of 4 + 4, latents of 6, values of 3."""
        path = self.path
        down = self.linear(x, f"{path}.kv_a", 10)
        low = self.norm(self.linear(x, f"{path}.q_a", 8), f"{path}.q_norm")
        q = self.view(self.linear(low, f"{path}.q_b", 16), 1, -1, 2, 8)
        q = self(mill.rope.default, q, *angles, 4, True)
        latent = self.norm(self.cut(down, 0, 6), f"{path}.kv_norm")
        key = self(
            mill.rope.default, self.view(self.cut(down, 6, 10), 1, -1, 1, 4), *angles, 0, True
        )
        up = [self.weight(f"{path}.w_uk", 2, 4, 6)], [self.weight(f"{path}.w_uv", 2, 3, 6)]
        cache = self.cache(latent_cache(f"cache.{path}", "fp32", 6, 4))
        batch = (cache, self.positions, self.starts, self.table)
        args = (q, latent, key, *up, *batch, "fp32", 0.4, "fp32")
        out = self(mill.cached_latent_attention.default, *args)
        return self.linear(self.view(out, 1, -1, 6), f"{path}.o", HIDDEN)

    def mlp(self, x: fx.Node, inter: int = 12) -> fx.Node:
        gate, up = (self.linear(x, f"{self.path}.{n}", inter) for n in ("gate_proj", "up_proj"))
        inner = self(aten.mul.Tensor, self(aten.silu.default, gate), up)
        return self.linear(inner, f"{self.path}.down_proj", HIDDEN)

    def experts(self, x: fx.Node) -> fx.Node:
        """4 experts of 5, of which tokens choose 2; as in Hugging Face, without a batch dim."""
        spec = dump_router(RouterSpec(2, "sigmoid", bias=True, groups=2, scale=1.5))
        flat = self.view(x, -1, HIDDEN)
        logits = self.linear(flat, f"{self.path}.router", 4)
        both = self(mill.route.default, logits, self.weight(f"{self.path}.router.bias", 4), spec)
        ids, weights = (self(operator.getitem, both, i) for i in (0, 1))
        up = [self.weight(f"{self.path}.experts.gate_up", 4, 10, HIDDEN)]
        down = [self.weight(f"{self.path}.experts.down", 4, HIDDEN, 5)]
        act = "silu(acc0) * acc1"
        args = (flat, ids, weights, up, down, None, "fp32", "fp32", act, True)
        return self.view(self(mill.experts.default, *args), 1, -1, HIDDEN)


def _fake(mode: FakeTensorMode, *shape: int) -> Tensor:
    with mode:
        return torch.empty(shape, dtype=torch.int32 if len(shape) < 3 else torch.uint8)


def decoder(latent: bool = True, seed: int = 0) -> Program:
    """Two layers, the first dense, the second with routed experts and a shared one."""
    b = Builder(seed)
    x, angles = b.embed(), b.angles(2)
    for layer in range(2):
        b.path = f"layers.{layer}.attn"
        normed = b.norm(x, f"layers.{layer}.norm1")
        x = b(aten.add.Tensor, x, (b.latent_attention if latent else b.attention)(normed, angles))
        b.path = f"layers.{layer}.mlp"
        normed = b.norm(x, f"layers.{layer}.norm2")
        if layer:
            routed = b.experts(normed)
            x = b(aten.add.Tensor, x, b(aten.add.Tensor, routed, b.mlp(normed)))
        else:
            x = b(aten.add.Tensor, x, b.mlp(normed))
    return b.finish(b.norm(x, "norm"))


# --- running --------------------------------------------------------------------------------------


def tokens(length: int) -> list[int]:
    return [(7 * i + 3) % VOCAB for i in range(length)]


def logits(program: Program) -> list[Tensor]:
    return [program.run(tokens(n)) for n in LENGTHS]


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    for g, w in zip(got, want, strict=True):
        scale = float(w.abs().max()) + 1e-6
        torch.testing.assert_close(g, w, rtol=0, atol=tolerance * scale)


def apply(program: Program, *passes: Pass, exact: bool = True) -> list[int]:
    """Run passes; each must leave a sound graph that computes what it did."""
    matches = []
    for step in passes:
        before = logits(program)
        matches.append(step.run(program))
        program.graph.lint()
        check_shapes(program)
        if exact:
            assert_close(logits(program), before)
    return matches


def check_shapes(program: Program) -> None:
    """The recorded value of every node is what its op infers."""
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert _described(node.meta["val"]) == _described(program.infer(node)), (
                node.format_node()
            )


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(map(str, value.shape)), value.dtype
    return [_described(v) for v in value] if isinstance(value, tuple | list) else str(value)


def targets(program: Program) -> list[str]:
    """Names of the ops that are called, in order: ``linear``, ``rms_norm``."""
    return [
        str(getattr(n.target, "overloadpacket", n.target)).split(".")[-1]
        for n in program.graph.nodes
        if n.op == "call_function"
    ]


def found(program: Program, *packets: Any) -> list[fx.Node]:
    return [n for n in program.graph.nodes if getattr(n.target, "overloadpacket", None) in packets]


def run_plan(plan: Plan, program: Program, ids: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Logits of one new sequence, by the torch meaning of the kernels."""
    return _execute(plan, program, ids, rows, lambda step, values: None, {})


def run_placed(plan: Plan, program: Program, ids: Sequence[int], rows: Sequence[int]) -> Tensor:
    """The same in a real arena; a buffer is filled with NaN when nobody needs it any more."""
    counts = {"tokens": len(ids), "rows": len(rows), "fixed": 1}
    arena = torch.full((plan.arena_bytes // 4,), torch.nan).view(torch.uint8)
    values = {}
    for b in plan.buffers.values():
        if b.kind == "arena":
            size = counts[b.rows] * b.width * DTYPE_BYTES[b.dtype]
            flat = arena[b.offset : b.offset + size].view(_DTYPES[b.dtype])
            values[b.name] = flat.view(counts[b.rows], b.width)
    last = {name: span[1] for name, span in lifetimes(plan).items()}

    def poison(step: int, values: dict[str, Tensor]) -> None:
        for name in [n for n, at in last.items() if at == step]:
            values[name].view(torch.uint8).fill_(255)

    return _execute(plan, program, ids, rows, poison, values)


_DTYPES = {"f32": torch.float32, "i32": torch.int32, "bool": torch.bool}


def _execute(
    plan: Plan,
    program: Program,
    ids: Sequence[int],
    rows: Sequence[int],
    after: Callable[[int, dict[str, Tensor]], None],
    arena: dict[str, Tensor],
) -> Tensor:
    batch = kv.single_sequence(len(ids))
    values = arena | {
        b.name: program.weights[b.name] for b in plan.buffers.values() if b.kind == "weight"
    }
    values |= {c.name: kv.allocate(c, batch.block_table.shape[1]) for c in plan.caches}
    values |= {"ids": torch.tensor(ids), "rows": torch.tensor(rows)}
    values |= {k: getattr(batch, k) for k in ("positions", "starts", "block_table")}
    for index, step in enumerate(plan.steps):
        operands = {p: _view(plan, step, p, values, len(ids), len(rows)) for p in step.spec.params}
        run = _run_extern if isinstance(step.spec, Extern) else reference.run
        for name, value in run(step.spec, operands, batch).items():
            operands[name].copy_(value)
        after(index, values)
    return values[plan.output]


def _view(
    plan: Plan, step: Step, param: str, values: dict[str, Tensor], tokens: int, rows: int
) -> Tensor:
    operand = step.bind[param]
    buffer = plan.buffers[operand.buffer]
    if buffer.kind != "arena":
        return values[buffer.name]
    if buffer.name not in values:
        count = {"tokens": tokens, "rows": rows, "fixed": 1}[buffer.rows]
        values[buffer.name] = torch.zeros(count, buffer.width, dtype=_DTYPES[buffer.dtype])
    whole = buffer.width - operand.column
    if param == "index":
        return values[buffer.name][:, operand.column]
    width = reference.operand_width(step.spec, param) or whole
    assert operand.column + width <= buffer.width
    return values[buffer.name][:, operand.column : operand.column + width]


def _run_extern(spec: Extern, operands: dict[str, Tensor], batch: kv.Batch) -> dict[str, Tensor]:
    """What the docstring of ``plan.Extern`` says."""
    out = operands["out"]

    def value(data: Any) -> Any:
        match data:
            case {"operand": name, "columns": columns, "shape": shape, "dtype": dtype}:
                x = operands[name]
                x = x[:, :columns] if x.dim() == 2 and x.shape[0] == out.shape[0] else x
                return x.reshape(shape).to(getattr(torch, dtype))
            case {"size": "tokens" | "rows", "times": times}:
                return times * out.shape[0]
            case {"dtype": name}:
                return getattr(torch, name)
            case list():
                return [value(v) for v in data]
        return data

    call = json.loads(spec.args)
    namespace, name, overload = spec.op.split(".")
    op = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    result = op(*value(call["args"]), **{k: value(v) for k, v in call["kwargs"].items()})
    result = result if spec.item < 0 else result[spec.item]
    return {"out": result.reshape(out.shape)}
