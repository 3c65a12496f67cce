"""Routers in standard ops, and experts as the contrib ops MoE and QMoE where these mean the same.

Both choose for themselves among the numbers of ``router_probs [T, E]``; here the choice is made before, so
QMoE is given 1 for the chosen experts and 0 for the others, and the weights beside them.  MoE weighs by the
softmax of what it chose by: it is given logarithms of the weights, and its result is multiplied by their sum.
Weights must be positive for both: on a CPU, QMoE leaves out experts whose weight is not.

What neither covers is a loop over experts that skips those that no token chose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ir import expr
from ..ir.router import RouterSpec
from ._onnx_graph import CONTRIB, Graph
from ._onnx_pointwise import evaluate
from ._onnx_weights import ZERO_NIBBLES, Matrix, Stored, dense, multiply, store

# Expressions that the contrib ops have a name for; their GELU is the one by tanh.
_ACTIVATIONS = {
    "silu(acc0) * acc1": "swiglu",
    "acc1 * silu(acc0)": "swiglu",
    "silu(acc0)": "silu",
    "relu(acc0)": "relu",
    "gelu_tanh(acc0)": "gelu",
    "acc0": "identity",
}
_UNCHOSEN = -1e30
_TINY = 1e-30
_BLOCK = 16  # the least that QMoE takes


# --- routers ----------------------------------------------------------------------------------------


def route(
    g: Graph, logits: ir.Value, bias: ir.Value | None, spec: RouterSpec, experts: int, rank: int
) -> tuple[ir.Value, ir.Value]:
    """Ids int32 and weights ``[..., top_k]`` of ``logits [..., E]`` with ``rank`` dims (ir.router.route)."""
    scores = _score(g, spec.score, logits)
    choice = scores if bias is None else g.op("Add", scores, bias)
    if spec.groups > 1:
        choice = _best_groups(g, choice, spec, experts, rank)
    _, ids = g.ops("TopK", 2, choice, g.ints(spec.top_k), axis=-1)
    weights = _score(g, spec.after, g.op("GatherElements", scores, ids, axis=-1))
    if spec.renormalize:
        total = g.op("ReduceSum", weights, g.ints(-1), keepdims=1)
        if spec.epsilon:
            total = g.op("Add", total, g.scalar(spec.epsilon))
        weights = g.op("Div", weights, total)
    if spec.scale != 1.0:
        weights = g.op("Mul", weights, g.scalar(spec.scale))
    return g.cast(ids, torch.int32), weights


def _score(g: Graph, kind: str, x: ir.Value) -> ir.Value:
    match kind:
        case "softmax":
            return g.op("Softmax", x, axis=-1)
        case "sigmoid":
            return g.op("Sigmoid", x)
        case "sqrt_softplus":
            return g.op("Sqrt", g.op("Softplus", x))
        case "identity":
            return x
    raise ValueError(f"unknown score {kind!r}")


def _best_groups(g: Graph, choice: ir.Value, spec: RouterSpec, experts: int, rank: int) -> ir.Value:
    """``choice`` with -inf for experts of the other groups."""
    lead = g.sizes(choice, 0, rank - 1)
    each = experts // spec.groups
    grouped = g.reshape(choice, lead, spec.groups, each)
    if spec.group_score == "max":
        best = g.op("ReduceMax", grouped, g.ints(-1), keepdims=0)
    else:
        two, _ = g.ops("TopK", 2, grouped, g.ints(min(2, each)), axis=-1)
        best = g.op("ReduceSum", two, g.ints(-1), keepdims=0)
    _, kept = g.ops("TopK", 2, best, g.ints(spec.top_groups), axis=-1)
    # One-hot rows of the kept groups, summed: which groups stay.
    hot = g.op("OneHot", kept, g.scalar(spec.groups, torch.int64), g.ints(0, 1), axis=-1)
    stays = g.cast(g.op("ReduceSum", hot, g.ints(-2), keepdims=0), torch.bool)
    eligible = g.op("Where", g.op("Unsqueeze", stays, g.ints(-1)), grouped, g.scalar(-float("inf")))
    return g.reshape(eligible, lead, experts)


def is_positive(spec: RouterSpec | None) -> bool:
    """Whether a router's weights cannot be negative."""
    return spec is not None and (spec.score != "identity" or spec.after != "identity")


