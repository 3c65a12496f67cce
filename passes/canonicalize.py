"""Bring a traced graph to one spelling, and fold what depends on weights alone."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..ir.program import Program, Stage, is_weight, shape
from .base import (
    Pass,
    aten,
    calls,
    is_call,
    mill,
    replace,
    same_shape,
    same_size,
    sweep,
    token_count,
)
from .contractions import Contraction
from .region import dependents, fold, is_token_count


@dataclass
class Canonicalize(Pass):
    """x.to(same) = x, dropout(x) = x, view(view(x)) = reshape(x), arange(T) = positions"""

    name = "canonicalize"

    def run(self, program: Program) -> int:
        matches = _one_token_count(program)
        for node in list(program.graph.nodes):
            for rule in _RULES:
                if rule(program, node):
                    matches += 1
                    break
        matches += _linears(program) + _constants(program)
        sweep(program)
        return matches


def _one_token_count(program: Program) -> int:
    """All spellings of the token count become ``sym_size(ids, 1)``."""
    ids = program.input("ids")
    symbol = ids.meta["val"].shape[1]
    first = next(n for n in program.graph.nodes if n.op == "call_function")
    with program.graph.inserting_before(first):
        count = program.graph.call_function(aten.sym_size.int, (ids, 1))
    count.meta["val"] = symbol
    found = 0
    for node in calls(program, aten.sym_size):
        if node is not count and same_size(node.meta["val"], symbol):
            replace(program, node, count)
            found += 1
    return found


def _drop_identity(program: Program, node: fx.Node) -> bool:
    """An op that yields its first input unchanged."""
    if not is_call(
        node, aten._to_copy, aten.to, aten.type_as, aten.clone, aten.alias, aten.detach,
        aten.dropout, aten.contiguous, aten.expand, aten.lift_fresh_copy,
    ):  # fmt: skip
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.meta["val"].dtype != node.meta["val"].dtype or not same_shape(source, node):
        return False
    node.replace_all_uses_with(source)
    return True


def _unit_factor(program: Program, node: fx.Node) -> bool:
    """x * 1 = x, x + 0 = x"""
    unit = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
    if node.op != "call_function" or node.target not in unit or node.kwargs:
        return False
    source, other = node.args[:2]
    if isinstance(other, fx.Node) or other != unit[node.target] or not isinstance(source, fx.Node):
        return False
    if source.meta["val"].dtype != node.meta["val"].dtype:
        return False
    node.replace_all_uses_with(source)
    return True


def _reshape(program: Program, node: fx.Node) -> bool:
    """Every pure change of shape is one reshape of its oldest source."""
    if not is_call(
        node, aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten,
        aten.reshape,
    ):  # fmt: skip
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if is_call(source, aten.reshape):
        source = source.args[0]
    if same_shape(source, node):
        node.replace_all_uses_with(source)
        return True
    sizes = _sizes(program, node)
    if sizes is None or (is_call(node, aten.reshape) and source is node.args[0]):
        if is_call(node, aten.view, aten._unsafe_view):
            node.target = aten.reshape.default
        return False
    with program.graph.inserting_before(node):
        replace(program, node, program.call(aten.reshape.default, source, sizes, like=node))
    return True


def _sizes(program: Program, node: fx.Node) -> list[int | fx.Node] | None:
    """The node's shape as arguments of a reshape; None if a size is neither a number nor T."""
    count = token_count(program)
    sizes: list[int | fx.Node] = []
    for size in shape(node):
        if isinstance(size, int):
            sizes.append(size)
        elif same_size(size, count.meta["val"]):
            sizes.append(count)
        else:
            return None
    return sizes


def _positions(program: Program, node: fx.Node) -> bool:
    """arange(T) counts positions: a batch of many sequences brings its own."""
    if not is_call(node, aten.arange):
        return False
    bounds = [a for a in node.args if a is not None]
    start, end = (0, bounds[0]) if len(bounds) == 1 else bounds[:2]
    step = bounds[2] if len(bounds) > 2 else 1
    if not isinstance(end, fx.Node) or not is_token_count(end) or start != 0 or step != 1:
        return False
    dtype = node.meta["val"].dtype
    with program.graph.inserting_before(node):
        new = program.call(aten.reshape.default, program.input("positions"), [end], like=node)
        if dtype != torch.int64:
            new = program.call(aten._to_copy.default, new, dtype=dtype)
    replace(program, node, new)
    return True


