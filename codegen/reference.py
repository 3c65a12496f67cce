"""The torch meaning of every kernel, so that a plan also runs without a compiler.

One function per :data:`KernelSpec`, under the same stem as its emitters.  All compute in fp32 from the
references of ``ir``: :func:`quant.dequantize`, :mod:`ir.cache`, :func:`router.route`, :func:`expr.evaluate`,
and products round their inputs as the kernels do: those of a CPU by :func:`quant.round_inputs`, those of a
GPU to bf16 (unless the weight is fp32).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ir import cache as kv
from ..ir import expr, packing, quant, router
from ..ir.cache import Batch
from ..ir.ops import OPS
from ..ir.plan import (
    Attend,
    CacheWrite,
    Chain,
    Custom,
    Device,
    Embed,
    Experts,
    Extern,
    KernelSpec,
    LatentAttend,
    Linear,
    Norm,
    Plan,
    Pointwise,
    Rope,
    Route,
    SelectRows,
    Step,
    operand_width,
)

Operands = Mapping[str, Tensor]
Outputs = dict[str, Tensor]
WRONG = 1e9  # what is no rounding error


def run(
    spec: KernelSpec,
    operands: Operands,
    batch: Batch,
    device: Device = "cpu",
    e4m3: bool = False,
) -> Outputs:
    """The outputs of one kernel by parameter name; a cache operand is written in place.

    Activations are ``[rows, width]``; weights come in the parts that ``spec.params`` names, in the order
    of ``device``, which also decides how products round their inputs.  With ``e4m3``, those that meet FP8
    weights are rounded to E4M3, as a GPU does where linear and experts have many rows.  A chain writes its
    outputs to the operands too: what is one buffer must be one tensor.
    """
    if isinstance(spec, Chain):
        return _chain(spec, operands, batch, device)
    wide = {
        n: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        for n, x in operands.items()
    }
    if e4m3 and isinstance(spec, Linear | Experts):
        return _RUN[spec.kind](spec, wide, batch, device, e4m3)
    return _RUN[spec.kind](spec, wide, batch, device)


def run_plan(
    plan: Plan,
    weights: Operands,
    caches: Operands,
    ids: Tensor,
    rows: Tensor,
    batch: Batch,
) -> Tensor:
    """Logits ``[R, vocab]`` of one step; ``ids [T]``, ``rows [R]``, caches ``[pages, 64, row_bytes]``."""
    values: dict[str, Tensor] = {
        **weights,
        **caches,
        "ids": ids,
        "rows": rows,
        "positions": batch.positions,
        "starts": batch.starts,
        "block_table": batch.block_table,
    }
    for step in plan.steps:
        operands = {p: _view(plan, step, p, values, len(ids), len(rows)) for p in step.spec.params}
        for name, value in run(step.spec, operands, batch, plan.device).items():
            operands[name].copy_(value)
    return values[plan.output]


_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "i64": torch.int64,
    "bool": torch.bool,
}


def row_error(got: Tensor, want: Tensor) -> float:
    """The largest error relative to what is largest in its row, or usual in all of them.

    WRONG where shapes differ, or what is not finite does.
    """
    got, want = got.detach().float().cpu(), want.detach().float().cpu()
    if got.shape != want.shape:
        return WRONG
    if not want.numel():
        return 0.0
    same = (got == want) | (got.isnan() & want.isnan())
    finite = want.isfinite()
    if not bool((same | (finite & got.isfinite())).all()):
        return WRONG
    usual = want[finite].square().mean().sqrt() if finite.any() else torch.tensor(1.0)
    most = want.where(finite, 0.0).abs().amax(-1, keepdim=True).clamp(min=max(float(usual), 1e-30))
    return float(((got - want).where(~same, 0.0).abs() / most).max())


def _view(
    plan: Plan, step: Step, param: str, values: dict[str, Tensor], tokens: int, rows: int
) -> Tensor:
    """An operand's columns; an arena buffer comes into being when it is first named."""
    operand = step.bind[param]
    buffer = plan.buffers[operand.buffer]
    if buffer.kind != "arena":
        return values[buffer.name]
    if buffer.name not in values:
        count = {"tokens": tokens, "rows": rows, "fixed": 1}[buffer.rows]
        values[buffer.name] = torch.zeros(count, buffer.width, dtype=_DTYPES[buffer.dtype])
    width = operand_width(step.spec, param) or buffer.width
    return values[buffer.name][:, operand.column : operand.column + width]


