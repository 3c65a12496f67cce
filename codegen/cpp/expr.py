"""Scalar expressions (ir/expr.py) as C++ over vectors; simd.h defines every function of the table.

>>> print(vector_code("silu(acc0) * acc1 + 1.0"))
silu(acc0) * acc1 + splat(1.0f)
"""

from __future__ import annotations

import math

from ...ir.expr import Call, Const, Expr, Ref, parse

_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}


def literal(value: float) -> str:
    """A C++ float literal of the nearest fp32 number."""
    if math.isnan(value):
        return '__builtin_nanf("")'
    if math.isinf(value):
        return "__builtin_inff()" if value > 0 else "-__builtin_inff()"
    return f"{value!r}f"


def vector_code(source: str) -> str:
    """The expression, each operand being a ``vf`` variable of its name."""
    return _print(parse(source), 0)


def _print(expr: Expr, parent: int) -> str:
    """``parent`` is the precedence around: a weaker operator gets parentheses."""
    match expr:
        case Ref(name):
            return name
        case Const(value):
            return f"splat({literal(value)})"
        case Call(fn, (left, right)) if fn in _INFIX:
            symbol, level = _INFIX[fn]
            body = f"{_print(left, level)} {symbol} {_print(right, level + 1)}"
            return f"({body})" if level < parent else body
        case Call(fn, args):
            return f"{fn}({', '.join(_print(a, 0) for a in args)})"
