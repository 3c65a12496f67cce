"""Branches that code takes to skip experts without tokens, decided while tracing.

``if token.numel() == 0: continue`` and ``if mask.any():`` only save work where what follows accepts empty
selections.  So they are traced as if there were tokens; capture then compares with the eager model, which
skips, on inputs so short that most experts have none.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.overrides import TorchFunctionMode


@dataclass
class Watched:
    """Lines of the model that branched on how many tokens a selection has (``sizes``), on whether there are
    any (``flags``), and those that ``fixed`` the number of tokens.
    """

    sizes: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)


@contextmanager
def not_empty() -> Iterator[Watched]:
    """While tracing, selections of tokens are not empty."""
    watched = Watched()
    evaluate_expr, set_replacement = ShapeEnv.evaluate_expr, ShapeEnv._set_replacement

    def evaluate(env: ShapeEnv, condition: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return evaluate_expr(env, condition, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            answer = _if_not_empty(env, condition)
            if answer is None:
                raise
            watched.sizes.append(_user_line())
            return answer

    def replaced(env: ShapeEnv, symbol: Any, value: Any, message: str) -> None:
        if value.is_number and str(symbol).startswith("s"):
            watched.fixed.append(_user_line())
        set_replacement(env, symbol, value, message)

    ShapeEnv.evaluate_expr, ShapeEnv._set_replacement = evaluate, replaced
    try:
        with _AnyHolds(watched.flags):
            yield watched
    finally:
        ShapeEnv.evaluate_expr, ShapeEnv._set_replacement = evaluate_expr, set_replacement


def _if_not_empty(env: ShapeEnv, condition: Any) -> Any:
    """What a comparison of a selection's size with 0 comes to; None if it is no such comparison."""
    symbols: set[Any] = getattr(condition, "free_symbols", set())
    if len(symbols) != 1 or not symbols <= env.size_like or 0 not in condition.args:
        return None
    (size,) = symbols
    if size not in condition.args:
        return None
    known = {condition.subs(size, n) for n in (1, 2, 1000)}
    return known.pop() if len(known) == 1 and {str(k) for k in known} <= {"True", "False"} else None


class _AnyHolds(TorchFunctionMode):
    """``bool(flags.any())`` is True."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines
        self.flags: dict[int, Tensor] = {}  # kept alive, so that their ids stay theirs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__bool__ and id(args[0]) in self.flags:
            self.lines.append(_user_line())
            return True
        out = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.any, torch.any) and isinstance(out, Tensor):
            self.flags[id(out)] = out
        return out


def _user_line() -> str:
    """The innermost frame that is neither torch's nor ours."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and not frame.filename.endswith("capture/branches.py"):
            return f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return "the model"
