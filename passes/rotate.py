"""Weights that are easy to round: what passes between linear maps is turned, and so are the maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..ir.program import Program, is_weight, module_path, shape
from ..recipe import Recipe
from .base import Pass, aten, calls, is_call, mill, sweep
from .channels import set_weight, users, weight_at
from .hadamard import turn_bias, turn_columns, turn_rows

_ATTENTION = (mill.attention, mill.cached_attention)
_LATENT = (mill.latent_attention, mill.cached_latent_attention)


@dataclass
class Rotate(Pass):
    """A then B => (Q^T A) then (B Q), for a random rotation Q: no weight and no channel stands out

    Q is folded into the weights that write a value and into those that read it, so nothing more is computed.
    Values are turned together where residual adds, norms over all of their channels, reshapes and attention's
    averages tie them: norm(h) Q = norm(h Q) once the norm's weight is multiplied into its readers.  That
    takes the residual stream, latents behind their norms, and each head's values.  A stream with an op in it
    that does not commute with Q stays as it is, and ``notes`` says why.

    Runs before linear maps are fused, when few kinds of ops touch these values.
    Sources: QuIP# (Tseng et al. 2024), QuaRot (Ashkboos et al. 2024), here without any work at run time.
    """

    recipe: Recipe = field(default_factory=Recipe)
    notes: list[str] = field(default_factory=list, init=False)

    name = "rotate"

    def run(self, program: Program) -> int:
        done: set[fx.Node] = set()
        widths: Counter[int] = Counter()
        self.notes = []
        for seed, block in _seeds(program):
            if seed in done or block < 2:
                continue
            try:
                found = _Class.around(program, seed, block, self.recipe)
            except _NotTurnable as reason:
                if _is_stream(program, seed):
                    self.notes.append(f"the residual stream stays as it is: {reason}")
                continue
            found.apply()
            done |= found.members
            widths[block] += 1
        sweep(program)
        self.notes += [f"turned: {count} of width {width}" for width, count in widths.items()]
        return sum(widths.values())


class _NotTurnable(Exception):
    """Why a value must stay as it is."""

    @classmethod
    def at(cls, node: fx.Node, why: str) -> _NotTurnable:
        return cls(f"{why} at {module_path(node) or node.name}")


def _seeds(program: Program) -> Iterator[tuple[fx.Node, int]]:
    """Values to begin at, with the width of what is turned as one: the stream before its parts."""
    for node in calls(program, mill.embed):
        if _is_stream(program, node):
            yield node, shape(node)[-1]
    for node in calls(program, mill.rms_norm):
        yield node.args[0], shape(node)[-1]
    for node in calls(program, *_ATTENTION, *_LATENT):
        yield node, shape(node)[-1]


def _is_stream(program: Program, node: fx.Node) -> bool:
    return is_call(node, mill.embed) and node.args[1] is program.input("ids")


class _Edit(NamedTuple):
    """A weight among a node's arguments, and what turns it."""

    node: fx.Node
    at: int
    gain: str | None  # the norm's weight that goes into it
    turned: Callable[..., Tensor]

    @property
    def weight(self) -> fx.Node:
        return weight_at(self.node, self.at)

    def apply(self, program: Program) -> None:
        old = str(self.weight.target)
        name = f"{old}.{self.label}"
        if name not in program.weights:
            sources = (old,) if self.gain is None else (old, self.gain)
            program.weights.derive(name, self.turned, *sources, origins=[old])
        set_weight(program, self.node, self.at, name)

    @property
    def label(self) -> str:
        """What the turned weight is called, in any copy of the program."""
        assert isinstance(self.turned, partial)
        how = f"{self.turned.func.__name__}_{self.turned.args[0]}"
        return how if self.gain is None else f"scale_{how}"


