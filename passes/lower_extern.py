"""Steps that torch runs: an op and its arguments as data, in the form of ``plan.Extern``."""

from __future__ import annotations

import json
import operator
from typing import Any

import torch
from torch import fx

from ..errors import NotLowered
from ..ir.plan import Extern, Rows
from ..ir.program import shape, where
from .base import is_call, writes
from .views import features, row_size, width

_ARENA_DTYPES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.bool: "bool",
    **dict.fromkeys((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8), "i32"),
}
_PLACEMENT = ("device", "layout", "memory_format", "pin_memory")  # the runtime's own business


def extern_dtype(node: fx.Node) -> str:
    """The dtype in which a node's result is kept between steps; integers of all sizes are i32."""
    dtype = node.meta["val"].dtype
    if dtype not in _ARENA_DTYPES:
        raise _refusal(node, f"results of {dtype} cannot be kept: compute in float32")
    return _ARENA_DTYPES[dtype]


def extern(node: fx.Node, rows: Rows, tokens: str) -> tuple[Extern, dict[str, fx.Node]]:
    """The step that computes ``node``, one tensor (or one of several: a getitem), and its operands.

    ``tokens`` is the symbol that stands for the count of ``rows``.
    """
    item, call = -1, node
    if is_call(node, operator.getitem):
        call, item = node.args
    if getattr(call.target, "namespace", "") not in ("aten", "prims") or writes(call):
        raise _refusal(
            call, "neither a kernel nor torch alone can run it: leave it out of the model"
        )
    encoder = _Encoder(call, rows, tokens)
    kwargs = {k: encoder.value(arg) for k, arg in call.kwargs.items() if k not in _PLACEMENT}
    args = json.dumps({"args": [encoder.value(arg) for arg in call.args], "kwargs": kwargs})
    operands = encoder.operands
    row = features(node)
    out = tuple(sizes(node)) if row is None else (-1, *row)
    return Extern(str(call.target), tuple(operands), args, extern_dtype(node), out, item), operands


def sizes(node: fx.Node) -> list[int]:
    """A shape in which -1 stands for the dim that depends on the step."""
    found = [-1 if isinstance(size, torch.SymInt) else size for size in shape(node)]
    if found.count(-1) > 1:
        raise _refusal(node, "more than one of its dims depends on the step: rewrite it")
    return found


class _Encoder:
    """Arguments of one call as JSON values; tensors become numbered operands."""

    def __init__(self, call: fx.Node, rows: Rows, tokens: str) -> None:
        self._call, self._rows, self._tokens = call, rows, tokens
        self._names: dict[fx.Node, str] = {}

    @property
    def operands(self) -> dict[str, fx.Node]:
        return {name: node for node, name in self._names.items()}

    def value(self, value: Any) -> Any:
        match value:
            case fx.Node() if isinstance(value.meta["val"], torch.Tensor):
                return self._tensor(value)
            case fx.Node():
                return self.value(value.meta["val"])
            case torch.SymInt():
                return self._size(value)
            case list() | tuple():
                return [self.value(v) for v in value]
            case torch.dtype():
                return {"dtype": _name(value)}
            case None | bool() | int() | float() | str():
                return value
        raise _refusal(self._call, f"its argument {value!r} cannot be written down: rewrite it")

    def _tensor(self, node: fx.Node) -> dict[str, Any]:
        name = self._names.setdefault(node, f"x{len(self._names)}")
        dtype = _name(node.meta["val"].dtype)
        return {"operand": name, "columns": width(node), "shape": sizes(node), "dtype": dtype}

    def _size(self, size: torch.SymInt) -> dict[str, Any]:
        count, times = row_size(size)
        if str(count) != self._tokens:
            raise _refusal(self._call, f"its size {size} is no multiple of the token count")
        return {"size": self._rows, "times": times}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refusal(node: fx.Node, advice: str) -> NotLowered:
    return NotLowered(op=node.target, where=where(node), advice=advice)
