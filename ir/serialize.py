"""A Program as JSON, and back.

What is written is the graph: inputs, calls with their arguments, the names, shapes and dtypes of the weights,
and where in the user's model each call comes from.  Shapes of what is computed are inferred again when it is
read.  Arguments that JSON cannot say are objects: ``{"node": name}``, ``{"tuple": [...]}``, ``{"dtype":
"float32"}`` (also device, layout, memory_format) and ``{"float": "inf"}``.

The text is the same for the same program, on any machine: of a source line it keeps the file's name alone.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from . import cache as kv
from .cache import CacheSpec, Part
from .program import Program, Stage, Weights, module_path, source_line

VERSION = 1
DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_OPERATORS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}
_CONSTANTS: dict[type, str] = {
    torch.dtype: "dtype",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
}


def dump(program: Program) -> dict[str, Any]:
    """The JSON form of a program; raises ValueError for what cannot be written down."""
    places: dict[tuple[str, ...], int] = {}
    nodes = [
        _node(node, places)
        for node in program.graph.nodes
        if node.op in ("placeholder", "call_function")
    ]
    weights = {name: program.weights.like(name) for name in program.used_weights()}
    return {
        "version": VERSION,
        "stage": program.stage.name.lower(),
        "name": program.name,
        "vocab": program.vocab,
        "positions": program.positions,
        "parameters": program.parameters,
        "caches": [dataclasses.asdict(spec) for spec in program.caches],
        "weights": {
            name: {"dtype": DTYPES[like.dtype], "shape": list(like.shape)}
            for name, like in weights.items()
        },
        "places": [list(place) for place in places],
        "nodes": nodes,
        "output": _encode(program.output.args[0]),
    }


def likes(data: Mapping[str, Any]) -> dict[str, Tensor]:
    """Meta tensors of the weights that a dumped program names."""
    return {
        name: torch.empty(fact["shape"], dtype=TORCH_DTYPES[fact["dtype"]], device="meta")
        for name, fact in data["weights"].items()
    }


def load(data: Mapping[str, Any], weights: Weights) -> Program:
    """The inverse of :func:`dump`, over ``weights`` of the same names, shapes and dtypes.

    Raises ValueError for weights that do not fit, for another version, and for ops that nobody registered.
    """
    if data.get("version") != VERSION:
        raise ValueError(f"program version {data.get('version')} is not {VERSION}")
    for name, like in likes(data).items():
        if name not in weights:
            raise ValueError(f"there is no weight {name!r}")
        found = weights.like(name)
        if (found.shape, found.dtype) != (like.shape, like.dtype):
            raise ValueError(f"weight {name!r} is {tuple(found.shape)} {found.dtype}")
    caches = [
        CacheSpec(c["name"], c["format"], tuple(Part(**part) for part in c["parts"]))
        for c in data["caches"]
    ]
    program = Program(
        fx.Graph(), weights, data["vocab"], data["positions"], Stage[data["stage"].upper()],
        caches, data["name"], data["parameters"],
    )  # fmt: skip
    return _Loader(program, data).run()


# --- writing ----------------------------------------------------------------------------------------


def _node(node: fx.Node, places: dict[tuple[str, ...], int]) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"name": node.name, "input": node.target}
    place = (module_path(node), *source_line(node))
    found: dict[str, Any] = {
        "name": node.name,
        "op": _target(node.target),
        "args": [_encode(a) for a in node.args],
        "at": places.setdefault(place, len(places)),
    }
    if node.kwargs:
        found["kwargs"] = {k: _encode(a) for k, a in node.kwargs.items()}
    return found


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = next((n for n, f in _OPERATORS.items() if f is target), None)
    if name is None:
        raise ValueError(f"a call of {target!r} cannot be written down")
    return name


def _encode(value: Any) -> Any:
    match value:
        case fx.Node(op="get_attr"):
            return {"weight": value.target}
        case fx.Node():
            return {"node": value.name}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case torch.device():
            return {"device": str(value)}
        case tuple():
            return {"tuple": [_encode(v) for v in value]}
        case list():
            return [_encode(v) for v in value]
    if (kind := _CONSTANTS.get(type(value))) is not None:
        return {kind: str(value).removeprefix("torch.")}
    raise ValueError(f"an argument {value!r} cannot be written down")


# --- reading ----------------------------------------------------------------------------------------


class _Loader:
    """Adds the nodes of a dumped program to an empty one."""

    def __init__(self, program: Program, data: Mapping[str, Any]) -> None:
        self._program = program
        self._data = data
        self._values: dict[str, fx.Node] = {}
        self._weights: dict[str, fx.Node] = {}
        self._inputs = _inputs(program)

    def run(self) -> Program:
        program = self._program
        for fact in self._data["nodes"]:
            if "input" in fact:
                node = program.graph.create_node("placeholder", fact["input"], name=fact["name"])
                node.meta["val"] = self._inputs[fact["input"]]
            else:
                node = self._call(fact)
            self._values[fact["name"]] = node
        program.graph.output(self._decode(self._data["output"]))
        return program

    def _call(self, fact: Mapping[str, Any]) -> fx.Node:
        args = tuple(self._decode(a) for a in fact["args"])
        kwargs = {k: self._decode(a) for k, a in fact.get("kwargs", {}).items()}
        graph = self._program.graph
        node = graph.create_node("call_function", _function(fact["op"]), args, kwargs, fact["name"])
        node.meta["val"] = self._program.infer(node)
        path, file, code = self._data["places"][fact["at"]]
        node.meta["nn_module_stack"] = {"": (f"model.{path}" if path else "", None)}
        node.meta["stack_trace"] = f"  {file}\n    {code}" if file else ""
        return node

    def _decode(self, value: Any) -> Any:
        match value:
            case {"node": name}:
                return self._values[name]
            case {"weight": name}:
                if name not in self._weights:
                    self._weights[name] = self._program.weight(name)
                return self._weights[name]
            case {"tuple": items}:
                return tuple(self._decode(v) for v in items)
            case {"float": text}:
                return float(text)
            case {"device": text}:
                return torch.device(text)
            case {"dtype": name} | {"layout": name} | {"memory_format": name}:
                return getattr(torch, name)
            case list():
                return [self._decode(v) for v in value]
        return value


def _inputs(program: Program) -> dict[str, Tensor]:
    """Fake tensors of all inputs that a program can have; tokens and rows share a symbol."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC])
    example = torch.zeros(1, 7, dtype=torch.int64)
    ids = mode.from_tensor(example, symbolic_context=dynamic)
    tokens = ids.shape[1]

    def fake(*shape: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype)

    return {
        "ids": ids,
        "positions": fake(1, tokens, dtype=torch.int64),
        "rows": fake(tokens, dtype=torch.int64),
        "starts": fake(2),
        "block_table": fake(1, 1),
        **{s.name: fake(1, kv.PAGE, s.row_bytes, dtype=torch.uint8) for s in program.caches},
    }


def _function(name: str) -> Any:
    if name in _OPERATORS:
        return _OPERATORS[name]
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"there is no op {name!r}: import the module that registers it")
    return found