# --- one meaning per kernel -------------------------------------------------------------------------


def embed(spec: Embed, o: Operands, batch: Batch, device: Device) -> Outputs:
    fmt = quant.parse(spec.format)
    rows = {part: o[part][o["index"].long()] for part in fmt.parts}
    return {"out": quant.dequantize(rows, fmt, spec.width)}


def select_rows(spec: SelectRows, o: Operands, batch: Batch, device: Device) -> Outputs:
    return {"out": o["x"][o["index"].long()]}


def norm(spec: Norm, o: Operands, batch: Batch, device: Device) -> Outputs:
    total = o["x"] + o["residual"] if spec.residual else o["x"]
    x = total.unflatten(-1, (spec.heads, spec.width))
    if spec.center:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps)
    x = x * o["weight"] if spec.weight else x
    x = x + o["bias"] if spec.bias else x
    return {"out": x.flatten(-2)} | ({"sum": total.clone()} if spec.residual else {})


def _weight(
    o: Operands, device: Device, fmt: str, n: int, k: int, prefix: str = "", parts: int = 1
) -> Tensor:
    """The matrix ``[..., parts * n, k]`` that the parts of a weight stand for."""
    spec = quant.parse(fmt)
    weight = {p: o[prefix + p] for p in spec.parts}
    if device == "cpu":
        weight = packing.unpack(weight, spec, n, k, parts)
    elif spec.group:
        weight["q"] = packing.unpack_halves(weight["q"], k)
    return quant.dequantize(weight, spec, k)


def _rounded(x: Tensor, fmt: str, device: Device, e4m3: bool = False) -> Tensor:
    if e4m3 and fmt == "fp8":
        return quant.round_e4m3(x)
    if device == "cuda":
        return x if fmt == "fp32" else x.bfloat16().float()
    return quant.round_inputs(x, quant.parse(fmt))


def linear(spec: Linear, o: Operands, batch: Batch, device: Device, e4m3: bool = False) -> Outputs:
    weight = _weight(o, device, spec.format, spec.n, spec.k, parts=spec.parts)
    y = _rounded(o["x"], spec.format, device, e4m3) @ weight.T
    if spec.bias:
        y = y + o["bias"]
    acc = {f"acc{i}": part for i, part in enumerate(y.split(spec.n, -1))}
    extras = {f"e{i}": o[f"e{i}"] for i in range(len(spec.extras))}
    return {"out": expr.evaluate(expr.parse(spec.epilogue), acc | extras)}


def pointwise(spec: Pointwise, o: Operands, batch: Batch, device: Device) -> Outputs:
    inputs = {f"x{i}": o[f"x{i}"] for i in range(len(spec.inputs))}
    return {"out": expr.evaluate(expr.parse(spec.expr), inputs).expand(o["out"].shape)}


def rope(spec: Rope, o: Operands, batch: Batch, device: Device) -> Outputs:
    x = o["x"].unflatten(-1, (spec.heads, spec.head_dim)).clone()
    cos, sin = o["cos"][:, None], o["sin"][:, None]
    part = x[..., spec.offset : spec.offset + spec.rotary]
    shape = (-1, 2) if spec.interleaved else (2, -1)
    a, b = part.unflatten(-1, shape).unbind(-1 if spec.interleaved else -2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1 if spec.interleaved else -2)
    part.copy_(turned.flatten(-2))
    return {"out": x.flatten(-2)}


def cache_write(spec: CacheWrite, o: Operands, batch: Batch, device: Device) -> Outputs:
    kv.write(spec.cache, o["cache"], batch, [o[f"p{i}"] for i in range(len(spec.parts))])
    return {}


def _spans(batch: Batch) -> list[tuple[int, int, int, int]]:
    """(sequence, first token, end, length of its context after this step) of sequences with tokens."""
    starts = batch.starts.tolist()
    spans = zip(range(len(starts)), starts, starts[1:], strict=False)
    return [(b, lo, hi, int(batch.positions[hi - 1]) + 1) for b, lo, hi in spans if hi > lo]


