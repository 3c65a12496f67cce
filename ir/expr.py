"""Scalar expressions: the pointwise part of a kernel, shared by every code generator.

An expression is kept as text in Python syntax, so that it can live in a graph node, a JSON plan and a
golden file, and is parsed where it is needed.  The reference evaluates it with torch; the emitters
print it.

>>> parse("silu(acc0) * acc1")
Call(fn='mul', args=(Call(fn='silu', args=(Ref(name='acc0'),)), Ref(name='acc1')))
>>> text(parse("x0 + x1 * 2.0"))
'x0 + x1 * 2.0'
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ref:
    """An operand, by name."""

    name: str


@dataclass(frozen=True)
class Const:
    value: float


@dataclass(frozen=True)
class Call:
    fn: str
    args: tuple[Expr, ...]


Expr: TypeAlias = Ref | Const | Call

# Meaning of every function an expression may use.  Emitters must cover exactly this table.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": torch.abs,
    "min": torch.minimum,
    "max": torch.maximum,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "softplus": F.softplus,
}
_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
}
_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}


def _build(node: ast.expr) -> Expr:
    match node:
        case ast.Name(id=name):
            return Ref(name)
        case ast.Constant(value=int() | float() as value):
            return Const(float(value))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return Const(-float(value))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return Call("neg", (_build(inner),))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return Call(_BINARY[type(op)], (_build(left), _build(right)))
        case ast.Call(func=ast.Name(id=fn), args=args) if fn in FUNCTIONS:
            return Call(fn, tuple(_build(a) for a in args))
    raise ValueError(f"not a scalar expression: {ast.unparse(node)}")


@lru_cache(maxsize=4096)
def parse(source: str) -> Expr:
    """Read an expression; raises ValueError on anything but operands, numbers and FUNCTIONS."""
    return _build(ast.parse(source, mode="eval").body)


def text(expr: Expr, parent: int = 0) -> str:
    """The inverse of :func:`parse`, with as few parentheses as precedence allows."""
    match expr:
        case Ref(name):
            return name
        case Const(value):
            return repr(value) if value >= 0 else f"({value!r})"
        case Call(fn, (left, right)) if fn in _INFIX:
            symbol, level = _INFIX[fn]
            body = f"{text(left, level)} {symbol} {text(right, level + 1)}"
            return f"({body})" if level < parent else body
        case Call(fn, args):
            return f"{fn}({', '.join(text(a) for a in args)})"


def evaluate(expr: Expr, operands: Mapping[str, Tensor]) -> Tensor:
    """Run an expression with torch; operands broadcast as usual."""
    match expr:
        case Ref(name):
            return operands[name]
        case Const(value):
            return torch.tensor(value, dtype=next(iter(operands.values())).dtype)
        case Call(fn, args):
            return FUNCTIONS[fn](*(evaluate(a, operands) for a in args))


def names(expr: Expr) -> list[str]:
    """Operands in order of first use."""
    match expr:
        case Ref(name):
            return [name]
        case Const():
            return []
        case Call(_, args):
            return list(dict.fromkeys(n for a in args for n in names(a)))


def substitute(expr: Expr, by: Mapping[str, Expr]) -> Expr:
    """Replace operands by expressions: how one pointwise op is fused into another."""
    match expr:
        case Ref(name):
            return by.get(name, expr)
        case Const():
            return expr
        case Call(fn, args):
            return Call(fn, tuple(substitute(a, by) for a in args))
