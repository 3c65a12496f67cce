"""Recognise experts that are spelled out as a loop over modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..ir import expr
from ..ir.ops import experts as experts_reference
from ..ir.program import Program, is_weight, shape
from .base import Pass, ancestors, aten, behind_reshapes, calls, is_call, mill, replace, sweep
from .region import Region

_ACTIVATIONS = (
    *(
        f"{fn}(acc{a}){rest}"
        for fn in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh")
        for a, rest in ((0, " * acc1"), (1, " * acc0"), (0, ""))
    ),
    "square(relu(acc0))",
    "square(relu(acc0)) * acc1",
    "square(relu(acc1)) * acc0",
)


@dataclass
class FuseExperts(Pass):
    """for e: out[t_e] += w[t_e, j_e] f_e(x[t_e]) = experts(x, ids, w, stacked weights)

    Export unrolls the loop into a chain of index_add, one link per expert.  The roles of the link's tensors
    are read off its shape; what they compute together is then checked against the op on random tokens.
    """

    name = "fuse_experts"

    def run(self, program: Program) -> int:
        matches = 0
        for last in calls(program, aten.index_add):
            if any(is_call(u, aten.index_add) and u.args[0] is last for u in last.users):
                continue
            links = _chain(last)
            if links is None or (block := _Block.read(program, links)) is None:
                continue
            if not block.verified(program, last):
                continue
            with program.graph.inserting_before(last):
                replace(program, last, block.build(program, last))
            matches += 1
        sweep(program)
        return matches


@dataclass
class _Link:
    """One expert's contribution."""

    expert: int
    x: fx.Node
    ids: fx.Node
    shares: fx.Node
    up: list[fx.Node]  # one or two linears of x[t], in graph order
    down: fx.Node


def _chain(last: fx.Node) -> list[_Link] | None:
    """The links from the first expert to ``last``; None if anything is out of the ordinary."""
    links, at = list[_Link](), last
    while is_call(at, aten.index_add):
        link = _read(at)
        if link is None:
            return None
        links.append(link)
        at = at.args[0]
    links.sort(key=lambda link: link.expert)
    whole = [link.expert for link in links] == list(range(len(links)))
    return links if whole and is_call(at, aten.zeros_like, aten.zeros, aten.new_zeros) else None


def _read(add: fx.Node) -> _Link | None:
    _, dim, token, value = add.args[:4]
    if dim != 0 or add.kwargs:
        return None
    chosen = [n for n in ancestors(token, lambda n: is_call(n, aten.eq)) if is_call(n, aten.eq)]
    gathers = [
        n for n in ancestors(value, lambda n: is_call(n, aten.index)) if is_call(n, aten.index)
    ]
    rows = [g for g in gathers if g.args[1] == [token]]
    shares = [g for g in gathers if len(g.args[1]) == 2 and g.args[1][0] is token]
    if (
        len(chosen) != 1
        or not isinstance(chosen[0].args[1], int)
        or len(rows) != 1
        or len(shares) != 1
    ):
        return None
    linears = [
        n for n in reversed(ancestors(value, lambda n: is_call(n, aten.index)))
        if is_call(n, aten.linear) and is_weight(n.args[1]) and len(n.args) == 2
    ]  # fmt: skip
    up = [n for n in linears if n.args[0] is rows[0]]
    down = [n for n in linears if n not in up]
    if len(up) not in (1, 2) or len(down) != 1:
        return None
    return _Link(
        chosen[0].args[1], rows[0].args[0], chosen[0].args[0], shares[0].args[0], up, down[0]
    )


@dataclass
class _Block:
    """All links together, as operands of the experts op."""

    x: fx.Node
    ids: fx.Node
    shares: fx.Node
    links: list[_Link]
    activation: str

    @classmethod
    def read(cls, program: Program, links: list[_Link]) -> _Block | None:
        first = links[0]
        x, ids, shares = first.x, first.ids, behind_reshapes(first.shares)
        same = all(
            link.x is x and link.ids is ids and behind_reshapes(link.shares) is shares
            and len(link.up) == len(first.up)
            for link in links
        )  # fmt: skip
        activation = _activation(first) if same else None
        return cls(x, ids, shares, links, activation) if activation else None

    @property
    def gated(self) -> bool:
        return len(self.links[0].up) == 2

    def stacked(self, program: Program) -> tuple[str, str]:
        """Derive ``[E, 2I, H]`` and ``[E, H, I]`` from the experts' own weights."""
        ups = [[linear.args[1].target for linear in link.up] for link in self.links]
        downs = [link.down.args[1].target for link in self.links]
        width, count = len(ups[0]), len(ups)
        gate_up = program.weights.fresh(_common(ups[0][0], ups[-1][0]) + ".gate_up")
        down = program.weights.fresh(_common(downs[0], downs[-1]) + ".down")

        def pairs(*weights: Tensor) -> Tensor:
            joined = [torch.cat(weights[width * e : width * (e + 1)]) for e in range(count)]
            return torch.stack(joined)

        program.weights.derive(gate_up, pairs, *(name for up in ups for name in up))
        program.weights.derive(down, lambda *w: torch.stack(w), *downs)
        return gate_up, down

    def verified(self, program: Program, last: fx.Node) -> bool:
        """Whether the loop and the op agree on random tokens."""
        rng, tokens, experts = torch.Generator().manual_seed(0), 33, len(self.links)
        hidden, top_k = int(shape(self.x)[-1]), int(shape(self.ids)[-1])
        x = torch.randn(tokens, hidden, generator=rng)
        ids = torch.rand(tokens, experts, generator=rng).argsort(-1)[:, :top_k]
        share = torch.rand(tokens, top_k, generator=rng)
        actual = Region([last], [self.x, self.ids, self.shares])(
            [x, ids, share], tokens, program.weights
        )
        trial = program.copy()
        gate_up, down = (trial.weights[n] for n in _Block.stacked(self, trial))
        wanted = experts_reference(
            x, ids, share, [gate_up], [down], None, "fp32", "fp32", self.activation, self.gated
        )
        return torch.allclose(actual[0].reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)

    def build(self, program: Program, last: fx.Node) -> fx.Node:
        gate_up, down = (program.weight(n) for n in self.stacked(program))
        return program.call(
            mill.experts.default, self.x, self.ids, self.shares, [gate_up], [down], None,
            "fp32", "fp32", self.activation, self.gated, like=last,
        )  # fmt: skip


def _activation(link: _Link) -> str | None:
    """The expression between the up projections and the down projection."""
    rng = torch.Generator().manual_seed(0)
    values = [torch.randn(64, int(shape(n)[-1]), generator=rng) for n in link.up]
    inner = link.down.args[0]
    actual = Region([inner], link.up)(values, 64, {})[0]
    operands = {f"acc{i}": v for i, v in enumerate(values)}
    for candidate in _ACTIVATIONS:
        parsed = expr.parse(candidate)
        if len(expr.names(parsed)) != len(values):
            continue
        if torch.allclose(expr.evaluate(parsed, operands), actual, atol=1e-5):
            return candidate
    return None


def _common(first: str, last: str) -> str:
    """``layers.0.moe.experts`` of ``layers.0.moe.experts.0.w1.weight`` and ``...experts.7.w1.weight``."""
    pairs = zip(first.split("."), last.split("."), strict=False)
    kept: list[str] = []
    for a, b in pairs:
        if a != b:
            break
        kept.append(a)
    return ".".join(kept) or "experts"