class _Class:
    """Values that are turned together, in runs of ``block``, and the weights around them."""

    def __init__(self, program: Program, block: int) -> None:
        self.program, self.block = program, block
        self.members: set[fx.Node] = set()
        self.norms: list[fx.Node] = []
        self.edits: list[_Edit] = []

    @classmethod
    def around(cls, program: Program, seed: fx.Node, block: int, recipe: Recipe) -> _Class:
        """All that is tied to ``seed``; raises _NotTurnable."""
        found, stack = cls(program, block), [seed]
        while stack:
            node = stack.pop()
            if node in found.members:
                continue
            if _last(node) % block:
                raise _NotTurnable.at(node, f"{_name(node)} of width {_last(node)}")
            found.members.add(node)
            stack += found._above(node)
            for user in node.users:
                stack += found._below(node, user)
        found._check_copies(recipe)
        return found

    def _above(self, node: fx.Node) -> list[fx.Node]:
        """What is turned because ``node`` is; weights that write it are noted."""
        if (tied := _tied(node)) is not None:
            if is_call(node, mill.rms_norm):
                if not is_weight(node.args[1]):
                    raise _NotTurnable.at(node, "a norm whose weight is computed")
                self.norms.append(node)
            if not _keeps_gain(node) and any(_gain(n) is not None for n in tied):
                raise _NotTurnable.at(node, f"{_name(node)} of a norm's result")
            return tied
        if is_call(node, aten.linear):
            self._edit(node, 1, turn_rows)
            if len(node.args) > 2 and node.args[2] is not None:
                self._edit(node, 2, turn_bias)
        elif is_call(node, mill.embed):
            self._edit(node, 0, turn_columns)
        elif is_call(node, mill.experts):
            self._edit(node, 4, turn_rows)
            if len(node.args) > 11:
                self._edit(node, 11, turn_bias)
            return [] if node.args[5] is None else [node.args[5]]
        elif is_call(node, *_LATENT):
            self._edit(node, 4, turn_rows)
        else:
            raise _NotTurnable.at(node, f"made by {_name(node)}")
        return []

    def _below(self, value: fx.Node, user: fx.Node) -> list[fx.Node]:
        """The user if it is turned because ``value`` is; weights that read it are noted."""
        tied = _tied(user)
        reads = [i for i, a in enumerate(user.args) if a is value]
        if tied is not None and value in tied:
            # Attention that has the value for its query or key as well would need them unturned.
            if len(reads) == 1 or is_call(user, aten.add, aten.sub):
                return [user]
        elif is_call(user, aten.linear) and reads == [0] and is_weight(user.args[1]):
            self._edit(user, 1, turn_columns, _gain(value))
            return []
        elif is_call(user, mill.experts) and set(reads) <= {0, 5}:
            if 0 in reads:
                self._edit(user, 3, turn_columns, _gain(value))
            if 5 in reads and _gain(value) is not None:
                raise _NotTurnable.at(user, "experts added to a norm's result")
            return [user] if 5 in reads else []
        elif is_call(user, *_LATENT) and reads == [1]:
            for at in (3, 4):
                self._edit(user, at, turn_columns, _gain(value))
            return []
        raise _NotTurnable.at(user, f"read by {_name(user)}")

    def _edit(
        self, node: fx.Node, at: int, how: Callable[..., Tensor], gain: str | None = None
    ) -> None:
        edit = _Edit(node, at, gain, partial(how, self.block))
        if not is_weight(edit.weight):
            raise _NotTurnable.at(node, f"{_name(node)} by a matrix that is computed")
        if gain is not None and _last(edit.weight) % self.program.weights.like(gain).numel():
            raise _NotTurnable.at(node, f"{_name(node)} of parts of what a norm sees")
        self.edits.append(edit)

    def _check_copies(self, recipe: Recipe) -> None:
        """No matrix may be stored once more because its uses now differ."""
        done: dict[tuple[fx.Node, str], list[Any]] = {}
        for edit in self.edits:
            done.setdefault((edit.node, str(edit.weight.target)), []).append(
                (edit.label, edit.gain)
            )
        for name in {name for _, name in done}:
            if self.program.weights.like(name).dim() < 2:
                continue
            tables, maps = set[tuple[Any, ...]](), set[tuple[Any, ...]]()
            for user in users(self.program, name):
                kind = tables if is_call(user, mill.embed) else maps
                kind.add(tuple(done.get((user, name), ())))
            roots = self.program.weights.roots(name)
            apart = recipe.format_for(roots, "embedding") != recipe.format_for(roots, "head")
            if max(len(tables), len(maps)) > 1 or (len(tables | maps) > 1 and not apart):
                raise _NotTurnable(f"the uses of {name} would need two different matrices")

    def apply(self) -> None:
        for edit in self.edits:
            edit.apply(self.program)
        for norm in self.norms:
            old = str(norm.args[1].target)
            if (name := f"{old}.ones") not in self.program.weights:
                self.program.weights.derive(name, torch.ones_like, old, origins=[old])
            set_weight(self.program, norm, 1, name)


def _tied(node: fx.Node) -> list[fx.Node] | None:
    """The inputs that are turned if and only if the node's result is; None if it is no such op."""
    if is_call(node, mill.rms_norm, mill.select_rows, aten.reshape, aten.neg):
        return [node.args[0]]
    if is_call(node, *_ATTENTION):
        return [node.args[2]]
    if is_call(node, aten.add, aten.sub) and not node.kwargs:
        whole = all(isinstance(a, fx.Node) and _last(a) == _last(node) for a in node.args)
        return list(node.args) if whole else None
    if is_call(node, aten.mul, aten.div) and not node.kwargs:
        return _scaled(node)
    return None


def _scaled(node: fx.Node) -> list[fx.Node] | None:
    """What is multiplied by one number, or by one for each row."""
    a, b = node.args
    if _is_scalar(b, node) and isinstance(a, fx.Node):
        return [a]
    if _is_scalar(a, node) and isinstance(b, fx.Node) and is_call(node, aten.mul):
        return [b]
    return None


def _is_scalar(value: Any, node: fx.Node) -> bool:
    return not isinstance(value, fx.Node) or (_last(value) == 1 and _last(node) > 1)


def _keeps_gain(node: fx.Node) -> bool:
    """Whether a norm's weight may be multiplied in after the node as well as before it."""
    return not is_call(node, mill.rms_norm, aten.add, aten.sub, *_ATTENTION)


def _gain(value: fx.Node) -> str | None:
    """The weight of the norm that the value comes from, which its readers take over."""
    while not is_call(value, mill.rms_norm):
        tied = _tied(value)
        if tied is None or not _keeps_gain(value):
            return None
        (value,) = tied
    return str(value.args[1].target)


def _last(node: fx.Node) -> int:
    sizes = shape(node)
    return int(sizes[-1]) if sizes and isinstance(sizes[-1], int) else 1


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).split(".")[-1]
