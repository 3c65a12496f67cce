"""Recognise attention in modules that spell it out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, fx

from ..errors import Unsupported
from ..ir.program import Program, shape, where
from .base import Pass, aten, calls, mill, replace, sweep
from .canonicalize import double_transpose
from .region import Region, dependents

_SAMPLE = 97  # longer than small windows, so that a windowed mask shows


@dataclass
class LiftAttention(Pass):
    """softmax(scale q k^T + causal mask) v = attention(q, k, v)"""

    name = "lift_attention"

    def run(self, program: Program) -> int:
        matches = 0
        for node in calls(program, aten.scaled_dot_product_attention):
            q, k, v, mask, dropout, causal = (*node.args, *_DEFAULTS[len(node.args) :])[:6]
            window = _window(program, node, mask, causal or node.kwargs.get("is_causal", False))
            scale = node.kwargs.get("scale") or 1.0 / math.sqrt(int(shape(q)[-1]))
            if dropout:
                _refuse(node, "attention with dropout", "call model.eval() first")
            with program.graph.inserting_before(node):
                heads_inner = [
                    program.call(aten.transpose.int, t, 1, 2, like=node) for t in (q, k, v)
                ]
                out = program.call(
                    mill.attention.default, *heads_inner, None, scale, window, 0.0, like=node
                )
                replace(program, node, program.call(aten.transpose.int, out, 1, 2, like=node))
            matches += 1
        for node in calls(program, aten.transpose):
            double_transpose(program, node)
        sweep(program)
        return matches


_DEFAULTS = (None, None, None, None, 0.0, False)


def _window(program: Program, node: fx.Node, mask: object, causal: bool) -> int:
    """0 if the attention is causal over everything, w if over a window; refuses anything else.

    A mask is recognised by its values at one length: it must depend on the length alone.
    """
    if not isinstance(mask, fx.Node):
        if not causal:
            _refuse(node, "attention that sees later tokens", "only decoders can be compiled")
        return 0
    positions = program.input("positions")
    data = dependents(program, lambda n: n.op == "placeholder" and n is not positions)
    if causal or mask in data:
        _refuse(
            node, "an attention mask that depends on the tokens", "pass no mask: batches need none"
        )
    at = torch.arange(_SAMPLE)[None]
    value = Region([mask], [positions])([at], _SAMPLE, program.weights)[0]
    visible = _visible(value.reshape(-1, _SAMPLE, _SAMPLE))
    for window in (0, int(visible[-1].sum())):
        if torch.equal(visible, _causal(window)):
            return window
    _refuse(
        node, "an attention mask that is neither causal nor a sliding window", "report this model"
    )


def _visible(mask: Tensor) -> Tensor:
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    hidden = mask if mask.dtype == torch.bool else mask.masked_fill(~seen, 0.0)
    biased = mask.dtype != torch.bool and bool(hidden.any())
    return torch.zeros(_SAMPLE, _SAMPLE) if biased or len(seen) > 1 else seen[0]


def _causal(window: int) -> Tensor:
    i, j = torch.arange(_SAMPLE)[:, None], torch.arange(_SAMPLE)[None]
    return (j <= i) & (j > i - window) if window else j <= i


def _refuse(node: fx.Node, what: str, advice: str) -> NoReturn:
    raise Unsupported(reason=what, where=where(node), advice=advice)
