"""Grouped-query and multi-head attention become latent attention: the graph's side, see latent_factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ..errors import Unsupported
from ..ir import ops
from ..ir.program import Program, is_weight, module_path, shape, where
from .base import (
    aten,
    behind_reshapes,
    calls,
    is_call,
    mill,
    replace,
    token_count,
)
from .calibrate import Walk
from .latent_factors import Heads, Inputs, Latent, Rotation, linearised
from .region import Region

_SAMPLE_SEQUENCES = 4  # of those on which distances and balances are measured


class NotConvertible(Exception):
    """Why an attention must stay as it is."""


@dataclass(frozen=True)
class Site:
    """One attention: keys, queries and values are functions of ``x``, rotary or not.

    ``query``, ``key``, ``value`` are ``[1, T, heads, width]`` before RoPE; ``projections`` the linear maps
    that make them; ``rope`` the op on keys if there is one; ``output`` the linear map that reads the result.
    """

    attention: fx.Node
    x: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    projections: tuple[fx.Node, fx.Node, fx.Node]
    rope: fx.Node | None
    output: fx.Node

    @property
    def scale(self) -> float:
        return float(self.attention.args[4])

    @property
    def heads(self) -> int:
        return int(shape(self.query)[-2])

    @property
    def groups(self) -> int:
        return int(shape(self.key)[-2])

    @property
    def width(self) -> int:
        return int(shape(self.key)[-1])

    @property
    def value_width(self) -> int:
        return int(shape(self.value)[-1])

    @property
    def cached(self) -> int:
        """Values that the cache holds per token."""
        return self.groups * (self.width + self.value_width)

    @property
    def path(self) -> str:
        return module_path(self.attention)

    @property
    def exact(self) -> bool:
        """Whether queries and keys are linear in x as they are: no norm stands between."""
        pairs = zip(self.projections, (self.query, self.key, self.value), strict=True)
        return all(behind_reshapes(made) is linear for linear, made in pairs)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Columns of a head that hold the real and the imaginary parts of what RoPE rotates."""
        if self.rope is None:
            return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
        _, cos, _, offset, interleaved = self.rope.args
        count = int(shape(cos)[-1])
        if interleaved:
            first = offset + 2 * torch.arange(count)
            return first, first + 1
        first = offset + torch.arange(count)
        return first, first + count


def find_sites(program: Program) -> tuple[list[Site], list[str]]:
    """The attentions that can be converted, and for each other one a line that says why it cannot."""
    sites, refused = [], []
    for node in calls(program, mill.attention):
        try:
            sites.append(_site(node))
        except NotConvertible as reason:
            refused.append(f"{module_path(node) or node.name} keeps its keys and values: {reason}")
    return sites, refused


def _site(node: fx.Node) -> Site:
    q, k, v, sinks, _, window, softcap, *slopes = node.args
    extras = {"sinks": sinks is not None, "sliding window": window, "soft cap": softcap,
              "distances that change scores": any(s is not None for s in slopes)}  # fmt: skip
    if found := [what for what, there in extras.items() if there]:
        raise NotConvertible(f"latent attention has no {found[0]}")
    ropes = [n if is_call(n, mill.rope) else None for n in (q, k)]
    if [n and n.args[1:] for n in ropes[:1]] != [n and n.args[1:] for n in ropes[1:]]:
        raise NotConvertible("queries and keys are rotated differently")
    if is_call(v, mill.rope):
        raise NotConvertible("values are rotated")
    query, key = (n.args[0] if is_call(n, mill.rope) else n for n in (q, k))
    projections = (_projection(query), _projection(key), _projection(v))
    inputs = {p.args[0] for p in projections}
    if len(inputs) > 1:
        raise NotConvertible("queries, keys and values are projections of different inputs")
    return Site(node, inputs.pop(), query, key, v, projections, ropes[1], _output(node))


