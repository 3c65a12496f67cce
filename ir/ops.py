"""Dialect ops: the fused ideas a Program may hold, each with its schema, shape rule and meaning.

Every op is registered with ``torch.library``, so a graph that holds it runs, traces and exports like any
other.  Activations are ``[..., F]``: whatever leading dims there are, their product is the number of
tokens ``T``.  The function under a declaration *is* the op's reference; kernels are tested against it.

Weights come as the parts of a format (see :mod:`.quant`); ``["fp32"]`` parts are the plain tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cache as kv
from . import expr, quant
from .plan import gqa_cache, latent_cache
from .router import RouterSpec
from .router import route as route_reference

_LIBRARY = torch.library.Library("tokenmill", "DEF")
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Op:
    """A dialect op; ``reference`` runs it eagerly and ``shape`` says what comes out, on fake tensors.

    Those that users register are ``custom``.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    shape: Callable[..., Any]
    custom: bool = False

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.tokenmill, self.name).default


OPS: dict[str, Op] = {}


def op(schema: str, shape: Callable[..., Any], custom: bool = False) -> Callable[[_F], _F]:
    """Declare a dialect op: ``name(arguments) -> results`` in the schema language of torch."""
    name = schema.split("(")[0]

    def declare(reference: _F) -> _F:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tokenmill::{name}", shape, lib=_LIBRARY)
        OPS[name] = Op(name, schema, reference, shape, custom)
        return reference

    return declare


def custom_op(target: Any) -> Op | None:
    """The op that a graph node's target calls, if a user registered it."""
    known = getattr(target, "namespace", "") == "tokenmill"
    op = OPS.get(target._schema.name.split("::")[1]) if known else None
    return op if op is not None and op.custom else None


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _last(x: Tensor, width: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], width])


# --- embeddings, norms, linear maps, pointwise ------------------------------------------------------


@op(
    "embed(Tensor[] table, Tensor index, str format) -> Tensor",
    lambda table, index, format: table[0].new_empty(
        [*index.shape, table[0].shape[-1]], dtype=torch.float32
    ),
)
def embed(table: list[Tensor], index: Tensor, format: str) -> Tensor:
    """Rows of a table ``[V, F]`` (fp32, bf16, or int8 with one scale per row) by index ``[...]``, in fp32.

    >>> embed([torch.tensor([[1.0], [2.0]])], torch.tensor([1, 1]), "fp32").tolist()
    [[2.0], [2.0]]
    """
    rows = [part[index.long()] for part in table]
    return _weight(format, rows, rows[0].shape[-1])


@op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _same)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang & Sennrich 2019).

    >>> rms_norm(torch.tensor([[3.0, 3.0]]), torch.ones(2), 0.0).tolist()
    [[1.0, 1.0]]
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@op("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor", _same)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), None, None, 0.0).tolist()
    [[-1.0, 1.0]]
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, rms_norm(x + residual)): a block's end and the next one's beginning.

    >>> total, normed = add_rms_norm(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 0.0)
    >>> total.tolist(), normed.tolist()
    ([[2.0, 2.0]], [[1.0, 1.0]])
    """
    total = x + residual
    return total, rms_norm(total, weight, eps)


@op(
    "linear(Tensor x, Tensor[] weight, Tensor? bias, Tensor[] extras, str format, int parts, "
    "str epilogue) -> Tensor",
    lambda x, weight, bias, extras, format, parts, epilogue: _last(x, weight[0].shape[0] // parts),
)
def linear(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    extras: list[Tensor],
    format: str,
    parts: int,
    epilogue: str,
) -> Tensor:
    """epilogue(x W^T + bias), ``W [parts * N, K]``; the epilogue sees acc0 (acc1) and extras e0, e1...

    >>> x, gate_up = torch.ones(1, 1), torch.tensor([[0.0], [5.0]])
    >>> linear(x, [gate_up], None, [], "fp32", 2, "acc0 + acc1").tolist()
    [[5.0]]
    """
    w = _weight(format, weight, x.shape[-1])
    accumulators = F.linear(x, w, bias).chunk(parts, -1)
    operands = {f"acc{i}": a for i, a in enumerate(accumulators)}
    operands |= {f"e{i}": e for i, e in enumerate(extras)}
    return expr.evaluate(expr.parse(epilogue), operands)


@op(
    "dequantize(Tensor[] parts, str format, int k) -> Tensor",
    lambda parts, format, k: parts[0].new_empty([*parts[0].shape[:-1], k], dtype=torch.float32),
)
def dequantize(parts: list[Tensor], format: str, k: int) -> Tensor:
    """The fp32 weight ``[..., N, k]`` that quantized parts stand for: step one of quantization.

    >>> dequantize([torch.tensor([[2]], dtype=torch.int8), torch.tensor([0.5])], "int8", 1).tolist()
    [[1.0]]
    """
    values = _weight(format, parts, k)
    # The fp32 format is its own value, and an op must not return its argument.
    return values.clone() if values is parts[0] else values


@op(
    "pointwise(Tensor[] xs, str expression) -> Tensor",
    lambda xs, expression: torch.empty(
        torch.broadcast_shapes(*(x.shape for x in xs)), dtype=xs[0].dtype, device=xs[0].device
    ),
)
def pointwise(xs: list[Tensor], expression: str) -> Tensor:
    """A scalar expression of x0, x1, ... at every element, with broadcasting.

    >>> pointwise([torch.tensor([1.0]), torch.tensor([2.0])], "x0 * x1 + 1.0").tolist()
    [3.0]
    """
    return expr.evaluate(expr.parse(expression), {f"x{i}": x for i, x in enumerate(xs)})


@op(
    "select_rows(Tensor x, Tensor rows) -> Tensor",
    lambda x, rows: x.new_empty([*x.shape[:-2], rows.shape[0], x.shape[-1]]),
)
def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens ``rows [R]`` of ``x [..., T, F]``: those that go through the head.

    >>> select_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([1])).tolist()
    [[2.0]]
    """
    return x.index_select(-2, rows.long())


