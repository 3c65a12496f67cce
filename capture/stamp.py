"""Trace a repeated layer once.

A deep model is a few kinds of layers, many times each.  The model runs once on fake tensors, which is cheap,
while what each layer does is written down: every op with its constants, and where its operands come from.
Layers of equal records are twins.  Export then traces the first of each kind and meets one opaque op in
place of every twin, which is replaced by a copy of the first one's nodes, with the twin's own weights.

A record is all that a layer does for one number of tokens; what may matter for other numbers, the plain
attributes of its modules, is part of it.  Whatever cannot be followed is traced in full.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_FEWEST = 4  # layers in a list: fewer are traced sooner than compared
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_COMPARED = 4096  # a constant of more numbers is compared by identity


class NotStamped(Exception):
    """Why the twins of a traced layer cannot be copied from it."""


@dataclass(frozen=True)
class Kind:
    """Layers that do the same, by their paths: the first is traced, and stands for the others.

    ``like`` says of each tensor that comes out which of those that go in has its shape and dtype; ``result``
    makes the layer's result of these tensors.
    """

    first: str
    twins: tuple[str, ...]
    like: tuple[int, ...]
    result: Callable[[Sequence[Tensor]], Any]


# --- what layers do ---------------------------------------------------------------------------------


def kinds(model: nn.Module, inputs: Sequence[Tensor]) -> list[Kind]:
    """Layers of which there are several; none if that cannot be told.

    ``model(*inputs)`` is run on fake tensors; nothing is computed.
    """
    layers = _layers(model)
    if not layers:
        return []
    mode = _fake_mode(model)
    listener = _Listener(model, layers)
    try:
        with torch.no_grad(), mode, listener, listener.attached():
            model(*(mode.from_tensor(i.clone(), static_shapes=True) for i in inputs))
    except Exception:  # what is wrong with the model is for the exporter to say
        return []
    groups: dict[Hashable, list[_Record]] = defaultdict(list)
    for path in layers:
        if (record := listener.records.get(path)) is not None and record.usable:
            groups[layers[path].attributes, *record.lines].append(record)
    return [
        Kind(first.path, tuple(r.path for r in rest), tuple(first.like), first.result)
        for first, *rest in groups.values()
        if rest
    ]


@dataclass(frozen=True)
class _Layer:
    module: nn.Module
    attributes: Hashable


def _layers(model: nn.Module) -> dict[str, _Layer]:
    """Members of the outermost lists of modules, by path."""
    found: dict[str, _Layer] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        members = list(module)
        if len(members) < _FEWEST or len(set(map(id, members))) < len(members):
            continue
        counting = _counting(members)
        for i, member in enumerate(members):
            found[f"{path}.{i}"] = _Layer(member, _attributes(member, counting))
    return found


def _plain_attributes(layer: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN) or (
                isinstance(value, tuple | list) and all(isinstance(v, _PLAIN) for v in value)
            ):
                yield (path, name), value


def _counting(layers: Sequence[nn.Module]) -> set[tuple[str, str]]:
    """Attributes that say which layer of the list it is: they grow by one from each to the next."""
    values: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, layer in enumerate(layers):
        for key, value in _plain_attributes(layer):
            values[key].append(value - i if type(value) is int else -len(layers))
    return {k for k, v in values.items() if len(v) > 1 and len(set(v)) == 1 and v[0] > -len(layers)}


def _attributes(layer: nn.Module, counting: set[tuple[str, str]]) -> Hashable:
    types = tuple((path, type(module)) for path, module in layer.named_modules())
    plain = tuple(
        (key, repr(value)) for key, value in _plain_attributes(layer) if key not in counting
    )
    return types, plain


def _fake_mode(model: nn.Module) -> FakeTensorMode:
    fakes = (p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor))
    return next(fakes, None) or FakeTensorMode(allow_non_fake_inputs=True)


class _Record:
    """What one layer does; values are numbered as they come, weights are called by their names."""

    def __init__(
        self, path: str, weights: Mapping[int, str], kept: list[Any], made: dict[int, _Record]
    ) -> None:
        """``kept`` are tensors seen so far, ``made`` those that are inside of a layer, by their ids."""
        self.path = path
        self.usable = True
        self.lines: list[Hashable] = []
        self.like: list[int] = []
        self.result: Callable[[Sequence[Tensor]], Any] = list
        self._weights, self._kept, self._made = weights, kept, made
        self._numbers: dict[int, int] = {}
        self._inputs: list[Tensor] = []

    def enter(self, arguments: Any) -> None:
        leaves, tree = pytree.tree_flatten(arguments)
        self._inputs = _distinct(leaves)
        self.usable &= all(isinstance(v, (Tensor, *_PLAIN)) for v in leaves)
        self.lines.append(("in", *map(self._new, self._inputs)))
        self.lines.append(("arguments", repr(tree), *map(self._value, leaves)))

    def op(self, target: Any, arguments: Any, out: Any) -> None:
        if target._schema.is_mutable:
            tensors = _distinct(pytree.tree_leaves(arguments))
            self.usable &= all(id(t) in self._numbers for t in tensors)
            self.usable &= not any(t is i for t in tensors for i in self._inputs)
        line = target, self._value(arguments)
        results = out if isinstance(out, tuple | list) else [out]
        for result in _distinct(results):
            if id(result) not in self._numbers:
                self._made[id(result)] = self
        self.lines.append((*line, *map(self._new, results)))

    def leave(self, out: Any) -> None:
        leaves, tree = pytree.tree_flatten(out)
        self.lines.append(("out", repr(tree), *map(self._value, leaves)))
        tensors = _distinct(leaves)
        for tensor in tensors:
            self._made.pop(id(tensor), None)
        inputs = [(i.shape, i.dtype) for i in self._inputs]
        self.usable &= all((t.shape, t.dtype) in inputs for t in tensors)
        self.usable &= bool(tensors) and all(isinstance(v, (Tensor, *_PLAIN)) for v in leaves)
        if self.usable:
            self.like = [inputs.index((t.shape, t.dtype)) for t in tensors]
            places = [next((i for i, t in enumerate(tensors) if t is v), None) for v in leaves]
            constants = [None if isinstance(v, Tensor) else v for v in leaves]
            self.result = partial(_assembled, tree, places, constants)

    def _new(self, value: Any) -> Hashable:
        """A value that is seen for the first time, or one that an op in place yields again."""
        if not isinstance(value, Tensor):
            return self._value(value)
        self._kept.append(value)  # a tensor that is gone may leave its id to another one
        number = self._numbers.setdefault(id(value), len(self._numbers))
        return number, tuple(value.shape), value.dtype

    def _value(self, value: Any) -> Hashable:
        if isinstance(value, tuple | list):
            return type(value), tuple(map(self._value, value))
        if isinstance(value, dict):
            return dict, tuple((k, self._value(v)) for k, v in value.items())
        if not isinstance(value, Tensor):
            return type(value), repr(value)
        if (number := self._numbers.get(id(value))) is not None:
            return number
        if (name := self._weights.get(id(value))) is not None:
            own = name.startswith(f"{self.path}.")
            local = name.removeprefix(f"{self.path}.") if own else name
            return own, local, tuple(value.shape), value.dtype
        real = value.constant if isinstance(value, FakeTensor) else value
        if real is None or real.is_meta or real.numel() > _COMPARED:
            self._kept.append(value)
            return "other", id(value)
        with _disable_current_modes():
            return "constant", tuple(real.shape), real.dtype, repr(real.tolist())


def _distinct(leaves: Iterable[Any]) -> list[Tensor]:
    return list({id(v): v for v in leaves if isinstance(v, Tensor)}.values())


def _assembled(
    tree: Any, places: Sequence[int | None], constants: Sequence[Any], tensors: Sequence[Tensor]
) -> Any:
    leaves = [
        c if place is None else tensors[place] for place, c in zip(places, constants, strict=True)
    ]
    return pytree.tree_unflatten(leaves, tree)


class _Listener(TorchDispatchMode):
    """Writes down what the given layers of a model do."""

    def __init__(self, model: nn.Module, layers: Mapping[str, _Layer]) -> None:
        super().__init__()
        self.records: dict[str, _Record] = {}
        self._layers = layers
        self._weights = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        self._kept: list[Any] = []
        self._made: dict[int, _Record] = {}
        self._current: _Record | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._read((args, kwargs))
        out = func(*args, **(kwargs or {}))
        if self._current is not None:
            self._current.op(func, (args, kwargs or {}), out)
        return out

    def _read(self, arguments: Any) -> None:
        """What leaves a layer otherwise than as its result is nothing that a twin would leave."""
        for value in _distinct(pytree.tree_leaves(arguments)):
            maker = self._made.get(id(value))
            if maker is not None and maker is not self._current:
                maker.usable = False
                if self._current is not None:
                    self._current.usable = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        with _calling(
            {layer.module: partial(self._call, path) for path, layer in self._layers.items()}
        ):
            yield

    def _call(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        record = _Record(path, self._weights, self._kept, self._made)
        outer, self._current = self._current, record
        record.usable = outer is None and path not in self.records
        self.records[path] = record
        self._read((args, kwargs))
        record.enter((args, kwargs))
        out = forward(*args, **kwargs)
        record.leave(out)
        self._current = outer
        return out


@contextmanager
def _calling(calls: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules call ``call(forward, *args, **kwargs)`` instead of ``forward(*args, **kwargs)``."""
    before = {module: vars(module).get("forward") for module in calls}
    try:
        for module, call in calls.items():
            module.forward = partial(call, module.forward)
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


