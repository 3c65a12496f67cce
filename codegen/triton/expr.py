"""Scalar expressions (ir/expr.py) as Triton code; support.py has what triton.language lacks.

>>> triton_code("silu(acc0) * acc1 + 1.0")
'silu(acc0) * acc1 + 1.0'
>>> triton_code("max(x0, sqrt(x1))")
'tl.maximum(x0, tl.sqrt(x1))'
"""

from __future__ import annotations

import math

from ...ir.expr import Call, Const, Expr, Ref, parse

_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}
_LANGUAGE = {
    "abs": "tl.abs",
    "min": "tl.minimum",
    "max": "tl.maximum",
    "exp": "tl.exp",
    "log": "tl.log",
    "sqrt": "tl.sqrt",
    "rsqrt": "tl.rsqrt",
    "sigmoid": "tl.sigmoid",
}


def triton_code(source: str) -> str:
    """The expression, each operand being an fp32 tensor of its name."""
    return _print(parse(source), 0)


def _print(expr: Expr, parent: int) -> str:
    """``parent`` is the precedence around: a weaker operator gets parentheses."""
    match expr:
        case Ref(name):
            return name
        case Const(value):
            return _literal(value)
        case Call("neg", (arg,)):
            return f"(-{_print(arg, 3)})"
        case Call(fn, (left, right)) if fn in _INFIX:
            symbol, level = _INFIX[fn]
            body = f"{_print(left, level)} {symbol} {_print(right, level + 1)}"
            return f"({body})" if level < parent else body
        case Call(fn, args):
            return f"{_LANGUAGE.get(fn, fn)}({', '.join(_print(a, 0) for a in args)})"


def _literal(value: float) -> str:
    if math.isfinite(value):
        return repr(value) if value >= 0 else f"({value!r})"
    return "float('nan')" if math.isnan(value) else f"float('{'-' if value < 0 else ''}inf')"