def _projection(node: fx.Node) -> fx.Node:
    """The linear map that a query, key or value is made by, perhaps with a norm of each head behind it."""
    at = behind_reshapes(node)
    while is_call(at, mill.rms_norm, mill.layer_norm):
        at = behind_reshapes(at.args[0])
    if not is_call(at, aten.linear) or not is_weight(at.args[1]):
        raise NotConvertible(f"{node.name} is no projection of the layer's input")
    return at


def _output(node: fx.Node) -> fx.Node:
    at = node
    while len(at.users) == 1 and is_call(user := next(iter(at.users)), aten.reshape):
        at = user
    users = list(at.users)
    if len(users) != 1 or not is_call(users[0], aten.linear) or not is_weight(users[0].args[1]):
        raise NotConvertible("its result is not read by one linear map alone")
    return users[0]


# --- measuring --------------------------------------------------------------------------------------


@dataclass
class Layer:
    """One attention as a linear map of its input, with what a text showed."""

    heads: Heads
    inputs: Inputs
    rotation: Rotation
    scale: float
    sample: list[Tensor]  # inputs [T, n] of a few sequences
    results: list[Tensor]  # what attention adds to the residual stream there [T, N]

    def error(self, latent: Latent, frequency: Tensor) -> float:
        """The squared error of what latent attention adds, as a share of its square."""
        wrong = total = 0.0
        for x, wanted in zip(self.sample, self.results, strict=True):
            wrong += float((self.attend(latent, frequency, x) - wanted).square().sum())
            total += float(wanted.square().sum())
        return wrong / max(total, torch.finfo(torch.float64).tiny)

    def attend(self, latent: Latent, frequency: Tensor, x: Tensor) -> Tensor:
        """What latent attention adds to the residual stream, ``[T, N]``, for inputs ``x [T, n]``."""
        width = self.heads.query.shape[1]
        query = torch.einsum("hdn,tn->thd", latent.query, x) + latent.query_bias
        rotary = x @ latent.rotary.T + latent.rotary_bias
        angle = self.rotation.angle[: len(x), frequency]
        turn = ops.OPS["rope"].reference
        query = turn(query, angle.real, angle.imag, width, False)
        rotary = turn(rotary[:, None], angle.real, angle.imag, 0, False)[:, 0]
        out = ops.OPS["latent_attention"].reference(
            query.float(), (x @ latent.down.T).float(), rotary.float(), [latent.w_uk.float()],
            [latent.w_uv.float()], "fp32", self.scale,
        )  # fmt: skip
        mixed = torch.einsum("thv,hvn->tn", out.double(), self.heads.output)
        return mixed + latent.output_bias


def measure(
    program: Program,
    sites: Sequence[Site],
    text: Sequence[Tensor],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Layer]:
    """Every site as it is on a text, sequences of token ids ``[T]``."""
    first = {min(s.projections, key=_order(program)): s for s in sites}
    walk, found = Walk(program, text, first), list[Layer]()
    for node in walk:
        if node in first:
            found.append(_layer(program, first[node], walk.values[first[node].x]))
            progress(len(found))
    return found


def _order(program: Program) -> Callable[[fx.Node], int]:
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    return lambda node: place[node]


class _Moments(NamedTuple):
    second: Tensor
    mean: Tensor
    cross: list[Tensor]  # of queries, keys and values with inputs, [m, n] each


def _layer(program: Program, site: Site, values: Sequence[Tensor]) -> Layer:
    positions = program.input("positions")
    projected = Region([site.query, site.key, site.value], [site.x])
    attended = Region([*site.attention.args[:2], site.output], [site.x, positions])
    moments: _Moments | None = None
    sample, results, seen = [], [], torch.zeros(program.positions, dtype=torch.float64)
    for i, x in enumerate(values):
        tokens = x.shape[-2]
        rows = x.reshape(tokens, -1).double()
        made = projected([x], tokens, program.weights)
        moments = _add(moments, rows, [t.reshape(tokens, -1).double() for t in made])
        if i < _SAMPLE_SEQUENCES:
            inputs = [x, torch.arange(tokens)[None]]
            query, key, out = attended(inputs, tokens, program.weights)
            seen[:tokens] += _distances(query, key, site.scale)
            sample.append(rows)
            results.append(out.reshape(tokens, -1).double())
    assert moments is not None
    count = sum(x.shape[-2] for x in values)
    inputs_seen = Inputs(moments.second / count, moments.mean / count)
    heads = _heads(program, site, inputs_seen, [c / count for c in moments.cross])
    bias = _bias(program, site.output)
    results = [r - bias for r in results]
    rotation = Rotation(*site.pairs, _angles(program, site), seen / seen.sum())
    return Layer(heads, inputs_seen, rotation, site.scale, sample, results)


