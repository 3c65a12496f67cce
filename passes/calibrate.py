"""Rounding that knows its inputs: stored numbers are chosen so that outputs change least on a text.

The graph stays as :mod:`.quantize` left it; only the values of the parts change.  Nodes are executed one by
one, each over the whole text, so that every weight is rounded for the inputs that the weights before it,
rounded already, give it; and a weight is in memory only while its node is at work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import getitem
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..errors import Unsupported
from ..ir import cache as kv
from ..ir import expr, quant
from ..ir.program import Program, is_weight, where
from .base import Pass, ancestors, is_call, mill
from .rounding import clip, gptq
from .weight_slots import slots
from .workspace import Workspace

FEWEST_ROWS = 32  # an expert that saw fewer is rounded to the nearest
SAVE_SECONDS = 120.0  # of work that a kill may cost at most, beside the node that it interrupts

Parts = dict[str, Tensor]


class Stored(NamedTuple):
    """A weight that a node reads in a format: its argument, its name, and the names of its parts."""

    at: int
    name: str
    format: quant.Format
    parts: tuple[str, ...]


@dataclass
class Calibrate(Pass):
    """dequantize(nearest W) => dequantize(Q), Q = argmin |x W^T - x Q^T| over the x that a text gives

    ``text`` holds token ids, one tensor ``[T]`` per sequence.  Results go through ``workspace`` if there is
    one, and stay in memory otherwise.  ``progress`` hears how much memory it will take, and then how many of
    how many weights are done.
    """

    text: Sequence[Tensor] = ()
    rounding: Literal["clip", "gptq"] = "gptq"
    workspace: Workspace | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    rounded: list[str] = field(default_factory=list, init=False)
    starved: list[str] = field(default_factory=list, init=False)

    name = "calibrate"
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program) -> int:
        sites = find_sites(program)
        total = sum(map(len, sites.values()))
        walk = Walk(program, self.text, sites)
        held = peak_bytes(program, sum(map(len, self.text)))
        label = f"calibrate, in {held / 1e9:.1f} GB"
        self.progress(label, 0, total)
        self._go_on(program, walk, sites)
        saved = time.monotonic()
        for node in walk:
            if self.workspace and time.monotonic() - saved > SAVE_SECONDS:
                self.workspace.save_state(node.name, walk.state())
                saved = time.monotonic()
            if node in sites:
                work = self._experts if is_call(node, mill.experts) else self._linear
                work(program, walk, node, sites[node])
                self.progress(label, len(self.rounded), total)
        return len(self.rounded)

    @property
    def notes(self) -> list[str]:
        tokens = sum(map(len, self.text))
        how = {"gptq": "by GPTQ", "clip": "to the nearest, clipped"}[self.rounding]
        return [f"{len(self.rounded)} weights rounded {how}, on {tokens:,} tokens", *self.starved]

    def _go_on(self, program: Program, walk: Walk, sites: dict[fx.Node, dict[int, Stored]]) -> None:
        """Take up the work where it was left, if it was begun."""
        state = self.workspace and self.workspace.load_state()
        if not state:
            return
        for node in walk.skip_to(*state):
            for stored in sites.get(node, {}).values():
                self._settle(program, stored)

    def _linear(
        self, program: Program, walk: Walk, node: fx.Node, weights: dict[int, Stored]
    ) -> None:
        (stored,) = weights.values()
        if self.workspace is not None and self.workspace.has(stored.name):
            return self._settle(program, stored)
        rows = (x.flatten(0, -2) for x in walk.values[node.args[0]])
        w = program.weights[stored.name]
        parts = self._round(where(node), w, hessian(rows), stored.format)
        self._settle(program, stored, parts)

    def _experts(
        self, program: Program, walk: Walk, node: fx.Node, weights: dict[int, Stored]
    ) -> None:
        """Every expert by the tokens that are sent to it, each with its share in the result."""
        x, ids, shares = (
            torch.cat([v.flatten(0, -2) for v in walk.values[a]]) for a in node.args[:3]
        )
        residual, _, _, activation, gated, *biases = node.args[5:]
        add_up, add_down = (program.weights[b.target] for b in biases) if biases else (None, None)
        up, down = (self._matrices(program, walk, node, at, weights.get(at)) for at in (3, 4))
        out, starved = torch.zeros_like(x), 0
        for e in range(up.count):
            token, slot = (ids == e).nonzero(as_tuple=True)
            rows, share = x[token], shares[token, slot][:, None]
            starved += len(rows) < FEWEST_ROWS
            bias = None if add_up is None else add_up[e]
            acc = F.linear(rows, up.rounded(e, rows, share), bias).chunk(2 if gated else 1, -1)
            mid = expr.evaluate(expr.parse(activation), {f"acc{i}": a for i, a in enumerate(acc)})
            bias = None if add_down is None else add_down[e]
            out.index_add_(0, token, F.linear(mid, down.rounded(e, mid, share), bias) * share)
        if starved:
            self.starved.append(
                f"{starved} of {up.count} experts of {weights[min(weights)].name} saw fewer "
                f"than {FEWEST_ROWS} tokens: rounded to the nearest"
            )
        for weight in (up, down):
            if weight.stored is not None:
                self._settle(program, weight.stored, weight.stacked())
        walk.give(node, out, residual)

    def _matrices(
        self, program: Program, walk: Walk, node: fx.Node, at: int, stored: Stored | None
    ) -> _Matrices:
        (weight,) = node.args[at]
        count = len(weight.meta["val"])
        if stored is None:
            return _Matrices(walk.weight(weight).__getitem__, count)
        matrix, work = program.weights.matrices(stored.name), partial(self._round, where(node))
        found = _Matrices(matrix, count, stored, work)
        if self.workspace is not None and self.workspace.has(stored.name):
            together = {p: self.workspace.get(stored.name, p) for p in stored.format.parts}
            found.parts = [{p: t[e] for p, t in together.items()} for e in range(count)]
        return found

    def _round(self, place: str, w: Tensor, hessian: Tensor, format: quant.Format) -> Parts:
        if not hessian.isfinite().all():
            raise Unsupported(
                reason="the model computes NaN or Inf on the calibration text",
                where=place,
                advice="calibrate with another text, or use rounding: rtn",
            )
        if self.rounding == "clip":
            return clip(w, hessian.diagonal(), format)
        return gptq(w, hessian, format)

    def _settle(self, program: Program, stored: Stored, parts: Parts | None = None) -> None:
        """Let the program read these parts, or those that were kept."""
        read: Callable[[str], Tensor]
        if self.workspace is not None:
            if parts is not None:
                self.workspace.keep(stored.name, parts)
            read = partial(self.workspace.get, stored.name)
        else:
            read = partial(getitem, parts)
        for part, name in zip(stored.format.parts, stored.parts, strict=True):
            program.weights.settle(name, partial(read, part))
        self.rounded.append(stored.name)


@dataclass
class _Matrices:
    """One weight ``[E, N, K]`` of an experts block; ``stored`` is None where it is not rounded."""

    matrix: Callable[[int], Tensor]
    count: int
    stored: Stored | None = None
    round: Callable[[Tensor, Tensor, quant.Format], Parts] | None = None
    parts: list[Parts] = field(default_factory=list)

    def rounded(self, e: int, inputs: Tensor, share: Tensor) -> Tensor:
        """Matrix ``e`` as it will be read, for its inputs ``[T, K]`` and their shares ``[T, 1]`` in results.

        To be called for one expert after the other.
        """
        if self.stored is None or self.round is None:
            return self.matrix(e)
        format = self.stored.format
        if e == len(self.parts):
            w = self.matrix(e)
            if len(inputs) < FEWEST_ROWS:
                self.parts.append(quant.quantize(w, format))
            else:
                self.parts.append(self.round(w, hessian([inputs * share]), format))
        return quant.dequantize(self.parts[e], format, inputs.shape[-1])

    def stacked(self) -> Parts:
        return {part: torch.stack([p[part] for p in self.parts]) for part in self.parts[0]}


def find_sites(program: Program) -> dict[fx.Node, dict[int, Stored]]:
    """Linear maps and experts whose weights are stored in integers or E4M3, by argument; a weight that two
    nodes read belongs to the first, and parts that came with the checkpoint stay as they are.
    """
    sites: dict[fx.Node, dict[int, Stored]] = {}
    seen: set[str] = set()
    for slot in slots(program):
        if not is_call(slot.node, mill.linear, mill.experts):
            continue
        for at, (weight, *_) in zip(slot.weights_at, slot.weights, strict=True):
            stored = _stored(program, at, weight)
            if stored is not None and stored.name not in seen:
                seen.add(stored.name)
                sites.setdefault(slot.node, {})[at] = stored
    return sites


def _stored(program: Program, at: int, weight: fx.Node) -> Stored | None:
    if not is_call(weight, mill.dequantize):
        return None
    format = quant.parse(weight.args[1])
    parts = tuple(part.target for part in weight.args[0])
    sources = program.weights.sources(parts[0])
    if format.bits >= 16 or not sources:
        return None
    return Stored(at, sources[0], format, parts)


def hessian(rows: Iterable[Tensor]) -> Tensor:
    """``sum x^T x`` over blocks of rows ``x [T, K]``."""
    return reduce(Tensor.add_, (x.T @ x for x in rows))


def peak_bytes(program: Program, tokens: int) -> int:
    """About how much memory calibrating on so many tokens takes: values between nodes, and at its worst node
    weights in fp32, the Hessian and its factors, and what an experts block gathers.
    """
    sites = find_sites(program)
    walk = Walk(program, (), sites)
    live: dict[fx.Node, int] = {}
    worst = 0
    for node in walk.nodes:
        if node.op != "placeholder":  # ids are small, and a cache is alive at one node only
            live[node] = _value_bytes(node.meta["val"], tokens)
        worst = max(
            worst,
            sum(live.values()) + _work_bytes(program, sites.get(node, {}).values(), node, tokens),
        )
        for dead in walk.dying(node):
            live.pop(dead, None)
    return worst


def _value_bytes(value: Any, tokens: int) -> int:
    if isinstance(value, tuple | list):
        return sum(_value_bytes(v, tokens) for v in value)
    if not isinstance(value, Tensor):
        return 0
    sizes = (int(s) if isinstance(s, int) else tokens for s in value.shape)
    return math.prod(sizes) * value.element_size()


def _work_bytes(program: Program, weights: Iterable[Stored], node: fx.Node, tokens: int) -> int:
    worst, packed = 0, 0
    for stored in weights:
        *stack, n, k = program.weights.like(stored.name).shape
        packed += math.prod(stack) * stored.format.bytes(n, k)
        # The matrix, what is left of it, its rounded twin and divisors; H, its copy in order, three factors.
        worst = max(worst, 4 * (4 * n * k + 5 * k * k))
    experts = is_call(node, mill.experts)
    gathered = 3 * _value_bytes(node.args[0].meta["val"], tokens) if experts else 0
    return worst + packed + gathered


# --- executing node by node -------------------------------------------------------------------------


class Walk:
    """Executes what ``sites`` need, node by node, each over all sequences of a text.

    Iterating yields a node before it is executed, with its inputs in ``values``: one value per sequence.
    """

    def __init__(
        self, program: Program, text: Sequence[Tensor], sites: Collection[fx.Node]
    ) -> None:
        self.program = program
        self.text = [ids.reshape(-1) for ids in text]
        self.values: dict[fx.Node, list[Any]] = {}
        self._executed = {
            n for site in sites for a in site.all_input_nodes for n in ancestors(a, lambda _: False)
        }
        self.nodes = [
            n
            for n in program.graph.nodes
            if (n in self._executed or n in sites) and not _reads_weight(n)
        ]
        self._next = 0
        last = {used: node for node in self.nodes for used in node.all_input_nodes}
        self._dying: dict[fx.Node, list[fx.Node]] = {}
        for used, node in last.items():
            self._dying.setdefault(node, []).append(used)

    def __iter__(self) -> Iterator[fx.Node]:
        with torch.no_grad():
            while self._next < len(self.nodes):
                node = self.nodes[self._next]
                yield node
                if node in self._executed and node not in self.values:
                    self.values[node] = self._execute(node)
                for dead in self.dying(node):
                    self.values.pop(dead, None)
                self._next += 1

    def dying(self, node: fx.Node) -> Sequence[fx.Node]:
        """What no node after this one needs."""
        return self._dying.get(node, ())

    def state(self) -> dict[str, list[Any]]:
        """What the nodes to come need of those before, by name."""
        return {n.name: v for n, v in self.values.items() if n.op != "placeholder"}

    def skip_to(self, name: str, state: dict[str, list[Any]]) -> Iterator[fx.Node]:
        """Go on at the node ``name`` with a state of then; yields the nodes that are skipped."""
        while (node := self.nodes[self._next]).name != name:
            if node.op == "placeholder" and node not in self.values:
                self._place_inputs()
            elif node.name in state:
                self.values[node] = state[node.name]
            self._next += 1
            yield node

    def give(self, node: fx.Node, rows: Tensor, residual: fx.Node | None) -> None:
        """Set the result of a node that was executed elsewhere: the rows of all sequences, in turn."""
        like = self.values[node.args[0]]
        results = rows.split([x.numel() // x.shape[-1] for x in like])
        self.values[node] = [r.view_as(x) for r, x in zip(results, like, strict=True)]
        if residual is not None:
            pairs = zip(self.values[node], self.values[residual], strict=True)
            self.values[node] = [a + b for a, b in pairs]

    def weight(self, node: fx.Node) -> Tensor:
        """The numbers that a weight's node stands for."""
        if node.op == "get_attr":
            return self.program.weights[node.target]
        parts = [self.program.weights[part.target] for part in node.args[0]]
        value: Tensor = node.target(parts, *node.args[1:])
        return value

    def _execute(self, node: fx.Node) -> list[Any]:
        if node.op == "placeholder":
            self._place_inputs()
            return self.values[node]
        weights = {n: self.weight(n) for n in node.all_input_nodes if _reads_weight(n)}
        results = []
        for i in range(len(self.text)):
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs),
                lambda n, i=i: weights[n] if n in weights else self.values[n][i],
            )
            results.append(node.target(*args, **kwargs))
        return results

    def _place_inputs(self) -> None:
        """The values of all placeholders, which come before any other node."""
        each = [
            self.program.inputs(ids, kv.single_sequence(len(ids)), torch.arange(len(ids)))
            for ids in self.text
        ]
        for node in self.nodes:
            if node.op == "placeholder":
                self.values[node] = [inputs[node.target] for inputs in each]


def _reads_weight(node: fx.Node) -> bool:
    return is_weight(node) or is_call(node, mill.dequantize)