@op(
    "rope(Tensor x, Tensor cos, Tensor sin, int offset, bool interleaved) -> Tensor",
    _same,
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, offset: int, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al. 2021) of columns offset:offset+2P of every head.

    ``x [..., T, H, D]``; ``cos`` and ``sin`` are ``[..., T, P]``, one angle per pair.  Pairs are (i, i + P)
    or, interleaved, (2i, 2i + 1).

    >>> quarter = torch.tensor([[0.0]]), torch.tensor([[1.0]])
    >>> rope(torch.tensor([[[7.0, 1.0, 0.0]]]), *quarter, 1, False).tolist()
    [[[7.0, 0.0, 1.0]]]
    """
    pairs = cos.shape[-1]
    cos, sin = (t.reshape(*x.shape[:-2], 1, pairs) for t in (cos, sin))
    rotary = x[..., offset : offset + 2 * pairs]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = rotary.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((x[..., :offset], turned, x[..., offset + 2 * pairs :]), -1)


# --- attention --------------------------------------------------------------------------------------


def _scores_to_output(
    q: Tensor, k: Tensor, v: Tensor, first: int, sinks: Tensor | None, scale: float, window: int,
    softcap: float, slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of queries ``[S, H, D]`` at positions first.. over keys ``[L, Hkv, D]``."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("shd,lhd->hsl", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(first, first + q.shape[0], device=q.device)[:, None]
    key = torch.arange(k.shape[0], device=q.device)[None]
    if slopes is not None:
        scores = scores + slopes[:, None, None] * (key - at)
    hidden = key > at if not window else (key > at) | (key <= at - window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks[:, None, None].expand(-1, q.shape[0], 1)
        probabilities = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    return torch.einsum("hsl,lhd->shd", probabilities, v).contiguous()


@op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, float scale, int window, float softcap, "
    "Tensor? slopes=None) -> Tensor",
    lambda q, k, v, *_: _last(q, v.shape[-1]),
)
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int,
    softcap: float, slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of one whole sequence: ``q [.., T, H, D]``, ``k, v [.., T, Hkv, D | Dv]``.

    A query sees itself and the window - 1 tokens before it (window 0: all).  ``sinks [H]`` are extra
    logits in the denominator.  ``slopes [H]`` bias a score by slope (j - i) for key j and query i
    (ALiBi, Press et al. 2022).

    >>> one = torch.ones(2, 1, 1)
    >>> attention(one, one, torch.tensor([[[2.0]], [[4.0]]]), None, 1.0, 0, 0.0).flatten().tolist()
    [2.0, 3.0]
    """
    queries, keys, values = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    out = _scores_to_output(queries, keys, values, 0, sinks, scale, window, softcap, slopes)
    return out.reshape(*q.shape[:-1], v.shape[-1])


