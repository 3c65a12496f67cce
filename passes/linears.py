"""``mill.linear`` as data, and weights put together row by row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ..ir.program import Program
from .base import is_call, mill


class Linear(NamedTuple):
    """The arguments of a ``mill.linear`` call."""

    x: fx.Node
    weight: list[fx.Node]
    bias: fx.Node | None = None
    extras: Sequence[fx.Node] = ()
    format: str = "fp32"
    parts: int = 1
    epilogue: str = "acc0"

    @property
    def plain(self) -> bool:
        """x W^T + bias in fp32, nothing fused yet."""
        return (self.format, self.parts, self.epilogue) == ("fp32", 1, "acc0")

    def add(self, program: Program, like: fx.Node) -> fx.Node:
        return program.call(mill.linear.default, *self, like=like)


def plain_linear(node: fx.Node) -> Linear | None:
    """The node as a linear map that nothing is fused into yet, or None."""
    if not is_call(node, mill.linear):
        return None
    linear = Linear(*node.args)
    return linear if linear.plain else None


def part(program: Program, linear: Linear, start: int, size: int) -> Linear:
    """The linear map onto ``size`` of the outputs, from ``start`` on."""
    rows = slice(start, start + size)
    if linear.weight[0].meta["val"].shape[0] == size:
        return linear
    weight = _some_rows(program, linear.weight[0], rows)
    bias = linear.bias and _some_rows(program, linear.bias, rows)
    return linear._replace(weight=[weight], bias=bias)


def _some_rows(program: Program, source: fx.Node, rows: slice) -> fx.Node:
    name = f"{source.target}[{rows.start}:{rows.stop}]"
    if name not in program.weights:
        program.weights.derive(name, lambda w: w[rows], source.target)
    return program.weight(name)


def stack(program: Program, maps: Sequence[Linear]) -> tuple[fx.Node, fx.Node | None]:
    """One weight and bias with the rows of all ``maps`` in turn; missing biases are zeros."""
    names = [linear.weight[0].target for linear in maps]
    weight = _concatenation(program, joined(names), names)
    if not any(linear.bias for linear in maps):
        return weight, None
    biases = [_bias_name(program, linear) for linear in maps]
    return weight, _concatenation(program, joined(biases), biases)


def _concatenation(program: Program, name: str, sources: list[str]) -> fx.Node:
    if name not in program.weights:
        program.weights.derive(name, _cat_rows, *sources)
    return program.weight(name)


def _bias_name(program: Program, linear: Linear) -> str:
    if linear.bias is not None:
        return str(linear.bias.target)
    name = f"{linear.weight[0].target}.zero_bias"
    if name not in program.weights:
        program.weights.derive(name, _zero_per_row, linear.weight[0].target)
    return name


def _cat_rows(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _zero_per_row(weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0])


def joined(names: Sequence[str]) -> str:
    """One readable name for several weights.

    >>> joined(["layers.0.gate.weight", "layers.0.up.weight"])
    'layers.0.gate+up.weight'
    """
    parts = [name.split(".") for name in names]
    head = _common(parts)
    tail = min(_common([p[::-1] for p in parts]), *(len(p) - head for p in parts))
    middles = [".".join(p[head : len(p) - tail]) for p in parts]
    return ".".join((*parts[0][:head], "+".join(middles), *parts[0][len(parts[0]) - tail :]))


def _common(parts: list[list[str]]) -> int:
    """How many first components all have in common."""
    return sum(
        1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    )