# --- tracing one of each kind -----------------------------------------------------------------------

_LIBRARY = torch.library.Library("tokenmill_stamp", "DEF")
_LIBRARY.define("enter(Tensor[] values, str layer) -> Tensor[]")
_LIBRARY.define("leave(Tensor[] values, str layer) -> Tensor[]")
_LIBRARY.define("twin(Tensor[] values, int[] like, str layer, str first) -> Tensor[]")


@torch.library.register_fake("tokenmill_stamp::enter", lib=_LIBRARY)
@torch.library.register_fake("tokenmill_stamp::leave", lib=_LIBRARY)
def _same(values: list[Tensor], layer: str) -> list[Tensor]:
    return [torch.empty_like(v) for v in values]


@torch.library.register_fake("tokenmill_stamp::twin", lib=_LIBRARY)
def _twin(values: list[Tensor], like: list[int], layer: str, first: str) -> list[Tensor]:
    return [torch.empty_like(values[i]) for i in like]


stamp = torch.ops.tokenmill_stamp
_MARKS = (stamp.enter.default, stamp.leave.default)


@contextmanager
def marked(model: nn.Module, found: Sequence[Kind]) -> Iterator[dict[str, Tensor]]:
    """While this is entered, tracing the model meets marks around the first of each kind, and one op for
    each of the others, whose parameters and buffers are put away: those that are yielded, by name.
    """
    calls: dict[nn.Module, Callable[..., Any]] = {}
    for kind in found:
        calls[model.get_submodule(kind.first)] = partial(_traced, kind)
        for path in kind.twins:
            calls[model.get_submodule(path)] = partial(_skipped, kind, path)
    twins = {path: model.get_submodule(path) for kind in found for path in kind.twins}
    hidden = {
        f"{path}.{name}": tensor
        for path, twin in twins.items()
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers())
    }
    with _calling(calls), _emptied(twins.values()):
        yield hidden


