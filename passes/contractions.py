"""Products of two tensors, whatever they are called: one reading for matmul, bmm, mm and einsum."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ir.program import shape
from .base import aten, is_call


@dataclass(frozen=True)
class Contraction:
    """``out = sum(left * right)`` in the letters of einsum, a letter for every dim of each operand.

    A dim of size 1 that broadcasts has a letter of its own.
    """

    left: fx.Node
    right: fx.Node
    left_dims: str
    right_dims: str
    out_dims: str

    @classmethod
    def read(cls, node: Any) -> Contraction | None:
        if is_call(node, aten.mm):
            left, right = node.args[:2]
            return cls(left, right, "ab", "bc", "ac")
        if is_call(node, aten.bmm):
            left, right = node.args[:2]
            return cls(left, right, "abc", "acd", "abd")
        if is_call(node, aten.matmul):
            return _matmul(node)
        if is_call(node, aten.einsum) and len(node.args[1]) == 2:
            return _einsum(node)
        return None

    def turned(self) -> Contraction:
        """The same with the operands in the other order."""
        return Contraction(self.right, self.left, self.right_dims, self.left_dims, self.out_dims)

    @property
    def sizes(self) -> dict[str, Any]:
        """Per letter the dim's size."""
        pairs = [*zip(self.right_dims, shape(self.right), strict=True)]
        return dict([*pairs, *zip(self.left_dims, shape(self.left), strict=True)])

    @property
    def summed(self) -> list[str]:
        """Letters that are summed over, those of size 1 not among them."""
        sizes = self.sizes
        gone = dict.fromkeys(c for c in self.left_dims + self.right_dims if c not in self.out_dims)
        return [c for c in gone if not (isinstance(sizes[c], int) and sizes[c] == 1)]


def _matmul(node: fx.Node) -> Contraction | None:
    left, right = node.args[:2]
    ranks = len(shape(left)), len(shape(right))
    if min(ranks) < 2:
        return None
    fresh = iter(string.ascii_uppercase)
    batch = string.ascii_lowercase[3 : 3 + max(ranks) - 2]

    def dims(operand: fx.Node, last: str) -> str:
        own = shape(operand)[:-2]
        names = batch[len(batch) - len(own) :]
        out = shape(node)[len(batch) - len(own) : len(batch)]
        lone = [str(s) == "1" and str(o) != "1" for s, o in zip(own, out, strict=True)]
        return "".join(next(fresh) if one else c for c, one in zip(names, lone, strict=True)) + last

    return Contraction(left, right, dims(left, "ab"), dims(right, "bc"), batch + "ac")


def _einsum(node: fx.Node) -> Contraction | None:
    equation, operands = node.args[:2]
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        return None
    free = [c for c in string.ascii_letters if c not in equation]
    for i, term in enumerate(terms):
        rest = len(shape(operands[i])) - len(term.replace("...", ""))
        terms[i] = term.replace("...", "".join(free[:rest][::-1]))
    rest = len(shape(node)) - len(out.replace("...", ""))
    out = out.replace("...", "".join(free[:rest][::-1]))
    if any(len(set(term)) < len(term) for term in terms):
        return None
    return Contraction(operands[0], operands[1], terms[0], terms[1], out)
