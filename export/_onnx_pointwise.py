"""Scalar expressions (ir.expr) as ONNX nodes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..ir import expr
from ._onnx_graph import Graph

_NAMED = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "neg": "Neg", "abs": "Abs", "min": "Min",
    "max": "Max", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "tanh": "Tanh", "sigmoid": "Sigmoid",
    "relu": "Relu", "softplus": "Softplus",
}  # fmt: skip


def function(g: Graph, name: str, *args: ir.Value) -> ir.Value:
    """One function of the table ``expr.FUNCTIONS``."""
    match name:
        case "rsqrt":
            return g.op("Reciprocal", g.op("Sqrt", *args))
        case "square":
            return g.op("Mul", *args, *args)
        case "silu":
            return g.op("Mul", *args, g.op("Sigmoid", *args))
        case "gelu":
            return g.op("Gelu", *args)
        case "gelu_tanh":
            return g.op("Gelu", *args, approximate="tanh")
    return g.op(_NAMED[name], *args)


def evaluate(g: Graph, source: str, operands: Mapping[str, ir.Value]) -> ir.Value:
    """An expression of fp32 operands, which broadcast as usual."""
    return _evaluate(g, expr.parse(source), operands)


def _evaluate(g: Graph, tree: expr.Expr, operands: Mapping[str, ir.Value]) -> ir.Value:
    match tree:
        case expr.Ref(name):
            return operands[name]
        case expr.Const(value):
            return g.scalar(value)
        case expr.Call(fn, args):
            return function(g, fn, *(_evaluate(g, a, operands) for a in args))