_CONTENTS = ("_parameters", "_buffers", "_modules")


@contextmanager
def _emptied(modules: Iterable[nn.Module]) -> Iterator[None]:
    before = [(module, {name: vars(module)[name] for name in _CONTENTS}) for module in modules]
    try:
        for module, contents in before:
            vars(module).update({name: type(held)() for name, held in contents.items()})
        yield
    finally:
        for module, contents in before:
            vars(module).update(contents)


def _traced(kind: Kind, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    leaves, tree = pytree.tree_flatten((args, kwargs))
    inputs = _distinct(leaves)
    inside = dict(zip(map(id, inputs), stamp.enter(inputs, kind.first), strict=True))
    given, named = pytree.tree_unflatten([inside.get(id(v), v) for v in leaves], tree)
    results = _distinct(pytree.tree_leaves(forward(*given, **named)))
    for result, like in zip(results, kind.like, strict=True):
        if str(result.shape) != str(inputs[like].shape):
            raise NotStamped(f"what comes out of {kind.first} has a shape of its own")
    return kind.result(stamp.leave(results, kind.first))


def _skipped(kind: Kind, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    inputs = _distinct(pytree.tree_leaves((args, kwargs)))
    return kind.result(stamp.twin(inputs, list(kind.like), path, kind.first))


# --- stamping ---------------------------------------------------------------------------------------


@dataclass
class _Body:
    """The nodes of a traced layer, between its marks."""

    enter: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    results: Sequence[fx.Node] = ()


def expand(graph: fx.Graph, owner: Mapping[str, str], constants: set[str]) -> fx.Graph:
    """The graph with every twin written out and without marks.

    ``owner`` says what the weight of any name in the model is called in the graph, and ``constants`` are
    those names that are no parameters or buffers.  Raises NotStamped if a layer reaches outside in a way that
    its twins cannot follow.
    """
    if not any(node.target in _MARKS for node in graph.nodes):
        return graph
    aliases: dict[str, list[str]] = defaultdict(list)  # tied weights have several names
    for name, weight in owner.items():
        aliases[weight].append(name)

    def own(first: str, path: str, node: fx.Node) -> fx.Node | None:
        """What the twin at ``path`` has where the first layer has a weight of its own."""
        known = aliases[node.target] if node.op == "get_attr" else []
        name = next((n for n in known if n.startswith(f"{first}.")), None)
        if name is None:
            return None
        twin = path + name.removeprefix(first)
        if name in constants and twin not in owner:
            return None
        if twin not in owner:
            raise NotStamped(f"{path} has no {name.removeprefix(f'{first}.')}")
        weight = new.create_node("get_attr", owner[twin])
        weight.meta["val"] = node.meta["val"]
        return weight

    bodies = _bodies(graph)
    new = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.target in _MARKS:
            values[node] = [values[v] for v in node.args[0]]
        elif node.target is stamp.twin.default:
            given, _, path, first = node.args
            inside = _Copy(new, values, partial(own, first, path), first, path)
            values[node] = inside.of(bodies[first], [values[v] for v in given])
        elif node.target is operator.getitem and isinstance(values[node.args[0]], list):
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "output":
            new.output(fx.map_arg(node.args[0], values.__getitem__))
        else:
            values[node] = new.node_copy(node, values.__getitem__)
    return new


def _bodies(graph: fx.Graph) -> dict[str, _Body]:
    found: dict[str, _Body] = {}
    current: _Body | None = None
    for node in graph.nodes:
        if node.target is stamp.enter.default:
            current = found[node.args[1]] = _Body(node)
        elif node.target is stamp.leave.default and current is not None:
            current.results, current = node.args[0], None
        elif current is not None:
            if free_unbacked_symbols(node.meta.get("val")):
                raise NotStamped(f"{node.name} has a size that depends on values")
            current.nodes.append(node)
    return found


@dataclass
class _Copy:
    """Writes a traced layer's nodes again, for the twin at ``path``."""

    graph: fx.Graph
    values: Mapping[fx.Node, Any]  # what is written already, outside of the twin
    own: Callable[[fx.Node], fx.Node | None]
    first: str
    path: str
    stacks: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)

    def of(self, body: _Body, inputs: Sequence[fx.Node]) -> list[fx.Node]:
        inside: dict[fx.Node, fx.Node] = {}

        def value(node: fx.Node) -> fx.Node:
            if node not in inside:
                inside[node] = self.own(node) or self.values[node]
            return inside[node]

        for node in body.nodes:
            if node.target is operator.getitem and node.args[0] is body.enter:
                inside[node] = inputs[node.args[1]]
                continue
            copy = inside[node] = self.graph.node_copy(node, value)
            if stack := node.meta.get("nn_module_stack"):
                copy.meta["nn_module_stack"] = self._stack(stack)
        return [value(r) for r in body.results]

    def _stack(self, stack: Mapping[str, Any]) -> dict[str, Any]:
        paths = tuple(path for path, _ in stack.values())
        if paths not in self.stacks:
            renamed = (
                (self.path + path.removeprefix(self.first), kind)
                if f"{path}.".startswith(f"{self.first}.")
                else (path, kind)
                for path, kind in stack.values()
            )
            self.stacks[paths] = {path: (path, kind) for path, kind in renamed}
        return self.stacks[paths]