@op(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor(a!) cache, "
    "Tensor positions, Tensor starts, Tensor block_table, float scale, int window, float softcap, "
    "str format, Tensor? slopes=None) -> Tensor",
    lambda q, k, v, *_: _last(q, v.shape[-1]),
)
def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cache: Tensor, positions: Tensor,
    starts: Tensor, block_table: Tensor, scale: float, window: int, softcap: float, format: str,
    slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`attention` of a ragged batch: store the step's keys and values, then attend to the cache."""
    batch = kv.Batch(positions.flatten(), starts, block_table)
    heads_kv, dim, value_dim = k.shape[-2], k.shape[-1], v.shape[-1]
    spec = gqa_cache("", format, heads_kv, dim, value_dim)
    tokens = [t.reshape(-1, heads_kv * t.shape[-1]) for t in (k, v)]
    kv.write(spec, cache, batch, tokens)
    queries = q.reshape(-1, *q.shape[-2:])
    out = torch.zeros(*queries.shape[:-1], value_dim)
    for b, lo, hi, first in _sequences(batch):
        keys, values = kv.read(spec, cache, batch, b, first + hi - lo)
        keys, values = keys.unflatten(-1, (heads_kv, dim)), values.unflatten(-1, (heads_kv, -1))
        out[lo:hi] = _scores_to_output(
            queries[lo:hi], keys, values, first, sinks, scale, window, softcap, slopes
        )
    return out.reshape(*q.shape[:-1], value_dim)


@op(
    "latent_attention(Tensor q, Tensor latent, Tensor k_rope, Tensor[] w_uk, Tensor[] w_uv, "
    "str format, float scale) -> Tensor",
    lambda q, latent, k_rope, w_uk, w_uv, format, scale: _last(q, w_uv[0].shape[-2]),
)
def latent_attention(
    q: Tensor, latent: Tensor, k_rope: Tensor, w_uk: list[Tensor], w_uv: list[Tensor], format: str,
    scale: float,
) -> Tensor:  # fmt: skip
    """Multi-head latent attention (DeepSeek-V2) of one whole sequence, expanded.

    ``q [.., T, H, nope + rope]``, ``latent [.., T, R]``, ``k_rope [.., T, rope]`` shared by the heads,
    ``w_uk [H, nope, R]``, ``w_uv [H, value, R]``: k = [w_uk c, k_rope], v = w_uv c.
    """
    c, r = (t.reshape(-1, t.shape[-1]) for t in (latent, k_rope))
    queries = q.reshape(-1, *q.shape[-2:])
    up, down = (_weight(format, w, c.shape[-1]) for w in (w_uk, w_uv))
    out = _expanded(queries, c, r, up, down, 0, scale)
    return out.reshape(*q.shape[:-1], w_uv[0].shape[-2])


@op(
    "cached_latent_attention(Tensor q, Tensor latent, Tensor k_rope, Tensor[] w_uk, Tensor[] w_uv, "
    "Tensor(a!) cache, Tensor positions, Tensor starts, Tensor block_table, str format, "
    "float scale, str cache_format) -> Tensor",
    lambda q, latent, k_rope, w_uk, w_uv, *_: _last(q, w_uv[0].shape[-2]),
)
def cached_latent_attention(
    q: Tensor, latent: Tensor, k_rope: Tensor, w_uk: list[Tensor], w_uv: list[Tensor],
    cache: Tensor, positions: Tensor, starts: Tensor, block_table: Tensor, format: str,
    scale: float, cache_format: str,
) -> Tensor:  # fmt: skip
    """:func:`latent_attention` of a ragged batch over a cache that holds latents only, absorbed.

    score = scale (q_nope w_uk . c + q_rope . k_rope); out = w_uv sum(p c).
    """
    batch = kv.Batch(positions.flatten(), starts, block_table)
    rank, rotary = latent.shape[-1], k_rope.shape[-1]
    spec = latent_cache("", cache_format, rank, rotary)
    kv.write(spec, cache, batch, [t.reshape(-1, t.shape[-1]) for t in (latent, k_rope)])
    queries = q.reshape(-1, *q.shape[-2:])
    up, down = (_weight(format, w, rank) for w in (w_uk, w_uv))
    out = torch.zeros(*queries.shape[:-1], down.shape[-2])
    for b, lo, hi, first in _sequences(batch):
        c, r = kv.read(spec, cache, batch, b, first + hi - lo)
        out[lo:hi] = _absorbed(queries[lo:hi], c, r, up, down, first, scale)
    return out.reshape(*q.shape[:-1], down.shape[-2])


def _expanded(
    q: Tensor, c: Tensor, r: Tensor, w_uk: Tensor, w_uv: Tensor, first: int, scale: float
) -> Tensor:
    """k = [w_uk c, r] and v = w_uv c, then plain attention: cheapest for many queries."""
    keys = torch.einsum("hnr,lr->lhn", w_uk, c)
    shared = r[:, None].expand(-1, q.shape[1], -1)
    values = torch.einsum("hvr,lr->lhv", w_uv, c)
    return _scores_to_output(q, torch.cat((keys, shared), -1), values, first, None, scale, 0, 0.0)