def _leading_rows(program: Program, node: fx.Node) -> bool:
    """table[:T] reads row p at position p."""
    if not is_call(node, aten.slice) or not is_weight(node.args[0]) or len(node.args) < 4:
        return False
    table, dim, start, end = node.args[:4]
    step = node.args[4] if len(node.args) > 4 else 1
    if dim != 0 or start not in (0, None) or step != 1:
        return False
    if not (isinstance(end, fx.Node) and is_token_count(end)):
        return False
    with program.graph.inserting_before(node):
        flat = program.call(aten.reshape.default, program.input("positions"), [end], like=node)
        replace(program, node, program.call(aten.index_select.default, table, 0, flat, like=node))
    return True


def _embedding(program: Program, node: fx.Node) -> bool:
    """embedding(W, ids) = embed([W], ids)"""
    if not is_call(node, aten.embedding) or not is_weight(node.args[0]):
        return False
    table, index = node.args[:2]
    with program.graph.inserting_before(node):
        replace(program, node, program.call(mill.embed.default, [table], index, "fp32", like=node))
    return True


def double_transpose(program: Program, node: fx.Node) -> bool:
    """(x^T)^T = x"""
    if not is_call(node, aten.transpose) or not is_call(inner := node.args[0], aten.transpose):
        return False
    if not same_shape(inner.args[0], node) or set(inner.args[1:]) != set(node.args[1:]):
        return False
    node.replace_all_uses_with(inner.args[0])
    return True


_SYNONYMS = {
    aten.concat.default: aten.cat.default,
    aten.min.other: aten.minimum.default,
    aten.max.other: aten.maximum.default,
}


def _respell(program: Program, node: fx.Node) -> bool:
    """Ops that are sums of others: addmm(b, x, W) = b + x W, and baddbmm likewise."""
    if node.target in _SYNONYMS:
        node.target = _SYNONYMS[node.target]
        return False
    if not is_call(node, aten.addmm, aten.baddbmm):
        return False
    product = aten.mm.default if is_call(node, aten.addmm) else aten.bmm.default
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    with program.graph.inserting_before(node):
        total = program.call(product, *node.args[1:3], like=node)
        if alpha != 1:
            total = program.call(aten.mul.Tensor, total, alpha, like=node)
        base = node.args[0]
        if beta not in (0, 1):
            base = program.call(aten.mul.Tensor, base, beta, like=node)
        if beta != 0:
            total = program.call(aten.add.Tensor, total, base, like=node)
    replace(program, node, total)
    return True


_LIKE = {aten.zeros_like: 0, aten.new_zeros: 0, aten.ones_like: 1, aten.new_ones: 1}


def _constants(program: Program) -> int:
    """zeros_like(x) = full(sizes of x, 0): it says nothing about x but its shape."""
    ids = program.input("ids")
    return sum(_constant(program, n) for n in sorted(dependents(program, lambda n: n is ids)))


