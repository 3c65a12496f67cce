"""Shape inference, once for all that is alike.

Running an op on fake or meta tensors takes a millisecond or so, and the layers of a deep model ask for the
same few results again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Unknown(Exception):
    """Values that cannot be compared."""


class Memo:
    """Results of functions on tensors without numbers, which calls with equal arguments share."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] = {}
    ) -> Any:
        try:
            key = rule(function), signature(tuple(args)), signature(dict(kwargs))
        except Unknown:
            return function(*args, **kwargs)
        if key not in self._known:
            result = function(*args, **kwargs)
            if free_unbacked_symbols(result):  # the next call has sizes of its own
                return result
            self._known[key] = result
        return self._known[key]


def rule(function: Callable[..., Any]) -> Hashable:
    """What is equal for functions that do the same; raises Unknown for a function of unknown insides.

    >>> make = lambda n: lambda w: w.unflatten(0, (n, -1))
    >>> rule(make(3)) == rule(make(3)), rule(make(3)) == rule(make(4))
    (True, False)
    """
    if isinstance(function, partial):
        return rule(function.func), signature(function.args), signature(function.keywords)
    code = getattr(function, "__code__", None)
    if code is None:
        return function
    cells = [c.cell_contents for c in getattr(function, "__closure__", None) or ()]
    if any(isinstance(c, Tensor) for c in cells):
        raise Unknown  # its numbers may count
    return code, signature(tuple(cells)), signature(getattr(function, "__defaults__", None))


def signature(value: Any) -> Hashable:
    """What shapes can depend on in an argument; 1, 1.0 and True stay apart."""
    match value:
        case Tensor():
            return (
                Tensor, _sizes(value.shape), _sizes(value.stride()), value.dtype, str(value.device),
                type(value),
            )  # fmt: skip
        case torch.SymInt() | torch.SymFloat() | torch.SymBool():
            return type(value), value.node.expr
        case list() | tuple():
            return type(value), tuple(map(signature, value))
        case dict():
            return tuple((k, signature(v)) for k, v in value.items())
        case slice():
            return slice, signature((value.start, value.stop, value.step))
    if isinstance(value, _PLAIN) or getattr(type(value), "__dataclass_params__", _MUTABLE).frozen:
        return type(value), value
    raise Unknown


class _MUTABLE:
    frozen = False


def _sizes(sizes: Sequence[Any]) -> Hashable:
    return tuple(s if isinstance(s, int) else s.node.expr for s in sizes)