def _absorbed(
    q: Tensor, c: Tensor, r: Tensor, w_uk: Tensor, w_uv: Tensor, first: int, scale: float
) -> Tensor:
    """Attention among latents, one key and value for all heads: cheapest for few queries."""
    nope = w_uk.shape[1]
    query = torch.cat((torch.einsum("shn,hnr->shr", q[..., :nope], w_uk), q[..., nope:]), -1)
    keys = torch.cat((c, r), -1)[:, None]
    out = _scores_to_output(query, keys, c[:, None], first, None, scale, 0, 0.0)
    return torch.einsum("shr,hvr->shv", out, w_uv).contiguous()


def _sequences(batch: kv.Batch) -> list[tuple[int, int, int, int]]:
    """(sequence, first token, end token, position of the first token) of those with tokens."""
    bounds = batch.starts.tolist()
    spans = zip(range(len(bounds) - 1), bounds, bounds[1:], strict=False)
    return [(b, lo, hi, int(batch.positions[lo])) for b, lo, hi in spans if hi > lo]


# --- experts ----------------------------------------------------------------------------------------


def dump_router(spec: RouterSpec) -> str:
    """A router spec as the text that a graph node carries."""
    return json.dumps(asdict(spec), sort_keys=True)


def load_router(source: str) -> RouterSpec:
    return RouterSpec(**json.loads(source))


def _route_shape(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    shape = [*logits.shape[:-1], load_router(spec).top_k]
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape)


@op("route(Tensor logits, Tensor? bias, str spec) -> (Tensor, Tensor)", _route_shape)
def route(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """Expert ids and weights ``[..., top_k]`` of logits ``[..., E]``, by a RouterSpec in JSON.

    >>> ids, weights = route(torch.tensor([[1.0, 2.0]]), None, dump_router(RouterSpec(top_k=1)))
    >>> ids.tolist(), weights.tolist()
    ([[1]], [[1.0]])
    """
    return route_reference(logits, bias, load_router(spec))


@op(
    "experts(Tensor x, Tensor ids, Tensor weights, Tensor[] gate_up, Tensor[] down, "
    "Tensor? residual, str gate_up_format, str down_format, str activation, bool gated, "
    "Tensor? gate_up_bias=None, Tensor? down_bias=None) -> Tensor",
    _same,
)
def experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: list[Tensor], down: list[Tensor],
    residual: Tensor | None, gate_up_format: str, down_format: str, activation: str, gated: bool,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(residual +) the weighted sum of each token's experts, down(act(gate_up x)).

    ``gate_up [E, 2I, H]`` (gate rows first; ``[E, I, H]`` if not gated), ``down [E, H, I]``,
    ``ids, weights [..., k]``; the activation is an expression of acc0 (and acc1).  Biases are
    ``[E, 2I]`` (or ``[E, I]``) and ``[E, H]``, both or none.

    >>> w = torch.ones(2, 1, 1)
    >>> args = torch.tensor([[1]]), torch.tensor([[3.0]]), [w], [w], None, "fp32", "fp32"
    >>> experts(torch.tensor([[2.0]]), *args, "relu(acc0)", False).tolist()
    [[6.0]]
    """
    tokens, hidden = x.reshape(-1, x.shape[-1]), x.shape[-1]
    inter = gate_up[0].shape[-2] // (2 if gated else 1)
    up = _weight(gate_up_format, gate_up, hidden)
    low = _weight(down_format, down, inter)
    chosen, share = ids.reshape(len(tokens), -1), weights.reshape(len(tokens), -1)
    out = torch.zeros_like(tokens)
    for e in chosen.unique().tolist():
        token, slot = (chosen == e).nonzero(as_tuple=True)
        acc = F.linear(tokens[token], up[e], None if gate_up_bias is None else gate_up_bias[e])
        acc = acc.chunk(2 if gated else 1, -1)
        mid = expr.evaluate(expr.parse(activation), {f"acc{i}": a for i, a in enumerate(acc)})
        answer = F.linear(mid, low[e], None if down_bias is None else down_bias[e])
        out.index_add_(0, token, answer * share[token, slot][:, None])
    total = out.reshape(x.shape)
    return total if residual is None else total + residual


def _weight(format: str, parts: list[Tensor], k: int) -> Tensor:
    """The fp32 matrix ``[..., N, k]`` of a weight's parts."""
    fmt = quant.parse(format)
    return quant.dequantize(dict(zip(fmt.parts, parts, strict=True)), fmt, k)