# --- experts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """The experts of a layer: ``down(act(up x))`` of those that ``ids [T, k]`` choose."""

    up: Matrix
    down: Matrix
    activation: str
    gated: bool
    top_k: int
    positive: bool

    @property
    def count(self) -> int:
        return self.up.lead[0]

    @property
    def inter(self) -> int:
        return self.up.n // (2 if self.gated else 1)

    @property
    def named(self) -> str | None:
        return _ACTIVATIONS.get(expr.text(expr.parse(self.activation)))

    @property
    def block_size(self) -> int:
        """Inputs that share a scale in both maps of QMoE, 0 if there is no such number."""
        groups = self.up.spec.group, self.down.spec.group
        sizes = (b for b in (128, 64, 32, _BLOCK) if b <= min(groups) and self.up.k % b == 0)
        return next(sizes, 0)

    @property
    def form(self) -> str:
        """``QMoE``, ``MoE`` or ``Loop``."""
        formats = {self.up.format, self.down.format}
        if self.named is None or not self.positive:
            return "Loop"
        if formats == {"int8"} or (all(map(_is_int4, formats)) and self.block_size):
            return "QMoE"
        return "MoE" if formats <= {"fp32", "bf16", "fp8"} else "Loop"


def _is_int4(format: str) -> bool:
    return format.startswith("int4-")


def experts(
    g: Graph, block: Block, x: ir.Value, ids: ir.Value, weights: ir.Value, half: bool
) -> ir.Value:
    """The weighted sum ``[T, H]`` of the experts of tokens ``x [T, H]``; ``half`` for fp16 kernels."""
    match block.form:
        case "QMoE":
            return _qmoe(g, block, x, ids, weights, half)
        case "MoE":
            return _moe(g, block, x, ids, weights, half)
    return _loop(g, block, x, ids, weights)


def _over_all(g: Graph, block: Block, ids: ir.Value, values: ir.Value, other: float) -> ir.Value:
    """``[T, E]``: the values of the chosen experts, ``other`` elsewhere."""
    sizes = g.shape(g.sizes(ids, 0, 1), block.count)
    base = g.op("Expand", g.scalar(other), sizes)
    return g.op("ScatterElements", base, ids, values, axis=1)