def _add(before: _Moments | None, x: Tensor, made: Sequence[Tensor]) -> _Moments:
    new = _Moments(x.T @ x, x.sum(0), [y.T @ x for y in made])
    if before is None:
        return new
    cross = [a + b for a, b in zip(before.cross, new.cross, strict=True)]
    return _Moments(before.second + new.second, before.mean + new.mean, cross)


def _distances(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """How much attention of one sequence goes to each distance, over heads and queries, ``[T]``."""
    q, k = (t.reshape(-1, *t.shape[-2:]).transpose(0, 1) for t in (q, k))
    k = k.repeat_interleave(len(q) // len(k), 0)
    tokens = q.shape[1]
    ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    share = (scale * q @ k.mT).masked_fill(ahead, -torch.inf).softmax(-1).sum(0).double()
    at = torch.arange(tokens)
    distance = (at[:, None] - at).clamp(min=0).flatten()
    return torch.zeros(tokens, dtype=torch.float64).index_add_(0, distance, share.flatten())


def _heads(program: Program, site: Site, seen: Inputs, cross: Sequence[Tensor]) -> Heads:
    made, sizes = [], [site.heads, site.groups, site.groups]
    ends = (site.query, site.key, site.value)
    for linear, end, count, c in zip(site.projections, ends, sizes, cross, strict=True):
        weight = program.weights[linear.args[1].target].double()
        bias = _bias(program, linear)
        if behind_reshapes(end) is not linear:
            start = weight * ((c * weight).sum() / ((weight @ seen.second) * weight).sum())
            weight, bias = linearised(seen.second, c, start), torch.zeros_like(bias)
        made += [weight.unflatten(0, (count, -1)), bias.unflatten(0, (count, -1))]
    query, query_bias, key, key_bias, value, value_bias = made
    output = program.weights[site.output.args[1].target].double()
    output = output.T.unflatten(0, (site.heads, -1))
    return Heads(query, key, value, query_bias, key_bias, value_bias, output)


def _bias(program: Program, linear: fx.Node) -> Tensor:
    if len(linear.args) > 2 and linear.args[2] is not None:
        return program.weights[linear.args[2].target].double()
    return torch.zeros(int(shape(linear)[-1]), dtype=torch.float64)


def _angles(program: Program, site: Site) -> Tensor:
    """``[positions, P]`` complex: what RoPE multiplies with."""
    if site.rope is None:
        return torch.ones(program.positions, 0, dtype=torch.complex128)
    cos, sin = (_table(program, node) for node in site.rope.args[1:3])
    return torch.complex(cos, sin)


def _table(program: Program, node: fx.Node) -> Tensor:
    """The table that a value of the position alone is looked up in."""
    inner = behind_reshapes(node)
    if not is_call(inner, mill.embed) or inner.args[1] is not program.input("positions"):
        raise Unsupported(
            reason="rotary angles that are not looked up by position", where=where(node),
            advice="leave out kv_compress",
        )  # fmt: skip
    return program.weights[inner.args[0][0].target].double()


def shaped(site: Site, rotary: int, rank: int) -> tuple[Latent, Tensor]:
    """Latent attention of a site without numbers, and frequencies for it."""
    n, heads = int(shape(site.x)[-1]), site.heads
    sizes = {
        "query": (heads, site.width + rotary, n), "query_bias": (heads, site.width + rotary),
        "rotary": (rotary, n), "rotary_bias": (rotary,), "down": (rank, n),
        "w_uk": (heads, site.width, rank), "w_uv": (heads, site.value_width, rank),
        "output_bias": (int(shape(site.output)[-1]),),
    }  # fmt: skip
    latent = Latent(**{name: torch.empty(size, device="meta") for name, size in sizes.items()})
    return latent, torch.zeros(rotary // 2, dtype=torch.long)


# --- rewriting --------------------------------------------------------------------------------------


def rewrite(program: Program, site: Site, latent: Latent, frequency: Tensor) -> list[str]:
    """Put latent attention in a site's place; returns the names of its weights, the output's among them."""
    writer = _Writer(program, site)
    with program.graph.inserting_before(site.attention):
        query, rotary, down, w_uk, w_uv = writer.inputs(latent, frequency)
        new = program.call(
            mill.latent_attention.default, query, down, rotary, [w_uk], [w_uv], "fp32", site.scale,
            like=site.attention,
        )  # fmt: skip
    replace(program, site.attention, new)
    with program.graph.inserting_before(site.output):
        writer.output_bias(latent.output_bias)
    return writer.names


@dataclass
class _Writer:
    program: Program
    site: Site
    names: list[str] = field(default_factory=list)

    def inputs(self, latent: Latent, frequency: Tensor) -> Iterator[fx.Node]:
        q, k, v = (str(p.args[1].target) for p in self.site.projections)
        heads, width = self.site.heads, self.site.width
        rotary = len(latent.rotary)
        count = token_count(self.program)
        query = self._linear(f"{q}.latent", latent.query.flatten(0, 1), latent.query_bias.flatten())
        query = self._call(aten.reshape.default, query, [1, count, heads, width + rotary])
        yield self._turn(query, frequency, width)
        key = self._linear(f"{k}.rotary", latent.rotary, latent.rotary_bias)
        key = self._call(aten.reshape.default, key, [1, count, 1, rotary])
        key = self._turn(key, frequency, 0)
        yield self._call(aten.reshape.default, key, [1, count, rotary])
        yield self._linear(f"{k}.latent", latent.down)
        yield self._weight(f"{k}.w_uk", latent.w_uk)
        yield self._weight(f"{v}.w_uv", latent.w_uv)

    def output_bias(self, bias: Tensor) -> None:
        """What latents leave out of every value, after the output projection."""
        output = self.site.output
        weight = str(output.args[1].target)
        self.names.append(weight)
        if not bias.is_meta:
            bias = bias + _bias(self.program, output)
        output.args = (*output.args[:2], self._weight(f"{weight}.bias", bias))

    def _turn(self, node: fx.Node, frequency: Tensor, offset: int) -> fx.Node:
        assert self.site.rope is not None
        cos, sin = (self._columns(table, frequency) for table in self.site.rope.args[1:3])
        return self._call(mill.rope.default, node, cos, sin, offset, False)

    def _columns(self, looked_up: fx.Node, frequency: Tensor) -> fx.Node:
        """Columns of the table that ``looked_up`` reads, looked up at the step's positions."""
        (table,) = behind_reshapes(looked_up).args[0]
        label = "_".join(map(str, frequency.tolist()))
        name = f"{table.target}.{label}"
        if name not in self.program.weights:
            self.program.weights.derive(name, lambda t: t[:, frequency].contiguous(), table.target)
        args = ([self.program.weight(name)], self.program.input("positions"), "fp32")
        return self._call(mill.embed.default, *args)

    def _linear(self, name: str, weight: Tensor, bias: Tensor | None = None) -> fx.Node:
        args = [self.site.x, self._weight(name, weight)]
        if bias is not None and not bias.is_meta and bool(bias.any()):
            args.append(self._weight(f"{name}.bias", bias))
        return self._call(aten.linear.default, *args)

    def _weight(self, name: str, value: Tensor) -> fx.Node:
        fresh = self.program.weights.fresh(name)
        value = value.float().contiguous()
        self.program.weights.read(fresh, value.to("meta"), lambda: value)
        self.names.append(fresh)
        return self.program.weight(fresh)

    def _call(self, target: object, *args: object) -> fx.Node:
        return self.program.call(target, *args, like=self.site.attention)
