"""What a pass is, and the few verbs that rules are written with.

A pass is a dataclass whose fields are its options.  It rewrites a Program in place and returns how many
places it matched; running, timing, verifying and checking it is the pipeline's work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import fx

from ..ir.program import Program, Stage

aten = torch.ops.aten
mill = torch.ops.tokenmill


class Pass(ABC):
    """One idea.

    ``name`` is how recipes and reports call it; ``produces`` is the stage that holds after it (None: the
    stage stays); ``tolerance`` bounds the relative error that a checked run may show (exact passes:
    rounding), None for lossy passes, whose loss is reported instead.
    """

    name: ClassVar[str]
    produces: ClassVar[Stage | None] = None
    tolerance: ClassVar[float | None] = 1e-4

    @abstractmethod
    def run(self, program: Program) -> int:
        """Rewrite the program; return the number of matches."""

    @property
    def summary(self) -> str:
        """The first line of the pass's docstring."""
        return (type(self).__doc__ or "").strip().splitlines()[0]


def is_call(node: Any, *targets: Any) -> bool:
    """Whether ``node`` calls one of ``targets``, operator packets or overloads."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return any(node.target is t or packet is t for t in targets)


def calls(program: Program, *targets: Any) -> Iterator[fx.Node]:
    """Nodes that call one of ``targets``, in order; the list is taken before the first is yielded."""
    yield from [n for n in program.graph.nodes if is_call(n, *targets)]


def replace(program: Program, old: fx.Node, new: fx.Node) -> None:
    """Let ``new`` stand for ``old`` everywhere, keeping where it came from."""
    for key in ("nn_module_stack", "stack_trace"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
    old.replace_all_uses_with(new)


def sweep(program: Program) -> int:
    """Remove what no output needs; ops that write a cache stay."""
    graph, removed = program.graph, 0
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users or writes(node):
            continue
        graph.erase_node(node)
        removed += 1
    return removed


def writes(node: fx.Node) -> bool:
    """Whether the node mutates one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same symbol, without guarding on it."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return str(a) == str(b)
    return bool(a == b)


def token_count(program: Program) -> fx.Node:
    """The node of the step's token count, the only one after canonicalization."""
    return program.first("tokens", lambda n: is_call(n, aten.sym_size))


def tokens_outermost(program: Program, node: fx.Node) -> bool:
    """Whether the node is ``[1.., T, F..]``: one row per token."""
    count = program.input("ids").meta["val"].shape[1]
    sizes = [s for s in node.meta["val"].shape if not (isinstance(s, int) and s == 1)]
    return bool(sizes) and same_size(sizes[0], count) and all(isinstance(s, int) for s in sizes[1:])


def behind_reshapes(node: fx.Node) -> fx.Node:
    """What the node is a reshape of, if it is one."""
    while is_call(node, aten.reshape):
        node = node.args[0]
    return node


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta["val"].shape, b.meta["val"].shape
    return len(left) == len(right) and all(map(same_size, left, right))


def ancestors(node: fx.Node, stop: Callable[[fx.Node], bool]) -> dict[fx.Node, None]:
    """All nodes that ``node`` depends on, itself included, not looking past those that ``stop``."""
    seen: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen[at] = None
        if not stop(at):
            stack.extend(at.all_input_nodes)
    return seen