def _attributes(block: Block) -> dict[str, Any]:
    fused = {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    return {
        "k": block.top_k, "activation_type": block.named, "normalize_routing_weights": 0,
    } | (fused if block.gated else {})  # fmt: skip


def _qmoe(
    g: Graph, block: Block, x: ir.Value, ids: ir.Value, weights: ir.Value, half: bool
) -> ir.Value:
    real = torch.float16 if half else torch.float32

    def narrow(value: ir.Value) -> ir.Value:
        return g.cast(value, real) if half else value

    ids = g.cast(ids, torch.int64)
    ones = g.op("Expand", g.scalar(1.0), g.sizes(ids, 0, 2))
    chosen, share = (_over_all(g, block, ids, v, 0.0) for v in (ones, weights))
    parts = [*_quantized(g, block.up, block, real), *_quantized(g, block.down, block, real)]
    up, up_scale, down, down_scale = parts
    bits = block.up.spec.bits
    size = {"block_size": block.block_size} if bits == 4 else {}
    y: ir.Value = g.op(
        "QMoE", narrow(x), narrow(chosen), up, up_scale, None, down, down_scale, *[None] * 7,
        narrow(share), domain=CONTRIB, expert_weight_bits=bits, accuracy_level=g.accuracy_level,
        weights_prepacked=0, **size, **_attributes(block),
    )  # fmt: skip
    return g.cast(y, torch.float32) if half else y


def _quantized(g: Graph, m: Matrix, block: Block, real: torch.dtype) -> tuple[ir.Value, ir.Value]:
    """A stack's integers and scales as QMoE wants them."""
    is_up = m is block.up
    turn = _interleaved if is_up and block.gated else lambda w: w
    kind = "half" if real == torch.float16 else "single"
    if m.format == "int8":
        q = m.stored(
            g, "experts", lambda: turn((m.part("q").short() + 128).to(torch.uint8)), torch.uint8,
            m.n, m.k,
        )  # fmt: skip
        scale = m.stored(
            g,
            f"experts.{kind}",
            lambda: turn(m.part("scale")[..., None])[..., 0].to(real),
            real,
            m.n,
        )
        return q, scale
    size = block.block_size
    inter = block.inter + -block.inter % size
    n, k = (inter * (2 if block.gated else 1), m.k) if is_up else (m.n, inter)

    def rows(part: Tensor, fill: int | float) -> Tensor:
        """Of each of gate and up, as many as there are padded inputs of the other map."""
        if not is_up:
            return part
        halves = part.unflatten(-2, (-1, block.inter))
        padded = F.pad(halves, (0, 0, 0, inter - block.inter), value=fill).flatten(-3, -2)
        return turn(padded)

    def values() -> Tensor:
        q = F.pad(m.part("q"), (0, k // 2 - m.part("q").shape[-1]), value=ZERO_NIBBLES)
        return rows(q, ZERO_NIBBLES)

    def scales() -> Tensor:
        fine = m.part("scale").float().repeat_interleave(m.spec.group // size, -1)
        fine = F.pad(fine, (0, max(k // size - fine.shape[-1], 0)))[..., : k // size]
        return rows(fine, 0.0).to(real)

    return (
        m.stored(g, f"experts.{size}", values, torch.uint8, n, k // 2),
        m.stored(g, f"experts.{size}.{kind}", scales, real, n, k // size),
    )


def _interleaved(w: Tensor) -> Tensor:
    """Rows gate 0, up 0, gate 1, ... of ``[..., gate then up, K]``: the order that all providers read."""
    gate, up = w.chunk(2, -2)
    return torch.stack((gate, up), -2).flatten(-3, -2)


def _moe(
    g: Graph, block: Block, x: ir.Value, ids: ir.Value, weights: ir.Value, half: bool
) -> ir.Value:
    ids = g.cast(ids, torch.int64)
    total = g.op("ReduceSum", weights, g.ints(-1), keepdims=1)
    total = g.op("Max", total, g.scalar(_TINY))
    share = g.op("Max", g.op("Div", weights, total), g.scalar(_TINY))
    logits = _over_all(g, block, ids, g.op("Log", share), _UNCHOSEN)
    up = dense(g, block.up)
    if block.gated:
        up = g.reshape(up, block.count, 2, block.inter, block.up.k)
        up = g.reshape(g.transpose(up, 0, 2, 1, 3), block.count, block.up.n, block.up.k)
    down = dense(g, block.down)
    inputs = [x, logits, up, None, down]
    if half:
        # fp16 ends at 65504: far enough below any logarithm that is there.
        logits = g.op("Max", logits, g.scalar(-6e4))
        inputs = [v and g.cast(v, torch.float16) for v in (x, logits, up, None, down)]
    y = g.op("MoE", *inputs, domain=CONTRIB, **_attributes(block))
    y = g.cast(y, torch.float32) if half else y
    return g.op("Mul", y, total)


def _loop(g: Graph, block: Block, x: ir.Value, ids: ir.Value, weights: ir.Value) -> ir.Value:
    """for e: if any token chose e: out[its tokens] += weight * down(act(up x))."""
    (up, first), (down, second) = _members(g, block.up), _members(g, block.down)
    number = ir.val("expert", ir.DataType.INT64, [])
    going = ir.val("going", ir.DataType.BOOL, [])
    before = ir.val("before", ir.DataType.FLOAT, ["tokens", block.up.k])
    number.name, going.name, before.name = (f"{g.place}/{v.name}" for v in (number, going, before))
    results: list[ir.Value] = []
    with g.body([number, going, before], results) as body:
        hit = g.op("Equal", ids, g.cast(number, torch.int32))
        some = g.op("ReduceMax", g.cast(hit, torch.int32), keepdims=0)
        then: list[ir.Value] = []
        with g.body([], then) as visited:
            then.append(
                _visit(g, block, (first, second), (up, down), number, hit, before, x, weights)
            )
        other: list[ir.Value] = []
        with g.body([], other) as skipped:
            other.append(g.op("Identity", before))
        after = g.op("If", g.cast(some, torch.bool), then_branch=visited[0], else_branch=skipped[0])
        results += [g.op("Identity", going), after]
    zero = g.op("Sub", x, x)
    count = g.scalar(block.count, torch.int64)
    result: ir.Value = g.op("Loop", count, None, zero, body=body[0])
    return result


def _members(g: Graph, m: Matrix) -> tuple[Stored, Matrix]:
    """A stack whose members :func:`multiply` takes once they are gathered, and what each of them is."""
    if m.format == "fp8":  # which cannot be gathered
        return {"w": g.transpose(dense(g, m), 0, 2, 1)}, replace(m, lead=(), format="fp32")
    return store(g, m), replace(m, lead=())


def _visit(
    g: Graph, block: Block, one: tuple[Matrix, Matrix], stacks: tuple[Stored, Stored],
    number: ir.Value, hit: ir.Value, before: ir.Value, x: ir.Value, weights: ir.Value,
) -> ir.Value:  # fmt: skip
    """What expert ``number`` adds for the tokens that hit it."""
    pairs = g.transpose(g.op("NonZero", hit), 1, 0)
    token = g.cut(pairs, 1, 0, 1)
    y = g.op("GatherND", x, token)
    up, down = (
        {part: g.op("Gather", whole, number) for part, whole in stack.items()} for stack in stacks
    )
    acc = multiply(g, y, one[0], up, None)
    count = 2 if block.gated else 1
    parts = g.ops("Split", count, acc, axis=-1, num_outputs=count) if count > 1 else [acc]
    inner = evaluate(g, block.activation, {f"acc{i}": part for i, part in enumerate(parts)})
    share = g.op("Unsqueeze", g.op("GatherND", weights, pairs), g.ints(1))
    y = g.op("Mul", multiply(g, inner, one[1], down, None), share)
    result: ir.Value = g.op("ScatterND", before, token, y, reduction="add")
    return result
