"""One kernel per dialect op: how a call's arguments become a spec and its operands."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from ..errors import NotLowered, TokenMixing
from ..ir import ops, plan, quant
from ..ir.plan import ABSORB_BELOW, Operand, Shaped, gqa_cache, latent_cache
from ..ir.program import is_weight, shape, where
from ..ir.quant import parse
from .base import mill
from .linears import Linear
from .views import features, width

if TYPE_CHECKING:
    from .lower import Lowering


def _embed(low: Lowering, node: fx.Node) -> None:
    table, index, format = node.args
    spec = plan.Embed(shape(table[0])[0], shape(table[0])[1], format)
    parts = {name: low.operand(p) for name, p in zip(parse(format).parts, table, strict=True)}
    low.emit(node, spec, index=low.operand(index), **parts, out=low.out(node))


def _select_rows(low: Lowering, node: fx.Node) -> None:
    x, index = node.args
    spec = plan.SelectRows(width(x))
    low.emit(node, spec, x=low.operand(x), index=low.operand(index), out=low.out(node))


def _heads(node: fx.Node) -> int:
    return prod((features(node) or (1,))[:-1])


def _rms_norm(low: Lowering, node: fx.Node) -> None:
    x, weight, eps = node.args
    spec = plan.Norm(shape(x)[-1], eps, _heads(x))
    low.emit(node, spec, x=low.operand(x), weight=low.operand(weight), out=low.out(node))


def _layer_norm(low: Lowering, node: fx.Node) -> None:
    x, weight, bias, eps = node.args
    affine = {k: w for k, w in (("weight", weight), ("bias", bias)) if w is not None}
    spec = plan.Norm(shape(x)[-1], eps, _heads(x), True, weight is not None, bias is not None)
    bind = {name: low.operand(w) for name, w in affine.items()}
    low.emit(node, spec, x=low.operand(x), **bind, out=low.out(node))


def _add_rms_norm(low: Lowering, node: fx.Node) -> None:
    x, residual, weight, eps = node.args
    spec = plan.Norm(shape(x)[-1], eps, _heads(x), residual=True)
    inputs = {"x": x, "residual": residual, "weight": weight}
    total, out = low.results(node, 2)
    bind = {name: low.operand(n) for name, n in inputs.items()}
    low.emit(node, spec, **bind, sum=total, out=out)


def _linear(low: Lowering, node: fx.Node) -> None:
    linear = Linear(*node.args)
    kinds: tuple[Literal["row", "channel"], ...] = tuple(
        "channel" if is_weight(e) else "row" for e in linear.extras
    )
    n, k, has_bias = width(node), width(linear.x), linear.bias is not None
    format = _kernel_format(low, linear.format)
    spec = plan.Linear(n, k, format, has_bias, linear.parts, linear.epilogue, kinds)
    weight = _matrix(low, "", linear.format, linear.weight, linear.parts)
    bind = {"x": low.operand(linear.x), **weight}
    if linear.bias is not None:
        bind["bias"] = low.operand(linear.bias)
    for i, extra in enumerate(linear.extras):
        bind[f"e{i}"] = _broadcast(low, extra, node)
    low.emit(node, spec, **bind, out=low.out(node))


def _matrix(
    low: Lowering, prefix: str, format: str, weight: list[fx.Node], parts: int = 1
) -> dict[str, Operand]:
    """The parts of a weight in the order in which kernels read them."""
    if _kernel_format(low, format) != format:
        return {f"{prefix}w": _decoded(low, format, weight)}
    names, rows = parse(format).parts, shape(weight[0])[-2]
    return {
        f"{prefix}{name}": low.matrix(node, name, format, rows, parts)
        for name, node in zip(names, weight, strict=True)
    }


def _kernel_format(low: Lowering, format: str) -> str:
    """The format that kernels read: those of a GPU know no codebooks, and take what their codes stand for."""
    book = low.device == "cuda" and isinstance(parse(format), quant.Codebook)
    return "bf16" if book else format


def _decoded(low: Lowering, format: str, weight: list[fx.Node]) -> Operand:
    """The bf16 matrix that a weight in a codebook stands for."""
    names, weights = [part.target for part in weight], low.program.weights
    name, inputs = f"{names[0]}.bf16", _inputs(low, names[0])
    if name not in weights:
        weights.derive(name, partial(_decode, format, inputs), *names, each=True)
    return low.weight(name)


def _inputs(low: Lowering, stored: str) -> int:
    """How many inputs the matrices of a quantized weight have."""
    (source,) = low.program.weights.sources(stored)
    return int(low.program.weights.like(source).shape[-1])


def _decode(format: str, k: int, q: Tensor, scale: Tensor) -> Tensor:
    return quant.dequantize({"q": q, "scale": scale}, parse(format), k).bfloat16()


def _broadcast(low: Lowering, source: fx.Node, like: fx.Node) -> Operand:
    return low.channel(source, like) if is_weight(source) else low.operand(source)


def _pointwise(low: Lowering, node: fx.Node) -> None:
    inputs, expression = node.args
    spec = plan.Pointwise(width(node), expression, tuple(_kind(i, node) for i in inputs))
    bind = {f"x{i}": _broadcast(low, n, node) for i, n in enumerate(inputs)}
    low.emit(node, spec, **bind, out=low.out(node))


def _kind(source: fx.Node, node: fx.Node) -> Literal["row", "scalar", "channel"]:
    if is_weight(source):
        return "channel"
    return "row" if width(source) == width(node) else "scalar"


def _rope(low: Lowering, node: fx.Node) -> None:
    x, cos, sin, offset, interleaved = node.args
    spec = plan.Rope(_heads(x), shape(x)[-1], 2 * width(cos), offset, interleaved)
    angles = {"cos": low.operand(cos), "sin": low.operand(sin)}
    source = low.operand(x)
    low.emit(node, spec, x=source, **angles, out=low.out_over(x, node))


def _cached_attention(low: Lowering, node: fx.Node) -> None:
    q, k, v, sinks, cache, _, _, _, scale, window, softcap, format, *slopes = node.args
    heads, heads_kv, dims = _heads(q), _heads(k), (shape(k)[-1], shape(v)[-1])
    parts = gqa_cache("", format, heads_kv, *dims).parts
    _cache_write(low, node, plan.CacheWrite(format, parts), cache, k, v)
    has = sinks is not None, bool(slopes)
    spec = plan.Attend(heads, heads_kv, *dims, scale, format, window, softcap, *has)
    bind = {"sinks": low.operand(sinks)} if sinks is not None else {}
    bind |= {"slopes": low.operand(slopes[0])} if slopes else {}
    low.emit(node, spec, q=low.operand(q), **bind, cache=low.operand(cache), out=low.out(node))


def _cached_latent_attention(low: Lowering, node: fx.Node) -> None:
    q, latent, k_rope, w_uk, w_uv, cache, _, _, _, format, scale, cache_format = node.args
    rank, rope = width(latent), width(k_rope)
    heads, nope, value = _heads(q), shape(w_uk[0])[-2], shape(w_uv[0])[-2]
    parts = latent_cache("", cache_format, rank, rope).parts
    _cache_write(low, node, plan.CacheWrite(cache_format, parts), cache, latent, k_rope)
    spec = plan.LatentAttend(
        heads, nope, rope, rank, value, scale, cache_format, format, ABSORB_BELOW[low.device]
    )
    bind = {"q": low.operand(q), "cache": low.operand(cache)}
    # W_UK is read along its other dim: absorbed queries are sums over what a key head adds up to.
    bind["w_uk_" + parse(format).parts[0]] = low.matrix(w_uk[0], "w", format, nope, turned=True)
    bind |= {"w_uk_scale": low.operand(w_uk[1])} if len(w_uk) > 1 else {}
    bind |= _matrix(low, "w_uv_", format, w_uv)
    low.emit(node, spec, **bind, out=low.out(node))


def _cache_write(
    low: Lowering, node: fx.Node, spec: plan.CacheWrite, cache: fx.Node, *parts: fx.Node
) -> None:
    bind = {f"p{i}": low.operand(part) for i, part in enumerate(parts)}
    low.emit(node, spec, **bind, cache=low.operand(cache))


def _route(low: Lowering, node: fx.Node) -> None:
    logits, bias, router = node.args
    spec = plan.Route(width(logits), ops.load_router(router))
    bind = {"bias": low.operand(bias)} if bias is not None else {}
    ids, weights = low.results(node, 2)
    low.emit(node, spec, logits=low.operand(logits), **bind, ids=ids, weights=weights)


def _experts(low: Lowering, node: fx.Node) -> None:
    x, ids, weights, gate_up, down, residual, up_format, down_format, activation, gated, *biases = (
        node.args
    )
    count, rows, _ = shape(gate_up[0])
    formats = _kernel_format(low, up_format), _kernel_format(low, down_format)
    spec = plan.Experts(
        count, width(ids), width(x), rows // (2 if gated else 1), *formats,
        activation, gated, residual is not None, bool(biases),
    )  # fmt: skip
    inputs = {"x": x, "ids": ids, "weights": weights}
    if residual is not None:
        inputs["residual"] = residual
    inputs |= dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))
    bind = {name: low.operand(n) for name, n in inputs.items()}
    bind |= _matrix(low, "gate_up_", up_format, gate_up, 2 if gated else 1)
    bind |= _matrix(low, "down_", down_format, down)
    low.emit(node, spec, **bind, out=low.out(node))


def custom(low: Lowering, node: fx.Node) -> None:
    """An op that a user registered: plain tensors in, one row of the result for each row of theirs."""
    op = ops.custom_op(node.target)
    assert op is not None
    operands: list[Shaped] = []
    attributes: list[tuple[str, Any]] = []
    bind: dict[str, Operand] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        given = node.kwargs.get(argument.name, argument.default_value)
        value = node.args[i] if i < len(node.args) else given
        if isinstance(value, fx.Node):
            bind[argument.name] = low.operand(value)
            operands.append(_shaped(low, node, argument.name, value, bind[argument.name]))
        elif isinstance(value, list | tuple):
            raise _unfit(node, f"its argument {argument.name} is a list: take tensors one by one")
        else:
            attributes.append((argument.name, value))
    out = features(node)
    if out is None or node.meta["val"].dtype != torch.float32:
        raise _unfit(node, "it must yield float32, one row for each row of its operands")
    spec = plan.Custom(op.name, tuple(operands), tuple(attributes), out)
    if not _takes_rows_alone(spec):
        raise TokenMixing(op=node.target, where=where(node))
    low.emit(node, spec, **bind, out=low.out(node))


def _shaped(low: Lowering, op: fx.Node, name: str, node: fx.Node, operand: Operand) -> Shaped:
    if is_weight(node):
        return Shaped(name, shape(node), low.buffers[operand.buffer].dtype, weight=True)
    row, buffer = features(node), low.buffers[operand.buffer]
    if row is None or buffer.kind != "arena" or low.rows(node) != low.rows(op):
        raise _unfit(op, f"{name} must be computed, and have as many rows as the result")
    return Shaped(name, row, buffer.dtype)


def _unfit(node: fx.Node, why: str) -> NotLowered:
    return NotLowered(op=node.target, where=where(node), advice=why)


@lru_cache(maxsize=256)
def _takes_rows_alone(spec: plan.Custom) -> bool:
    """Whether the op's reference yields for rows together what it yields for each, on random numbers."""
    rng = torch.Generator().manual_seed(0)
    given: dict[str, Any] = dict(spec.attributes)
    rows: dict[str, Tensor] = {}
    for operand in spec.operands:
        sizes = operand.shape if operand.weight else (3, *operand.shape)
        floats = operand.dtype in ("f32", "bf16")
        value = torch.randn(sizes, generator=rng) if floats else torch.zeros(sizes).int()
        (given if operand.weight else rows)[operand.name] = value
    call = ops.OPS[spec.op].overload
    together = call(**given, **rows)
    alone = [call(**given, **{n: x[i : i + 1] for n, x in rows.items()}) for i in range(3)]
    return together.shape[0] == 3 and torch.allclose(together, torch.cat(alone), 1e-4, 1e-5)


KERNELS: dict[Any, Callable[[Lowering, fx.Node], None]] = {
    mill.embed: _embed,
    mill.select_rows: _select_rows,
    mill.rms_norm: _rms_norm,
    mill.layer_norm: _layer_norm,
    mill.add_rms_norm: _add_rms_norm,
    mill.linear: _linear,
    mill.pointwise: _pointwise,
    mill.rope: _rope,
    mill.cached_attention: _cached_attention,
    mill.cached_latent_attention: _cached_latent_attention,
    mill.route: _route,
    mill.experts: _experts,
}