def _visible(batch: Batch, lo: int, hi: int, length: int, window: int) -> Tensor:
    """Which keys ``[hi - lo, length]`` each query sees."""
    p, j = batch.positions[lo:hi, None], torch.arange(length)
    return (j <= p) & (j > p - window) if window else j <= p


def _short(x: Tensor, cache_format: str) -> Tensor:
    """``x`` in the arithmetic of attention: BF16 unless the cache is FP32."""
    return x if cache_format == "fp32" else x.bfloat16().float()


def attend(spec: Attend, o: Operands, batch: Batch, device: Device) -> Outputs:
    out = torch.zeros(o["q"].shape[0], spec.heads, spec.value_dim)
    group = spec.heads // spec.heads_kv
    for b, lo, hi, length in _spans(batch):
        parts = kv.read(spec.cache, o["cache"], batch, b, length)
        key, value = (
            _short(part, spec.cache_format)
            .unflatten(-1, (spec.heads_kv, -1))
            .repeat_interleave(group, 1)
            for part in parts
        )
        q = _short(o["q"][lo:hi].unflatten(-1, (spec.heads, spec.head_dim)), spec.cache_format)
        score = torch.einsum("thd,jhd->htj", q, key) * spec.scale
        if spec.softcap:
            score = spec.softcap * torch.tanh(score / spec.softcap)
        if spec.slopes:
            distance = torch.arange(length) - batch.positions[lo:hi, None]
            score = score + o["slopes"].float()[:, None, None] * distance
        score = score.masked_fill(~_visible(batch, lo, hi, length, spec.window), -torch.inf)
        if spec.sinks:
            sinks = o["sinks"].float()[:, None, None].expand(-1, hi - lo, 1)
            score = torch.cat([score, sinks], -1)
        p = score.softmax(-1)[..., :length]
        out[lo:hi] = torch.einsum("htj,jhv->thv", p, value)
    return {"out": out.flatten(1)}


def latent_attend(spec: LatentAttend, o: Operands, batch: Batch, device: Device) -> Outputs:
    """Rounded as the kernel rounds, which differs between few queries (absorbed) and many (expanded)."""
    out = torch.zeros(o["q"].shape[0], spec.heads, spec.value)
    up = quant.parse(spec.up_format)
    w_uk = o["w_uk_" + up.parts[0]].float()
    if device == "cpu":
        turned = packing.unpack({up.parts[0]: o["w_uk_" + up.parts[0]]}, up, spec.latent, spec.nope)
        w_uk = next(iter(turned.values())).float().mT
    scale = o["w_uk_scale"] if "scale" in up.parts else torch.ones(spec.heads, spec.nope)
    w_uv = _weight(o, device, spec.up_format, spec.value, spec.latent, "w_uv_")

    def short(x: Tensor) -> Tensor:
        return _short(x, spec.cache_format)

    for b, lo, hi, length in _spans(batch):
        latent, k_pe = map(short, kv.read(spec.cache, o["cache"], batch, b, length))
        q = o["q"][lo:hi].unflatten(-1, (spec.heads, spec.nope + spec.rope))
        q_nope, q_pe = q.split((spec.nope, spec.rope), -1)
        absorbed = hi - lo < spec.absorb_below
        if absorbed:
            scaled = _rounded(q_nope * scale, spec.up_format, device)
            q_latent = short(torch.einsum("thn,hnl->thl", scaled, w_uk))
            score = torch.einsum("thl,jl->htj", q_latent, latent)
        else:
            key = short(torch.einsum("jl,hnl->jhn", latent, short(w_uk * scale[..., None])))
            score = torch.einsum("thn,jhn->htj", short(q_nope), key)
        score = (score + torch.einsum("thr,jr->htj", short(q_pe), k_pe)) * spec.scale
        p = score.masked_fill(~_visible(batch, lo, hi, length, 0), -torch.inf).softmax(-1)
        if absorbed:
            mixed = _rounded(torch.einsum("htj,jl->thl", p, latent), spec.up_format, device)
            out[lo:hi] = torch.einsum("thl,hvl->thv", mixed, w_uv)
        else:
            value = short(torch.einsum("jl,hvl->jhv", latent, short(w_uv)))
            out[lo:hi] = torch.einsum("htj,jhv->thv", p, value)
    return {"out": out.flatten(1)}


