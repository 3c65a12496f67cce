"""Recognise attention in modules that spell it out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_field
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, fx

from ..errors import Unsupported
from ..ir.program import Program, shape, where
from . import layout
from .base import (
    Pass,
    ancestors,
    aten,
    calls,
    is_call,
    mill,
    replace,
    same_size,
    sweep,
    token_count,
)
from .contractions import Contraction
from .region import Region, dependents, is_token_count

_SAMPLE = 97  # tokens of a probe, if no number in the code speaks of more
_HIDDEN = -9e3  # people hide with -inf, the smallest number, -1e9 or -1e4
_SCORES = 1 << 27  # numbers of a probe's scores
_TOLERANCE = 1e-4
_REWRITE = "write it as torch.nn.functional.scaled_dot_product_attention with is_causal=True"


@dataclass
class LiftAttention(Pass):
    """softmax(scale q k^T + causal mask) v = attention(q, k, v)

    Whoever writes the softmax out has a way of his own to scale, cap, hide and bias the scores: what is
    between the two products is run on chosen scores that reveal it, and the whole is compared with the op.
    """

    name = "lift_attention"

    def run(self, program: Program) -> int:
        forms: _Forms = {}
        composite, written = list(calls(program, _SDPA)), list(_written(program))
        for node in composite:
            _composite(program, node, forms)
        for one in written:
            _spelled_out(program, one, forms)
        layout.settle(program)
        sweep(program)
        return len(composite) + len(written)


_SDPA = aten.scaled_dot_product_attention
_DEFAULTS = (None, None, None, None, 0.0, False)


def _composite(program: Program, node: fx.Node, forms: _Forms) -> None:
    """One call of scaled_dot_product_attention."""
    q, k, v, mask, dropout, causal = (*node.args, *_DEFAULTS[len(node.args) :])[:6]
    causal = causal or node.kwargs.get("is_causal", False)
    scale = node.kwargs.get("scale") or 1.0 / math.sqrt(int(shape(q)[-1]))
    if dropout:
        _refuse(node, "attention with dropout", "call model.eval() first")
    if not isinstance(mask, fx.Node):
        if not causal:
            _refuse(node, "attention that sees later tokens", "only decoders can be compiled")
        form = _Form(scale)
    else:
        if causal:
            _refuse(node, "attention that is causal and has a mask", "give it one of the two")
        heads = int(shape(mask)[-3]) if len(shape(mask)) > 2 else 1
        form = _read(program, node, mask, None, heads, forms).scaled(scale)
    with program.graph.inserting_before(node):
        inner = [program.call(aten.transpose.int, t, 1, 2, like=node) for t in (q, k, v)]
        out = form.call(program, node, *inner)
        replace(program, node, program.call(aten.transpose.int, out, 1, 2, like=node))


# --- what is done to the scores ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """The attention op's arguments beside q, k and v; ``slopes`` are ALiBi's, one a head."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    slopes: tuple[float, ...] = ()
    sinks: str = ""  # a weight

    def scaled(self, factor: float) -> _Form:
        return replace_field(self, scale=self.scale * factor)

    def call(self, program: Program, node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
        sinks = program.weight(self.sinks) if self.sinks else None
        slopes = [program.weight(_slopes_weight(program, self.slopes))] if self.slopes else []
        return program.call(
            mill.attention.default, q, k, v, sinks, self.scale, self.window, self.softcap, *slopes,
            like=node,
        )  # fmt: skip


# By how the scores are treated, as far as that is in the code and not in weights.
_Forms: TypeAlias = dict[Hashable, _Form]


def _slopes_weight(program: Program, slopes: tuple[float, ...]) -> str:
    value, name = torch.tensor(slopes), f"alibi.{len(slopes)}"
    while name in program.weights and not torch.equal(program.weights[name], value):
        name += "'"
    if name not in program.weights:
        program.weights.add(name, value)
    return name


def _read(
    program: Program,
    at: fx.Node,
    logits: fx.Node,
    scores: fx.Node | None,
    heads: int,
    forms: _Forms,
) -> _Form:
    """What the code between ``scores`` and the softmax's ``logits`` does, found by running it.

    Without ``scores`` the logits are a mask that is added to them.
    """
    _refuse_data(program, at, logits, scores)
    probe = _Probe(program, at, logits, scores, heads)
    key = heads, str(scores and shape(scores)), probe.region.structure, tuple(probe.region.weights)
    if key not in forms:
        forms[key] = _form(program, at, probe)
    return forms[key]


def _form(program: Program, at: fx.Node, probe: _Probe) -> _Form:
    length = min(_SAMPLE, program.positions)
    none = probe(0.0, length)
    window = _window(at, none)
    longest = min(probe.speaks_of(), program.positions)
    if longest > length:
        window = _window(at, probe.thin(longest))
    seen = _triangle(length, window)
    if not torch.equal(_visible(none), seen.expand(_visible(none).shape)):
        _refuse_mask(at)
    bias = none.masked_fill(~seen, 0.0)
    slopes = _slopes(at, bias)
    scale, softcap = (1.0, 0.0) if probe.scores is None else _curve(at, probe, bias, seen)
    return _Form(scale, window, softcap, slopes)


def _refuse_data(program: Program, at: fx.Node, logits: fx.Node, scores: fx.Node | None) -> None:
    inside = ancestors(logits, lambda n: n is scores or is_token_count(n))
    positions = program.input("positions")
    if any(n.op == "placeholder" and n is not positions for n in inside):
        _refuse(
            at, "an attention mask that depends on the tokens", "pass no mask: batches need none"
        )


class _Probe:
    """Runs what is between scores and softmax on scores that are all alike, or given."""

    def __init__(
        self, program: Program, at: fx.Node, logits: fx.Node, scores: fx.Node | None, heads: int
    ) -> None:
        self.program, self.at, self.scores, self.heads = program, at, scores, heads
        inputs = [program.input("positions"), *([scores] if scores is not None else [])]
        self.region = Region([logits], inputs)

    def __call__(self, scores: float | Tensor, length: int, heads: int = 0) -> Tensor:
        """Logits ``[H, L, L]``, of scores ``[H, L, L]``."""
        heads = heads or self.heads
        if not isinstance(scores, Tensor):
            scores = torch.full((1, 1, 1), scores).expand(heads, length, length)
        inputs = [torch.arange(length)[None]]
        if self.scores is not None:
            sizes = [
                length if isinstance(s, torch.SymInt) else s if s == 1 or heads != 1 else 1
                for s in shape(self.scores)
            ]
            inputs.append(scores.reshape(sizes))
        out = self.region(inputs, length, self.program.weights)[0]
        if out.dtype == torch.bool:
            out = torch.zeros(out.shape).masked_fill(~out, -torch.inf)
        return out.float().reshape(-1, length, length)

    def thin(self, length: int) -> Tensor:
        """Logits of scores 0 at a length for which those of all heads would take much memory."""
        if self.heads * length * length <= _SCORES:
            return self(0.0, length)
        try:
            if length * length <= _SCORES and self.scores is not None:
                return self(0.0, length, heads=1)
        except RuntimeError:
            pass
        _refuse(self.at, f"an attention mask of {length} tokens, too long to look at", _REWRITE)

    def speaks_of(self) -> int:
        """The largest length that a number or a stored mask inside could make a difference at."""
        numbers = [0]
        for node in self.region.graph.nodes:
            flat: list[Any] = []
            torch.fx.node.map_aggregate((node.args, node.kwargs), flat.append)
            numbers += [a for a in flat if isinstance(a, int) and abs(a) < 1 << 31]
        for name in self.region.weights:
            numbers += [s for s in self.program.weights.like(name).shape if s > 1]
            numbers += [self._largest(name)]
        return max(map(abs, numbers)) + 2

    def _largest(self, name: str) -> int:
        """The number in a weight of one element, a window that is a tensor."""
        value = self.program.weights.like(name)
        return (
            int(self.program.weights[name].float().abs().clamp(max=1e9))
            if value.numel() == 1
            else 0
        )


def _visible(logits: Tensor) -> Tensor:
    return logits > _HIDDEN


def _triangle(length: int, window: int) -> Tensor:
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return (j <= i) & (j > i - window) if window else j <= i


def _window(at: fx.Node, logits: Tensor) -> int:
    """0 if the attention is causal over everything, w if over a window; refuses anything else."""
    visible, length = _visible(logits), logits.shape[-1]
    if bool(visible[:, 0, 1:].any()):
        _refuse(at, "attention that sees later tokens", "only decoders can be compiled")
    for window in (0, int(visible[0, -1].sum())):
        if torch.equal(visible, _triangle(length, window).expand(visible.shape)):
            return window
    _refuse_mask(at)


def _refuse_mask(at: fx.Node) -> NoReturn:
    _refuse(at, "an attention mask that is neither causal nor a sliding window", _REWRITE)


def _slopes(at: fx.Node, bias: Tensor) -> tuple[float, ...]:
    """Per head m of a bias m (j - i), up to what is the same for all keys of a query."""
    if not bias.any():
        return ()
    length = bias.shape[-1]
    own = bias.diagonal(dim1=1, dim2=2)[..., None]
    slopes = (bias[:, -1, -1] - bias[:, -1, 0]) / (length - 1)
    key = torch.arange(length)
    wanted = slopes[:, None, None] * (key[None] - key[:, None])
    seen = (wanted <= 0) if bool((slopes > 0).all()) else torch.ones_like(wanted, dtype=torch.bool)
    near = torch.isclose(bias - own, wanted, atol=1e-3, rtol=1e-4)
    if not bool((near | (bias == 0) | ~seen).all()):
        _refuse(at, "an attention bias that is not linear in the distance (ALiBi)", _REWRITE)
    return tuple(slopes.tolist())


def _curve(at: fx.Node, probe: _Probe, bias: Tensor, seen: Tensor) -> tuple[float, float]:
    """scale and softcap of logits = softcap tanh(scale s / softcap) + bias, softcap 0 for none."""
    length = seen.shape[-1]

    def value(scores: float | Tensor) -> Tensor:
        return (probe(scores, length) - bias).masked_fill(~seen, 0.0)

    scale = float(value(1e-2)[0, 0, 0]) / 1e-2
    softcap = float(value(1e6)[0, 0, 0])
    if math.isclose(softcap, 1e6 * scale, rel_tol=1e-2):
        softcap, scale = 0.0, softcap / 1e6
    rng = torch.Generator().manual_seed(0)
    scores = 3.0 * torch.randn(probe.heads, length, length, generator=rng)
    wanted = scale * scores
    if softcap:
        wanted = softcap * torch.tanh(wanted / softcap)
    if not torch.allclose(value(scores), wanted.masked_fill(~seen, 0.0), atol=1e-3, rtol=1e-3):
        _refuse(at, "attention scores that are more than scaled, capped and masked", _REWRITE)
    return scale, softcap


# --- attention in two products ----------------------------------------------------------------------


@dataclass
class _Written:
    """softmax(f(left right)) v, spelled out; ``sinks`` is the column that was joined to the scores."""

    scores: Contraction
    scores_node: fx.Node
    logits: fx.Node
    sinks: fx.Node | None
    out: Contraction
    out_node: fx.Node


def _written(program: Program) -> Iterator[_Written]:
    for softmax in calls(program, aten.softmax, aten._softmax):
        if softmax.args[1] not in (-1, len(shape(softmax)) - 1):
            continue
        inner = ancestors(softmax, lambda n: _pairs_tokens(program, n))
        products = [n for n in inner if _pairs_tokens(program, n)]
        uses = list(_products_of(softmax))
        if len(products) != 1 or len(uses) != 1:
            continue
        (product, probabilities), scores = uses[0], Contraction.read(products[0])
        out = Contraction.read(product)
        if scores is None or out is None:
            continue
        out = out if out.left is probabilities else out.turned()
        logits, sinks = _without_sinks(softmax.args[0])
        yield _Written(scores, products[0], logits, sinks, out, product)


def _pairs_tokens(program: Program, node: fx.Node) -> bool:
    """Whether the node multiplies every token's vector with every other's."""
    read = Contraction.read(node)
    return read is not None and sum(_is_tokens(program, s) for s in shape(node)) == 2


def _is_tokens(program: Program, size: Any) -> bool:
    return same_size(size, program.input("ids").meta["val"].shape[1])


def _products_of(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The first products that take what comes of the node, and what they take."""
    seen, stack = set[fx.Node](), [(user, node) for user in node.users]
    while stack:
        at, source = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        if Contraction.read(at) is not None:
            yield at, source
        else:
            stack.extend((user, at) for user in at.users)


def _without_sinks(logits: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The logits of tokens, and a column of others that takes part in the softmax."""
    if is_call(logits, aten.sub) and is_call(peak := logits.args[1], aten.amax, aten.max):
        source = logits.args[0]
        if peak.args[0] is source:  # which softmax does not see
            logits = source
    if is_call(logits, aten.cat) and len(logits.args[0]) == 2:
        tokens, column = logits.args[0]
        if shape(column)[-1] == 1:
            return tokens, column
    return logits, None


def _spelled_out(program: Program, one: _Written, forms: _Forms) -> None:
    scores, out, node = one.scores, one.out, one.out_node
    if scores.out_dims[-1] in scores.left_dims:
        scores = scores.turned()
    asks, gives = _Side.left(scores, scores.out_dims[-1]), _Side.left(out, out.left_dims[-1])
    keys, values = _Side.right(scores, asks), _Side.right(out, gives)
    if keys is None or values is None or keys.count != values.count:
        _refuse(node, "attention whose heads are laid out in an unknown way", _REWRITE)
    form = _read(program, node, one.logits, one.scores_node, asks.count, forms)
    if one.sinks is not None:
        form = replace_field(form, sinks=_column(program, node, one.sinks))
    with program.graph.inserting_before(node):
        q, k, v = (
            side.rows(program, operand, node)
            for side, operand in ((asks, scores.left), (keys, scores.right), (values, out.right))
        )
        result = form.call(program, node, q, k, v)
        new = gives.back(program, result, out, node)
    _verify(program, node, new, [scores.left, scores.right, out.right])
    replace(program, node, new)


@dataclass(frozen=True)
class _Side:
    """How an operand of one of the products is laid out: which letter is what, of which size."""

    dims: str
    tokens: str
    heads: tuple[str, ...]
    inner: str
    sizes: dict[str, Any]

    @classmethod
    def left(cls, product: Contraction, key: str) -> _Side:
        """Queries (or probabilities), whose heads are all the heads there are."""
        sizes = product.sizes
        named = [c for c in product.left_dims if not _is_one(sizes[c])]
        inner = product.summed[0]
        rest = [c for c in named if c not in (inner, key)]
        steps = [c for c in rest if isinstance(sizes[c], torch.SymInt)]
        heads = [c for c in product.out_dims if c in rest and c not in steps]
        return cls(product.left_dims, "".join(steps), tuple(heads), inner, sizes)

    @classmethod
    def right(cls, product: Contraction, left: _Side) -> _Side | None:
        """Keys or values: their heads must be the first of the letters of all heads."""
        sizes, dims = product.sizes, product.right_dims
        heads = tuple(c for c in left.heads if c in dims)
        named = [c for c in dims if not _is_one(sizes[c]) and c not in heads]
        steps = [c for c in named if isinstance(sizes[c], torch.SymInt)]
        inner = [c for c in named if c not in steps]
        if left.heads[: len(heads)] != heads or (len(steps), len(inner)) != (1, 1):
            return None
        if len(product.summed) != 1 or len(left.tokens) != 1:
            return None
        return cls(dims, steps[0], heads, inner[0], sizes)

    @property
    def count(self) -> int:
        return math.prod(int(self.sizes[c]) for c in self.heads)

    def rows(self, program: Program, operand: fx.Node, like: fx.Node) -> fx.Node:
        """The operand as ``[1, T, H, D]``."""
        order = [c for c in self.dims if c not in (self.tokens, *self.heads, self.inner)]
        order += [self.tokens, *self.heads, self.inner]
        places = [self.dims.index(c) for c in order]
        if places != sorted(places):
            operand = program.call(aten.permute.default, operand, places, like=like)
        sizes = [1, token_count(program), self.count, int(self.sizes[self.inner])]
        return program.call(aten.reshape.default, operand, sizes, like=like)

    def back(
        self, program: Program, result: fx.Node, product: Contraction, like: fx.Node
    ) -> fx.Node:
        """Attention's ``[1, T, H, Dv]`` as the product's result was laid out."""
        count, named = token_count(program), [self.tokens, *self.heads]
        width = [c for c in product.out_dims if c not in product.left_dims]
        width = [c for c in width if not _is_one(product.sizes[c])]
        sizes = [count, *(int(self.sizes[c]) for c in self.heads), int(shape(result)[-1])]
        result = program.call(aten.reshape.default, result, sizes, like=like)
        order = [c for c in product.out_dims if c in (*named, *width)]
        places = [[*named, *width].index(c) for c in order]
        if places != sorted(places):
            result = program.call(aten.permute.default, result, places, like=like)
        full = [count if isinstance(s, torch.SymInt) else s for s in shape(like)]
        return program.call(aten.reshape.default, result, full, like=like)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _column(program: Program, at: fx.Node, column: fx.Node) -> str:
    """The weight ``[H]`` that a column ``[1, H, T, 1]`` repeats for every token."""
    if column in dependents(program, lambda n: n.op == "placeholder"):
        _refuse(at, "attention with a sink that depends on the tokens", _REWRITE)
    region = Region([column], [])
    sources = list(dict.fromkeys(region.weights))

    def first(*values: Tensor) -> Tensor:
        return region([], 1, dict(zip(sources, values, strict=True)))[0].reshape(-1).contiguous()

    name = program.weights.fresh(f"{sources[0]}.sinks")
    program.weights.derive(name, first, *sources)
    return name


def _verify(program: Program, old: fx.Node, new: fx.Node, inputs: list[fx.Node]) -> None:
    """Refuse unless both compute the same from random operands."""
    inputs, tokens = list(dict.fromkeys(inputs)), 24
    rng = torch.Generator().manual_seed(0)
    values = [
        torch.randn([tokens if isinstance(s, torch.SymInt) else s for s in shape(n)], generator=rng)
        for n in inputs
    ]
    given, at = [*inputs, program.input("positions")], torch.arange(tokens)[None]
    wanted, found = (
        Region([node], given)([*values, at], tokens, program.weights)[0] for node in (old, new)
    )
    if not torch.allclose(wanted, found, atol=_TOLERANCE, rtol=_TOLERANCE):
        _refuse(old, "attention that is more than softmax(scale q k^T + mask) v", _REWRITE)


def _refuse(node: fx.Node, what: str, advice: str) -> NoReturn:
    raise Unsupported(reason=what, where=where(node), advice=advice)
