"""Rewrites by example: two functions that compute the same, one to be found and one to take its place."""

from __future__ import annotations

import inspect
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..errors import BadPattern
from ..ir.program import Program, is_weight, shape, where
from .base import Pass, aten, is_call, replace, same_shape, sweep
from .region import Region
from .views import RESHAPES

_COMMUTE = (aten.mul, aten.add, aten.maximum, aten.minimum)
_PROOF_TOKENS = 5  # stand for sizes that depend on the step


class Pattern(Pass):
    """A pass that is given by example: where the graph computes ``find``, let it compute ``put``.

    Subclasses write both as methods over the same parameters, in ops of torch or of the dialect (``tokenmill
    inspect MODEL --graph canonical`` shows what a graph is made of), and ``example``, a value for each
    parameter.  A tensor matches any activation, one of a parameter that ``weights`` names any weight, and a
    number any number; it must not occur in ``find`` otherwise.  :meth:`accept` may ask for more, such as
    shapes.  What both compute of weights alone is computed once, at build time.

    Sums and products match in either order, and reshapes and expansions whatever their sizes; ``put`` should
    name no sizes.  What is in the middle of a match must not be used elsewhere.  Every match is proven: what
    the graph computes there and what ``put`` computes are run on random numbers of its shapes.
    """

    weights: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def example(self) -> Sequence[Tensor | float | int]:
        """A value for each parameter of ``find``."""

    #: The two functions; subclasses choose their parameters.
    find: Callable[..., Tensor]
    put: Callable[..., Tensor]

    def accept(self, **found: fx.Node | float | int) -> bool:
        """Whether a match is one; ``found`` are its nodes and numbers by parameter."""
        return True

    def run(self, program: Program) -> int:
        proven: set[str] = set()
        gone: set[fx.Node] = set()
        matches = 0
        found_by, _ = self._found, self._put  # both can be traced, or nothing is touched
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node in gone:
                continue
            for found in found_by.match(node):
                values = {name: found[n] for name, n in found_by.parameters.items()}
                if self.accept(**values):
                    inside = [found[n] for n in found_by.nodes]
                    self._prove(node, inside, values, proven)
                    self._rewrite(program, node, values)
                    gone.update(inside)
                    matches += 1
                    break
        sweep(program)
        return matches

    @cached_property
    def _found(self) -> _Traced:
        return _Traced(self, "find")

    @cached_property
    def _put(self) -> _Traced:
        return _Traced(self, "put")

    def _rewrite(self, program: Program, node: fx.Node, values: Mapping[str, Any]) -> None:
        with program.graph.inserting_before(node):
            try:
                new = self._put.insert(program, values, like=node)
            except RuntimeError as error:
                reason = f"put does not fit there: {str(error).splitlines()[0]}"
                raise BadPattern(name=self.name, where=where(node), reason=reason) from error
        if not same_shape(node, new) or node.meta["val"].dtype != new.meta["val"].dtype:
            raise BadPattern(
                name=self.name, where=where(node),
                reason=f"find yields {_kind(node)}, and put {_kind(new)}",
            )  # fmt: skip
        replace(program, node, new)

    def _prove(
        self, node: fx.Node, inside: Sequence[fx.Node], values: Mapping[str, Any], proven: set[str]
    ) -> None:
        """Run what was found and ``put``; raises BadPattern if they differ.  What is proven stays so."""
        bound = [v for v in values.values() if isinstance(v, fx.Node)]
        kinds = f"{[_kind(n) for n in (*bound, *inside)]} {[v for v in values.values() if v not in bound]}"
        if kinds in proven or self.tolerance is None:
            return
        rng = torch.Generator().manual_seed(0)
        numbers = {n: _random(n, rng) for n in bound}
        (wanted,) = Region([node], bound)([numbers[n] for n in bound], _PROOF_TOKENS, {})
        with torch.no_grad():
            got = self.put(*(numbers.get(v, v) for v in values.values()))
        same = wanted.shape == got.shape
        error = float((got - wanted).norm() / wanted.norm().clamp(min=1e-30)) if same else math.inf
        if not error <= self.tolerance:
            raise BadPattern(
                name=self.name, where=where(node),
                reason=f"put differs from what was found, by a relative error of {error:.3g}",
            )  # fmt: skip
        proven.add(kinds)


