"""Prove that tokens meet in attention and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import TokenMixing
from ..ir.ops import custom_op
from ..ir.program import Program, Stage, is_weight, where
from .base import Pass, aten, is_call, mill
from .region import dependents, is_token_count


@dataclass
class ProveTokens(Pass):
    """f(x)[t] depends on x[t] alone, for every op but attention

    The token dim is tracked through the graph by its symbolic size.  Each op must keep it apart: pointwise
    ops line it up, reductions leave it out, reshapes keep it outermost.  What cannot be shown is refused.
    The number of matches is the number of ops proven.
    """

    name = "prove_tokens"
    produces = Stage.DIALECT

    def run(self, program: Program) -> int:
        data = dependents(program, lambda n: n.op == "placeholder")
        proven = 0
        for node in program.graph.nodes:
            if node.op != "call_function" or node not in data or is_token_count(node):
                continue
            if not _Proof(program, data, node).holds():
                raise TokenMixing(op=_name(node), where=where(node))
            proven += 1
        return proven


# Ops that see tokens one by one whatever their arguments, and the two that may mix them.
_SAFE = (
    mill.embed, mill.rms_norm, mill.layer_norm, mill.linear, mill.pointwise, mill.rope, mill.route,
    mill.experts, mill.add_rms_norm, mill.attention, mill.latent_attention,
)  # fmt: skip
_REDUCTIONS = (
    aten.sum, aten.mean, aten.amax, aten.amin, aten.softmax, aten._softmax, aten.log_softmax, aten.topk,
    aten.sort, aten.cumsum, aten.argmax, aten.argmin, aten.max, aten.min, aten.prod, aten.logsumexp,
    aten.var, aten.std, aten.gather, aten.scatter, aten.scatter_add, aten.cat, aten.split,
    aten.split_with_sizes, aten.chunk, aten.slice, aten.select, aten.unbind, aten.any, aten.all,
    aten.flip, aten.roll, aten.index_select,
)  # fmt: skip
_LAYOUT = (
    aten.transpose, aten.permute, aten.expand, aten.unsqueeze, aten.squeeze, aten.stack, aten.zeros_like,
    aten.ones_like, aten.full_like, aten.empty_like, aten.new_empty, aten.new_zeros, aten.one_hot,
    aten.view_as_real, aten.view_as_complex, aten.clone, aten._to_copy, aten.copy,
)  # fmt: skip


class _Proof:
    """The proof for one node; each ``_case`` answers for a kind of op."""

    def __init__(self, program: Program, data: set[fx.Node], node: fx.Node) -> None:
        self.node = node
        self.symbol = str(program.input("ids").meta["val"].shape[1])
        self.inputs = [n for n in node.all_input_nodes if n in data and self.dims(n)]

    def holds(self) -> bool:
        if not self.inputs or is_call(self.node, *_SAFE) or _is_getitem(self.node):
            return True
        if custom_op(self.node.target):  # lowering runs it on rows alone
            return True
        cases: tuple[tuple[bool, Callable[[], bool]], ...] = (
            (is_call(self.node, aten.reshape, aten.view), self.keeps_outermost),
            (is_call(self.node, *_REDUCTIONS), self.leaves_out),
            (is_call(self.node, *_LAYOUT), lambda: True),
            (
                is_call(self.node, aten.linear, aten.matmul, aten.mm, aten.bmm),
                self.contracts_features,
            ),
            (is_call(self.node, aten.embedding), lambda: is_weight(self.node.args[0])),
            (_is_pointwise(self.node), self.lines_up),
        )
        return next((proof() for applies, proof in cases if applies), False)

    def dims(self, node: fx.Node) -> list[int]:
        """Dims, from the end, whose size involves the token count."""
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else ()
        found = [i - len(sizes) for i, s in enumerate(sizes) if _involves(s, self.symbol)]
        return found

    def keeps_outermost(self) -> bool:
        return self.outermost(self.inputs[0]) and self.outermost(self.node)

    def outermost(self, node: fx.Node) -> bool:
        dims, sizes = self.dims(node), node.meta["val"].shape
        if len(dims) != 1 or str(sizes[dims[0]]) != self.symbol:
            return False
        return all(isinstance(s, int) and s == 1 for s in sizes[: dims[0]])

    def leaves_out(self) -> bool:
        reduced = _dims_argument(self.node)
        if reduced is None:
            return False
        for node in self.inputs:
            rank = node.meta["val"].dim()
            if any((d if d < 0 else d - rank) in self.dims(node) for d in reduced):
                return False
        return True

    def contracts_features(self) -> bool:
        left, right = self.node.args[:2]
        return right not in self.inputs and -1 not in self.dims(left)

    def lines_up(self) -> bool:
        dims = {tuple(self.dims(n)) for n in self.inputs}
        return (
            len(dims) == 1 and dims == {tuple(self.dims(self.node))} and len(next(iter(dims))) == 1
        )


def _involves(size: Any, symbol: str) -> bool:
    return isinstance(size, torch.SymInt) and symbol in {
        str(s) for s in size.node.expr.free_symbols
    }


def _dims_argument(node: fx.Node) -> list[int] | None:
    """The dims that the op works along; None: all of them."""
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name not in ("dim", "dims"):
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(
            argument.name, argument.default_value
        )  # fmt: skip
        if value is None or value == []:
            return None
        return [value] if isinstance(value, int) else list(value)
    return None


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")