def route(spec: Route, o: Operands, batch: Batch, device: Device) -> Outputs:
    ids, weights = router.route(o["logits"], o.get("bias"), spec.router)
    return {"ids": ids, "weights": weights}


def experts(
    spec: Experts, o: Operands, batch: Batch, device: Device, e4m3: bool = False
) -> Outputs:
    x, ids = _rounded(o["x"], spec.gate_up_format, device, e4m3), o["ids"].long()
    gate_up = _weight(
        o, device, spec.gate_up_format, spec.inter, spec.hidden, "gate_up_", 2 if spec.gated else 1
    )
    down = _weight(o, device, spec.down_format, spec.hidden, spec.inter, "down_")
    out = o["residual"].clone() if spec.residual else torch.zeros_like(o["x"])
    for e in ids.unique().tolist():
        token, choice = (ids == e).nonzero(as_tuple=True)
        parts = x[token] @ gate_up[e].T
        parts = (parts + o["gate_up_bias"][e] if spec.biased else parts).split(spec.inter, -1)
        acc = {f"acc{i}": part for i, part in enumerate(parts)}
        inner = expr.evaluate(expr.parse(spec.activation), acc)
        y = _rounded(inner, spec.down_format, device, e4m3) @ down[e].T
        y = y + o["down_bias"][e] if spec.biased else y
        out.index_add_(0, token, y * o["weights"][token, choice, None])
    return {"out": out}


def custom(spec: Custom, o: Operands, batch: Batch, device: Device) -> Outputs:
    """Call the op's own reference."""
    given = dict(spec.attributes) | {
        t.name: o[t.name] if t.weight else o[t.name].reshape(len(o[t.name]), *t.shape)
        for t in spec.operands
    }
    result = OPS[spec.op].overload(**given)
    return {"out": result.reshape(len(result), spec.out.width)}


def _chain(spec: Chain, o: Operands, batch: Batch, device: Device) -> Outputs:
    found: Outputs = {}
    for i, link in enumerate(spec.links):
        out = run(link, {p: o[f"{p}_{i}"] for p in link.params}, batch, device)
        for param, value in out.items():
            o[f"{param}_{i}"].copy_(value)
            found[f"{param}_{i}"] = value
    return found


def extern(spec: Extern, o: Operands, batch: Batch, device: Device) -> Outputs:
    """Call the op that ``spec.op`` names; :class:`Extern` says how its arguments are written."""
    op: Any = torch.ops
    for name in spec.op.split("."):
        op = getattr(op, name)
    args, kwargs = _argument(json.loads(spec.args), o)
    result = op(*args, **kwargs)
    result = result if spec.item < 0 else result[spec.item]
    return {"out": result.reshape(o["out"].shape)}


def _argument(data: Any, o: Operands) -> Any:
    """The value that JSON ``data`` stands for."""
    match data:
        case {"operand": name}:
            return _shaped(o[name], data.get("shape"), data.get("dtype"))
        case {"size": "tokens" | "rows"}:
            return o["out"].shape[0] * data.get("times", 1)
        case {"torch": name}:
            return getattr(torch, name)
        case {"device": _}:
            return torch.device("cpu")
        case dict():
            return {k: _argument(v, o) for k, v in data.items()}
        case list():
            return [_argument(v, o) for v in data]
    return data


def _shaped(x: Tensor, shape: list[int] | None, dtype: str | None) -> Tensor:
    """``x``, of which ``shape`` may use only the first columns."""
    if shape is not None:
        columns = math.prod(size for size in shape if size >= 0)
        x = (x[:, :columns] if x.dim() == 2 and x.shape[1] > columns else x).reshape(shape)
    return x if dtype is None else x.to(getattr(torch, dtype))


_RUN: dict[str, Callable[..., Outputs]] = {
    f.__name__: f
    for f in (
        embed,
        select_rows,
        norm,
        linear,
        pointwise,
        rope,
        cache_write,
        attend,
        latent_attend,
        route,
        experts,
        custom,
        extern,
    )
}