def _kind(node: fx.Node) -> str:
    return f"{node.meta['val'].dtype} {tuple(map(str, shape(node)))}"


def _random(node: fx.Node, rng: torch.Generator) -> Tensor:
    sizes = [s if isinstance(s, int) else _PROOF_TOKENS for s in shape(node)]
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=rng).to(dtype)
    return torch.randint(0, 2, sizes, generator=rng).to(dtype)


class _Traced:
    """One function of a pattern as a graph, found in other graphs or inserted into them."""

    def __init__(self, pattern: Pattern, method: str) -> None:
        self.pattern = pattern
        if not hasattr(pattern, method):
            raise self._bad(f"there is no {method}")
        values = list(pattern.example())
        names = list(inspect.signature(getattr(pattern, method)).parameters)
        if len(names) != len(values):
            raise self._bad(
                f"{method} has {len(names)} parameters, and example gives {len(values)}"
            )
        given = dict(zip(names, values, strict=True))
        tensors = {n: v for n, v in given.items() if isinstance(v, Tensor)}
        self.numbers = {v: n for n, v in given.items() if n not in tensors}
        graph = self._trace(method, given, tensors)
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.parameters: dict[str, Any] = dict(zip(tensors, inputs, strict=True))
        self.parameters |= {n: n for n in self.numbers.values()}
        self.parameters = {n: self.parameters[n] for n in names}
        self.nodes = [n for n in graph.nodes if n.op == "call_function"]
        (self.root,) = graph.output_node().args[0]
        if method == "find" and self.root not in self.nodes:
            raise self._bad("find computes nothing")

    def _bad(self, reason: str) -> BadPattern:
        return BadPattern(name=self.pattern.name, reason=reason, where=type(self.pattern).__name__)

    def _trace(
        self, method: str, given: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> fx.Graph:
        function = getattr(self.pattern, method)

        class Module(nn.Module):
            def forward(self, *inputs: Tensor) -> Tensor:
                by_name = dict(zip(tensors, inputs, strict=True))
                return function(*({**given, **by_name}[name] for name in given))

        try:
            with torch.no_grad(), warnings.catch_warnings():
                # Raised inside torch.export about its own tree specs.
                warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
                exported = torch.export.export(Module(), tuple(tensors.values()), strict=False)
                graph = exported.run_decompositions({}).graph
        except Exception as error:
            raise self._bad(f"{method} cannot be traced: {str(error).splitlines()[0]}") from error
        # Canonical graphs have one spelling of these; what is put may have any that names no sizes.
        for node in graph.nodes:
            if is_call(node, *(RESHAPES if method == "find" else (aten.view, aten._unsafe_view))):
                node.args = (node.args[0], list(node.meta["val"].shape))
                node.target = aten.reshape.default
        if exported.constants:
            raise self._bad(f"{method} makes a tensor of its own: let it be a parameter")
        return graph

    # --- finding ---

    def match(self, node: fx.Node) -> Iterator[dict[Any, Any]]:
        """All ways in which ``node`` is the result of the function: what stands for each node and number."""
        for found in self._node(self.root, node, {}):
            inside = {found[n] for n in self.nodes}
            if all(u in inside for n in inside if n is not node for u in n.users):
                yield found

    def _node(self, p: fx.Node, g: Any, found: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        if p in found:
            if found[p] is g:
                yield found
        elif not isinstance(g, fx.Node):
            return
        elif p.op == "placeholder":
            named = next(n for n, node in self.parameters.items() if node is p)
            if isinstance(g.meta.get("val"), Tensor) and (
                is_weight(g) == (named in self.pattern.weights)
            ):
                yield {**found, p: g}
        elif p.target == g.target and is_call(p, aten.reshape, aten.expand):
            yield from self._node(p.args[0], g.args[0], {**found, p: g})
        elif p.target == g.target:
            left, right = _arguments(p), _arguments(g)
            for order in _orders(p, right):
                yield from self._all(left, order, {**found, p: g})

    def _all(
        self, left: Sequence[Any], right: Sequence[Any], found: dict[Any, Any]
    ) -> Iterator[dict[Any, Any]]:
        if len(left) != len(right):
            return
        if not left:
            yield found
            return
        for one in self._value(left[0], right[0], found):
            yield from self._all(left[1:], right[1:], one)

    def _value(self, p: Any, g: Any, found: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        if isinstance(p, fx.Node):
            yield from self._node(p, g, found)
        elif isinstance(p, list | tuple):
            if isinstance(g, list | tuple):
                yield from self._all(p, g, found)
        elif (name := self._number(p)) is not None:
            plain = isinstance(g, int | float) and not isinstance(g, bool)
            if plain and found.get(name, g) == g:
                yield {**found, name: g}
        elif not isinstance(g, fx.Node) and type(p) is type(g) and p == g:
            yield found

    def _number(self, value: Any) -> str | None:
        """The parameter that a number stands for."""
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return self.numbers.get(value) if plain else None

    # --- inserting ---

    def insert(self, program: Program, values: Mapping[str, Any], like: fx.Node) -> fx.Node:
        """The function's nodes, at the insertion point; returns its result."""
        made: dict[Any, Any] = {self.parameters[n]: v for n, v in values.items()}

        def value(of: Any) -> Any:
            if isinstance(of, list | tuple):
                return type(of)(map(value, of))
            if isinstance(of, fx.Node):
                return made[of]
            return values[name] if (name := self._number(of)) is not None else of

        for node in self.nodes:
            args = [value(a) for a in node.args]
            kwargs = {k: value(a) for k, a in node.kwargs.items()}
            made[node] = program.call(node.target, *args, like=like, **kwargs)
            inputs = made[node].all_input_nodes
            if (
                inputs
                and all(map(is_weight, inputs))
                and isinstance(made[node].meta["val"], Tensor)
            ):
                made[node] = _folded(program, made[node])
        result: fx.Node = made[self.root]
        return result


def _folded(program: Program, node: fx.Node) -> fx.Node:
    """The weight that a call computes of weights, in its place."""
    names = [n.target for n in node.all_input_nodes]
    target, args, kwargs = node.target, node.args, dict(node.kwargs)

    def compute(*weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        full = fx.node.map_aggregate(
            (args, kwargs), lambda a: given[a.target] if isinstance(a, fx.Node) else a
        )
        out: Tensor = target(*full[0], **full[1])
        return out

    name = program.weights.fresh(f"{names[0]}.{node.name}")
    program.weights.derive(name, compute, *names)
    program.graph.erase_node(node)
    return program.weight(name)


def _orders(node: fx.Node, arguments: list[Any]) -> list[list[Any]]:
    if not is_call(node, *_COMMUTE) or len(arguments) < 2 or arguments[2:] not in ([], [1]):
        return [arguments]
    return [arguments, [arguments[1], arguments[0], *arguments[2:]]]


def _arguments(node: fx.Node) -> list[Any]:
    """All arguments in the order of the schema, defaults too; dims count from the end."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args, *node.kwargs.values()]
    found = []
    for i, argument in enumerate(schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, _MISSING)
        value = argument.default_value if given is _MISSING else given
        if argument.name in ("dim", "dims"):
            value = _from_end(value, node)
        found.append(list(value) if isinstance(value, list | tuple) else value)
    return found


_MISSING = object()


def _from_end(dim: Any, node: fx.Node) -> Any:
    if isinstance(dim, list | tuple):
        return [_from_end(d, node) for d in dim]
    first = next((n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)), None)
    if type(dim) is not int or first is None or dim < 0:
        return dim
    return dim - len(shape(first))