def _constant(program: Program, node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _LIKE:
        value = _LIKE[packet]
    elif is_call(node, aten.full_like, aten.new_full) and not isinstance(node.args[-1], fx.Node):
        value = node.args[-1]
    else:
        return False
    sizes = _sizes(program, node)
    if sizes is None:
        return False
    with program.graph.inserting_before(node):
        dtype = node.meta["val"].dtype
        new = program.call(aten.full.default, sizes, value, dtype=dtype, like=node)
    replace(program, node, new)
    return True


def _linears(program: Program) -> int:
    """x @ W = linear(x, W^T), linear(x, W) + b = linear(x, W, b), for what depends on weights alone."""
    moving = dependents(program, lambda n: n.op == "placeholder") | _sized(program)
    found = 0
    for node in list(program.graph.nodes):
        if node in moving:
            found += _product(program, node, moving) or _bias(program, node, moving)
    return found


def _product(program: Program, node: fx.Node, moving: set[fx.Node]) -> bool:
    read = Contraction.read(node)
    if read is None or read.right in moving or len(read.right_dims) != 2:
        return False
    rows, inner = read.left_dims[:-1], read.left_dims[-1]
    if inner not in read.right_dims or read.out_dims[:-1] != rows:
        return False
    weight = read.right
    with program.graph.inserting_before(node):
        if read.right_dims[0] == inner:  # [K, N]
            stored = is_call(weight, aten.t) or (
                is_call(weight, aten.transpose) and len(shape(weight)) == 2
            )
            weight = (
                weight.args[0]
                if stored
                else program.call(aten.transpose.int, weight, 0, 1, like=node)
            )
        new = program.call(aten.linear.default, read.left, weight, like=node)
    replace(program, node, new)
    moving.add(new)
    return True


def _bias(program: Program, node: fx.Node, moving: set[fx.Node]) -> bool:
    if not is_call(node, aten.add) or len(node.args) != 2 or node.kwargs:
        return False
    for product, bias in (node.args, reversed(node.args)):
        if (
            is_call(product, aten.linear)
            and (len(product.args) == 2 or product.args[2] is None)
            and len(product.users) == 1
            and isinstance(bias, fx.Node)
            and bias not in moving
            and shape(bias) == shape(product)[-1:]
        ):
            with program.graph.inserting_before(node):
                new = program.call(aten.linear.default, *product.args[:2], bias, like=product)
            replace(program, node, new)
            moving.add(new)
            return True
    return False


def _size_arithmetic(program: Program, node: fx.Node) -> bool:
    """Integer arithmetic that comes out as T, or as a plain number."""
    if not is_call(node, operator.mul, operator.add, operator.sub, operator.floordiv):
        return False
    count = token_count(program)
    if same_size(node.meta["val"], count.meta["val"]):
        node.replace_all_uses_with(count)
        return True
    return False


_RULES: tuple[Callable[[Program, fx.Node], bool], ...] = (
    _respell,
    _size_arithmetic,
    _drop_identity,
    _unit_factor,
    _positions,
    _leading_rows,
    _embedding,
    double_transpose,
    _reshape,
)


@dataclass
class FoldWeights(Pass):
    """f(W) = W': what depends on weights alone is computed once, at build time"""

    name = "fold_weights"
    produces = Stage.CANONICAL

    def run(self, program: Program) -> int:
        moving = dependents(program, lambda n: n.op == "placeholder") | _sized(program)
        matches = 0
        for node in list(program.graph.nodes):
            if (
                node.op != "call_function"
                or node in moving
                or not isinstance(node.meta.get("val"), Tensor)
            ):
                continue
            if not any(u in moving or u.op == "output" for u in node.users):
                continue
            name = fold(program, node, _name(node))
            with program.graph.inserting_before(node):
                replace(program, node, program.weight(name))
            matches += 1
        sweep(program)
        return matches


def _sized(program: Program) -> set[fx.Node]:
    """Nodes that depend on the token count (masks, say): constants only per length."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if is_token_count(node) or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _name(node: fx.Node) -> str:
    """Named after the first weight it comes from."""
    at = node
    while not is_weight(at):
        inputs = at.all_input_nodes
        if not inputs:
            return f"constant.{node.name}"
        at = inputs[0]
    return f"{at.target}.{node.name}"


@dataclass
class SplitLinears(Pass):
    """(x W^T)[:, a:b] = x W[a:b]^T: what is used apart is computed apart, until linears are merged again"""

    name = "split_linears"

    def run(self, program: Program) -> int:
        matches = 0
        for linear in calls(program, aten.linear):
            parts = _column_ranges(linear)
            if parts is None:
                continue
            for node, begin, end in parts:
                with program.graph.inserting_before(node):
                    replace(program, node, rows_of(program, linear, torch.arange(begin, end)))
            matches += 1
        sweep(program)
        return matches


def _column_ranges(linear: fx.Node) -> list[tuple[fx.Node, int, int]] | None:
    """(user, begin, end) if every user takes a column range."""
    found: list[tuple[fx.Node, int, int]] = []
    last, width = len(shape(linear)) - 1, shape(linear)[-1]
    for user in linear.users:
        if (
            is_call(user, aten.split_with_sizes)
            and len(user.args) > 2
            and user.args[2] in (-1, last)
        ):
            bounds = [0]
            for size in user.args[1]:
                bounds.append(bounds[-1] + size)
            found += [(g, bounds[g.args[1]], bounds[g.args[1] + 1]) for g in user.users]
        elif is_call(user, aten.slice) and user.args[1] in (-1, last) and len(user.args) == 4:
            begin, end = (int(a) for a in user.args[2:4])
            found.append(
                (user, begin % width if begin else 0, min(end, width) if end >= 0 else end + width)
            )
        else:
            return None
    return found or None


def rows_of(program: Program, linear: fx.Node, rows: Tensor) -> fx.Node:
    """The linear that yields columns ``rows`` of ``linear``, with its rows of the weight and the bias."""
    x, weight, *bias = linear.args
    tag = _range_tag(rows)
    parts = [_take(program, w, rows, tag) for w in (weight, *bias) if w is not None]
    return program.call(aten.linear.default, x, *parts, like=linear)


def _take(program: Program, weight: fx.Node, rows: Tensor, tag: str) -> fx.Node:
    name = f"{weight.target}[{tag}]"
    if name not in program.weights:
        program.weights.derive(name, lambda w: w[rows.to(w.device)], weight.target)
    return program.weight(name)


def _range_tag(rows: Tensor) -> str:
    first, last = int(rows[0]), int(rows[-1])
    if torch.equal(rows, torch.arange(first, last + 1)):
        return f"{first}:{last + 1}"
    return f"{len(rows)} rows #{zlib.crc32(rows.numpy().tobytes()):08x}"
