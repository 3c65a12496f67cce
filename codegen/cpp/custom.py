"""Custom: ops that a user registered, each row by itself."""

from __future__ import annotations

from textwrap import dedent

from ...ir.plan import Custom, Shaped
from .. import custom
from ..text import fill
from .expr import literal
from .text import signature

HEADER = "simd.h"
_TYPES = {"f32": "float", "bf16": "uint16_t", "i32": "int32_t", "i64": "int64_t", "u8": "uint8_t"}

symbol = custom.symbol


def emit(spec: Custom, name: str) -> str:
    weights = [o for o in spec.operands if o.weight]
    return fill(
        TEMPLATE,
        symbol=name,
        about=custom.about(spec),
        constants="\n".join(_constant(n, v) for n, v in custom.constants(spec).items()),
        signature=signature(*map(_param, spec.operands), "Rows<float> out"),
        weights="\n".join(
            f"const {_type(w)} *{w.name} = (const {_type(w)} *){w.name}_;" for w in weights
        ),
        body=dedent(custom.body(spec, "cpp")).strip("\n"),
    )


def _param(operand: Shaped) -> str:
    if operand.weight:
        return f"const void *{operand.name}_"
    return f"Rows<{_type(operand)}> {operand.name}"


def _type(operand: Shaped) -> str:
    return _TYPES[operand.dtype]


def _constant(name: str, value: int | float | bool) -> str:
    match value:
        case bool():
            return f"constexpr bool {name} = {str(value).lower()};"
        case int():
            return f"constexpr {'int' if abs(value) < 1 << 31 else 'int64_t'} {name} = {value};"
    return f"constexpr float {name} = {literal(value)};"


TEMPLATE = """
// $about
namespace $symbol {
$constants
constexpr size_t SHARED = 0, LOCAL = 0;

$signature
  $weights
  $body
}
}  // namespace $symbol
"""
