"""ATen's pointwise ops as scalar expressions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from ..ir.expr import Call, Const, Expr, Ref
from .base import aten

Rule: TypeAlias = Callable[..., Expr | None]

# Functions that cost more than reading a number from memory; they are never computed twice.
DEAR = frozenset(
    (
        "div",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "tanh",
        "sigmoid",
        "silu",
        "gelu",
        "gelu_tanh",
        "softplus",
    )
)
_SAME_NAME = (
    "mul", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "tanh", "sigmoid", "silu", "relu"
)  # fmt: skip
_ONE, _MINUS_ONE = Const(1.0), Const(-1.0)


def _call(fn: str) -> Rule:
    return lambda *args: Call(fn, args)


def _scaled(fn: str) -> Rule:
    """a (+ or -) alpha b"""

    def rule(a: Expr, b: Expr, alpha: Expr = _ONE) -> Expr:
        return Call(fn, (a, b if alpha == _ONE else Call("mul", (b, alpha))))

    return rule


def _pow(x: Expr, exponent: Expr) -> Expr | None:
    if not isinstance(exponent, Const):
        return None
    square = Call("square", (x,))
    powers = {
        1.0: x,
        2.0: square,
        3.0: Call("mul", (square, x)),
        4.0: Call("square", (square,)),
        0.5: Call("sqrt", (x,)),
        -0.5: Call("rsqrt", (x,)),
        -1.0: Call("div", (Const(1.0), x)),
    }
    return powers.get(exponent.value)


def _clamp(x: Expr, low: Expr | None = None, high: Expr | None = None) -> Expr:
    x = x if low is None else Call("max", (x, low))
    return x if high is None else Call("min", (x, high))


def _gelu(x: Expr, approximate: str = "none") -> Expr:
    return Call("gelu" if approximate == "none" else "gelu_tanh", (x,))


def _softplus(x: Expr, *options: Expr) -> Expr | None:
    usual = (_ONE, Const(20.0))  # beta and threshold
    return Call("softplus", (x,)) if options == usual[: len(options)] else None


def _div(a: Expr, b: Expr, rounding_mode: str | None = None) -> Expr | None:
    return Call("div", (a, b)) if rounding_mode is None else None


def _leaky_relu(x: Expr, slope: Expr | None = None) -> Expr:
    """max(x, 0) + slope min(x, 0)"""
    low = Call("mul", (Call("min", (x, Const(0.0))), slope or Const(0.01)))
    return Call("add", (Call("relu", (x,)), low))


RULES: dict[Any, Rule] = {
    **{getattr(aten, name): _call(name) for name in _SAME_NAME},
    aten.add: _scaled("add"),
    aten.sub: _scaled("sub"),
    aten.rsub: lambda a, b, alpha=_ONE: _scaled("sub")(b, a, alpha),
    aten.div: _div,
    aten.reciprocal: lambda x: Call("div", (Const(1.0), x)),
    aten.pow: _pow,
    aten.maximum: _call("max"),
    aten.minimum: _call("min"),
    aten.clamp: _clamp,
    aten.clamp_min: _clamp,
    aten.clamp_max: lambda x, high: _clamp(x, None, high),
    aten.hardtanh: lambda x, low=_MINUS_ONE, high=_ONE: _clamp(x, low, high),
    aten.gelu: _gelu,
    aten.softplus: _softplus,
    aten.leaky_relu: _leaky_relu,
    aten.mish: lambda x: Call("mul", (x, Call("tanh", (Call("softplus", (x,)),)))),
}


def scalar_expression(node: fx.Node) -> tuple[Expr, list[fx.Node]] | None:
    """The node as an expression of x0, x1, ... and those inputs; None if it is not such an op."""
    rule = RULES.get(getattr(node.target, "overloadpacket", None))
    inputs = list(node.all_input_nodes)
    if rule is None or not inputs or not all(map(_is_fp32, (node, *inputs))):
        return None
    refs = {n: Ref(f"x{i}") for i, n in enumerate(inputs)}
    try:
        expr = rule(*(_operand(a, refs) for a in node.args), **_options(node, refs))
    except TypeError:  # an argument that the rule does not know
        return None
    return None if expr is None else (expr, inputs)


def _operand(value: Any, refs: dict[fx.Node, Ref]) -> Any:
    if isinstance(value, fx.Node):
        return refs[value]
    return Const(float(value)) if isinstance(value, int | float) else value


def _options(node: fx.Node, refs: dict[fx.Node, Ref]) -> dict[str, Any]:
    """Keyword arguments, by the names that the rules have for them."""
    names = {"min": "low", "max": "high", "negative_slope": "slope"}
    return {names.get(key, key): _operand(value, refs) for key, value in node.kwargs.items()}


def _is_fp32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def cost(expr: Expr) -> int:
    """How many functions are computed; DEAR ones count as many."""
    match expr:
        case Call(fn, args):
            return (100 if fn in DEAR else 1) + sum(map(cost, args))
    return 0


def count(expr: Expr, name: str) -> int:
    """How often an operand occurs."""
    match expr:
        case Ref(found):
            return int(found == name)
        case Call(_, args):
            return sum(count(a, name) for a in args)
    return 0


def inside_dear(expr: Expr, inside: bool = False) -> set[str]:
    """Operands that dear functions are applied to: the gate of silu(gate) * up."""
    match expr:
        case Ref(name):
            return {name} if inside else set()
        case Call(fn, args):
            return set().union(*(inside_dear(a, inside or fn in DEAR) for a in args))
    return set()
