"""Kernels that work on every row by itself: as launches of their own, and as links of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import indent

from ..text import call as lines
from ..text import fill


@dataclass(frozen=True)
class RowKernel:
    """A device function of a row and a block of its columns or heads.

    ``body`` says what it does with ``row`` (int64), ``block``, the ``pointers`` and the ``constants``.
    """

    about: str
    pointers: tuple[str, ...]
    constants: tuple[str, ...]
    body: str


def emit(name: str, kernel: RowKernel) -> str:
    """The function ``NAME_row``, and a kernel that launches a program for every row and block."""
    given = [*kernel.pointers, *kernel.constants]
    launched = fill(
        KERNEL,
        symbol=name,
        pointers=parameters([*kernel.pointers, "count_ptr"]),
        constants=parameters(kernel.constants, CONSTANT),
        call=call(f"{name}_row", ["row", "tl.program_id(1)", *given]),
    )
    return "\n\n".join([function(name, kernel), launched])


def function(name: str, kernel: RowKernel) -> str:
    return fill(
        FUNCTION,
        symbol=name,
        about=kernel.about,
        pointers=parameters(["row", "block", *kernel.pointers]),
        constants=parameters(kernel.constants, CONSTANT),
        body=kernel.body.strip("\n"),
    )


CONSTANT = "{}: tl.constexpr"


def parameters(names: Sequence[str], form: str = "{}") -> str:
    """Names of parameters, in lines that end with commas."""
    return lines("", [form.format(name) for name in names], ",", 4)


def call(function: str, given: Sequence[str]) -> str:
    """A call in lines."""
    return f"{function}(\n{indent(parameters(given), '    ')}\n)"


FUNCTION = '''
@triton.jit
def ${symbol}_row(
    $pointers
    $constants
):
    """$about"""
    $body
'''
KERNEL = '''
@triton.jit
def $symbol(
    $pointers
    $constants
):
    """``${symbol}_row`` of every row and block."""
    wait_for_launches()
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(count_ptr):
        $call
'''
