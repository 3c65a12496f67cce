"""Multi-head latent attention: cache the latents that keys and values are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from ..ir.program import Program, shape
from . import views
from .base import (
    Pass,
    aten,
    behind_reshapes,
    calls,
    is_call,
    mill,
    replace,
    sweep,
    token_count,
)


@dataclass
class CompressKV(Pass):
    """q [c W_UK^T, r]^T = [q_nope W_UK, q_rope] [c, r]^T: keys and values are functions of one latent c

    Where keys are (projection of c, one rotary key for all heads) and values a projection of the same c,
    attention needs c and the rotary key only: latent_attention, absorbed or expanded as it pays.
    Source: DeepSeek-V2, section 2.1.
    """

    name = "compress_kv"

    def run(self, program: Program) -> int:
        matches = 0
        for node in calls(program, mill.attention):
            if (match := _match(node)) is None:
                continue
            q, scale = node.args[0], node.args[4]
            with program.graph.inserting_before(node):
                up = _per_head(program, match.keys, match.heads, "w_uk")
                down = _per_head(program, match.values, match.heads, "w_uv")
                latent = _flat(program, match.keys.args[0])
                new = program.call(
                    mill.latent_attention.default, q, latent, _flat(program, match.rotary), [up],
                    [down], "fp32", scale, like=node,
                )  # fmt: skip
            replace(program, node, new)
            matches += 1
        sweep(program)
        return matches


class _Match(NamedTuple):
    """Linears of one latent that make keys and values, and the rotary key that all heads share."""

    keys: fx.Node
    values: fx.Node
    rotary: fx.Node
    heads: int


def _match(node: fx.Node) -> _Match | None:
    """The parts of an attention over one latent, if caching that is smaller."""
    q, k, v, sinks, _, window, softcap, *slopes = node.args
    if (
        sinks is not None
        or window
        or softcap
        or slopes
        or not is_call(k, aten.cat)
        or len(k.args[0]) != 2
    ):
        return None
    unrotated, expanded = k.args[0]
    keys, values = _projection(unrotated), _projection(v)
    if keys is None or values is None or not is_call(expanded, aten.expand):
        return None
    latent = behind_reshapes(keys.args[0])
    if latent is not behind_reshapes(values.args[0]) or shape(k)[-2] != shape(q)[-2]:
        return None
    heads, width = (int(s) for s in shape(k)[-2:])
    cached = int(shape(latent)[-1]) + int(shape(expanded)[-1])
    if cached >= heads * (width + int(shape(v)[-1])):
        return None
    return _Match(keys, values, expanded.args[0], heads)


def _projection(node: fx.Node) -> fx.Node | None:
    """The bias-free linear behind a reshape into heads."""
    inner = behind_reshapes(node)
    return inner if is_call(inner, aten.linear) and len(inner.args) == 2 else None


def _per_head(program: Program, linear: fx.Node, heads: int, kind: str) -> fx.Node:
    """The projection's weight as ``[heads, width, latent]``."""
    source = linear.args[1].target
    name = f"{source}.{kind}"
    if name not in program.weights:
        program.weights.derive(name, lambda w: w.unflatten(0, (heads, -1)).contiguous(), source)
    return program.weight(name)


def _flat(program: Program, node: fx.Node) -> fx.Node:
    """``[1, T, F]`` of whatever shape the model gave it."""
    inner = behind_reshapes(node)
    if len(shape(inner)) == 3:
        return inner
    sizes = [1, token_count(program), views.width(inner)]
    return program.call(aten.reshape.default, inner, sizes, like=node)
