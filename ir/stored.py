"""The weights of a program, out of what its plans store.

A plan keeps a weight under its own name, or under another in the order that its kernels read best
(:mod:`.packing`).  This finds the stored tensor and undoes the order; nothing is computed until it is asked
for, and of a stack one matrix at a time can be had.

>>> q = torch.arange(6, dtype=torch.int8).reshape(2, 3)
>>> panels = packing.pack_part("q", q, quant.parse("int8"), 2)
>>> use = Use("q", "int8", n=2, k=3)
>>> find("w", q.to("meta"), use, {"w.panels": panels}).whole().tolist()
[[0, 1, 2], [3, 4, 5]]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from . import packing, quant, serialize
from .program import Program, Weights, shape

mill = torch.ops.tokenmill


def panels(parts: int, turned: bool) -> str:
    """What is added to the name of a weight in the order of a CPU."""
    return "turned" if turned else "panels" if parts == 1 else f"panels{parts}"


HALVES = "halves"  # and of INT4 in that of a GPU


def over(row: tuple[int, ...]) -> str:
    """What is added to the name of a weight that is broadcast over rows of this shape."""
    return f"over{list(row)}"


def renamed(name: str) -> str:
    """Where a weight is whose name an input or a cache has."""
    return f"weight.{name}"


@dataclass(frozen=True)
class Use:
    """One part of a matrix of ``parts`` times ``n`` rows and ``k`` inputs that a kernel multiplies with.

    ``turned`` where it is read by columns: then ``n`` and ``k`` are those of the transposed matrix.
    """

    part: str
    format: str
    n: int
    k: int
    parts: int = 1
    turned: bool = False

    def unpack(self, stored: Tensor) -> Tensor:
        """The part as :mod:`.quant` has it, of one in the order of a CPU."""
        fmt = quant.parse(self.format)
        found = packing.unpack({self.part: stored}, fmt, self.n, self.k, self.parts)[self.part]
        return found.mT.contiguous() if self.turned else found


@dataclass(frozen=True)
class Reader:
    """Yields a weight, or one matrix of a stack."""

    whole: Callable[[], Tensor]
    member: Callable[[int], Tensor]


def load(data: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Program:
    """The program that :func:`.serialize.dump` wrote, over the tensors that its plans store.

    Raises ValueError for a weight that is not among them, and what :func:`.serialize.load` raises.
    """
    weights, readers = Weights({}), dict[str, Reader]()

    def later(name: str, like: Tensor) -> None:
        weights.read(name, like, lambda: readers[name].whole(), lambda i: readers[name].member(i))

    for name, like in serialize.likes(data).items():
        later(name, like)
    program = serialize.load(data, weights)
    known = uses(program.graph)
    for name in weights:
        reader = find(name, weights.like(name), known.get(name), stored)
        if reader is None:
            raise ValueError(f"weight {name!r} is not among those that are stored")
        readers[name] = reader
    return program


def uses(graph: fx.Graph) -> dict[str, Use]:
    """How kernels of ours read the weights of a graph, by name."""
    found: dict[str, Use] = {}

    def matrix(
        weight: list[fx.Node], format: str, k: int, parts: int = 1, turned: bool = False
    ) -> None:
        rows = shape(weight[0])[-2] // parts
        for part, node in zip(quant.parse(format).parts, weight, strict=True):
            if turned and part == "scale":
                continue
            n, inputs = (k, rows) if turned else (rows, k)
            found[node.target] = Use("w" if turned else part, format, n, inputs, parts, turned)

    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet is mill.linear:
            x, weight, _, _, format, parts, _ = node.args
            matrix(weight, format, shape(x)[-1], parts)
        elif packet is mill.experts:
            x, _, _, up, down, _, up_format, down_format, _, gated = node.args
            parts = 2 if gated else 1
            matrix(up, up_format, shape(x)[-1], parts)
            matrix(down, down_format, shape(up[0])[-2] // parts)
        elif packet is mill.cached_latent_attention:
            latent, w_uk, w_uv, format = node.args[1], node.args[3], node.args[4], node.args[9]
            matrix(w_uk, format, shape(latent)[-1], turned=True)
            matrix(w_uv, format, shape(latent)[-1])
    return found


def find(name: str, like: Tensor, use: Use | None, stored: Mapping[str, Tensor]) -> Reader | None:
    """The reader of a weight among the stored tensors; None if it is not there."""
    if (plain := stored.get(name, stored.get(renamed(name)))) is not None:
        return _reader(plain, lambda x: x)
    if use is not None:
        if (packed := stored.get(f"{name}.{panels(use.parts, use.turned)}")) is not None:
            return _reader(packed, use.unpack)
        if (packed := stored.get(f"{name}.{HALVES}")) is not None:
            return _reader(packed, lambda x: packing.unpack_halves(x, use.k))
    prefix = f"{name}.over"
    spread = next((n for n in stored if n.startswith(f"{prefix}[")), None)
    if spread is None:
        return None
    row = tuple(json.loads(spread.removeprefix(prefix)))
    return _reader(stored[spread], lambda x: _narrowed(x, row, tuple(like.shape)))


def _reader(stored: Tensor, undo: Callable[[Tensor], Tensor]) -> Reader:
    return Reader(lambda: undo(stored), lambda i: undo(stored[i]))


def _narrowed(values: Tensor, row: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """The weight of ``sizes`` that was broadcast to ``values [prod(row)]``."""
    inner = (1,) * (len(row) - len(sizes)) + sizes[max(len(sizes) - len(row), 0) :]
    at: Any = tuple(slice(0, 1) if size == 1 else slice(None) for size in inner)
    assert values.shape == (prod(row),)
    return values.reshape(row)[at].reshape(sizes)
