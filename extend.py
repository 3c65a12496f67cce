"""Passes, patterns, kernels and formats of your own, from outside the package.

=====================  ===================================================  ========================
what                   how it is written                                    how a recipe asks for it
=====================  ===================================================  ========================
a pass                 a subclass of :class:`Pass`                          ``passes``
a rewrite by example   a subclass of :class:`Pattern`                       ``passes``
a kernel               an op in torch, its body in C++ (and Triton), given  ``extensions``
                       to :func:`kernel`
a weight format        a :class:`Codebook` given to                         ``extensions``, and its name
                       :func:`register_format`                              as a format
=====================  ===================================================  ========================

In a recipe file, with modules that Python can import (PYTHONPATH)::

    extensions: [my_format, my_kernel]
    passes: [{use: "my_pass:DropDeadHeads", before: quantize, options: {threshold: 0.01}}]
    rules: [{match: "role:expert", format: nf4}]

In Python, :func:`use` says the second line.  Nothing is imported that a recipe does not name.  A pass of
yours is checked (``--check``), timed and reported like any other.  ``examples/extend`` has one of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import recipe
from .codegen.custom import TEMPLATES, Template, Templates
from .errors import BadExtension
from .ir import ops, quant
from .ir.plan import Custom, Shaped
from .ir.program import Program, Stage, is_weight, shape
from .ir.quant import Codebook
from .passes.base import Pass, aten, calls, is_call, mill, replace, sweep
from .passes.pattern import Pattern
from .recipe import UserPass

__all__ = [
    "Codebook", "Custom", "Pass", "Pattern", "Program", "Shaped", "Stage", "UserPass", "aten", "calls",
    "check", "is_call", "is_weight", "kernel", "mill", "register_format", "replace", "shape", "sweep", "use",
]  # fmt: skip

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def use(
    kind: type[Pass], *, before: str | None = None, after: str | None = None, **options: Any
) -> UserPass:
    """An entry of a recipe's ``passes``: a pass beside the one of that name; ``options`` are its fields."""
    name = f"{kind.__module__}:{kind.__qualname__}"
    return UserPass(use=name, before=before, after=after, options=options)


def register_format(book: Codebook) -> Codebook:
    """Let recipes name a weight format; its name stands for it in every artifact.

    It serves experts and linear maps, the head included.  On a CPU codes are decoded while weights are
    multiplied, in fp32: slower than the formats that come with tokenmill.  For GPUs codes are written as
    the bf16 numbers that they stand for: what is lost is the format's, what is stored is bf16's.  A search
    within a budget does not try it, but takes it where a rule does.

    Raises BadExtension for a name that is taken or ill-formed.
    """
    if not _NAME.fullmatch(book.name) or book.name == "int4":
        raise BadExtension(
            name=book.name, reason="that cannot be a format's name",
            advice="use small letters, digits and single dashes, such as nf4-g64",
        )  # fmt: skip
    try:
        quant.register(book)
    except ValueError as error:
        advice = "choose another name"
        raise BadExtension(name=book.name, reason=str(error), advice=advice) from error
    recipe.add_format(book.name)
    return book


def kernel(
    schema: str,
    *,
    cpp: Template = "",
    triton: Template = "",
    shape: Callable[..., Tensor] | None = None,
) -> Callable[[Callable[..., Tensor]], Any]:
    """Declare an op with a kernel: decorates the op's reference, and returns the op, ``tokenmill::NAME``.

    ``schema`` is in torch's language: ``scale_rows(Tensor x, Tensor weight, float eps) -> Tensor``.
    Tensors are activations ``[..., F]``, of which the op must treat every row (token) by itself, or
    weights, which come whole; one fp32 tensor comes out, with as many rows.  ``shape`` says its shape on
    fake tensors; left out, the reference does.

    A template is the body of a kernel, or a function that writes it for a :class:`Custom` spec.  Both see the
    constants ``X_WIDTH`` (numbers per row of the operand ``x``), ``X_LAST`` (its last dim) and attributes in
    capitals (``EPS``).

    - ``cpp``: ``x[r]`` is row ``r`` of an activation, a weight is a pointer, ``out`` the result; rows from
      ``th.share(rows, 0)`` to ``th.share(rows, 1)`` are the thread's own.  Vectors ``vf`` of ``LANES`` floats
      and their functions are those of ``codegen/cpp/simd.h``.
    - ``triton``: one ``row`` per program, at ``x_ptr + row * X_PITCH``; a weight is at ``weight_ptr``;
      ``cols`` counts to a power of two that covers the widest row.  Loaded numbers are to be cast to fp32,
      stored ones by ``to(value, out_ptr)``.

    Use the op in a model, or let a :class:`Pattern` put it where a graph computes the same.  :func:`check`
    compares the kernel with the reference.  Raises BadExtension for a name that is taken, or a bad schema.
    """
    name = schema.split("(")[0].strip()

    def declare(reference: Callable[..., Tensor]) -> Any:
        known = ops.OPS.get(name)
        templates = Templates(cpp, triton)
        if known is not None and (known.schema, TEMPLATES.get(name)) != (schema, templates):
            reason = "there is an op of this name already"
            raise BadExtension(name=name, reason=reason, advice="choose another name")
        if known is None:
            _declare(name, schema, reference, shape)
            TEMPLATES[name] = templates
        return getattr(torch.ops.tokenmill, name)

    return declare


def _declare(
    name: str, schema: str, reference: Callable[..., Tensor], shape: Callable[..., Tensor] | None
) -> None:
    try:
        parsed = torch._C.parse_schema(schema)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        advice = "write it like scale(Tensor x, float factor) -> Tensor"
        raise BadExtension(name=name, reason=reason, advice=advice) from error
    taken = {"out", "rows", "row", "cols", "th"} & {a.name for a in parsed.arguments}
    if taken or [str(r.type) for r in parsed.returns] != ["Tensor"] or not _NAME.fullmatch(name):
        raise BadExtension(
            name=name, reason=f"the schema {schema!r} does not fit a kernel",
            advice="its name is of small letters, it yields one Tensor, and no argument is called out, row, "
            "rows, cols or th",
        )  # fmt: skip
    ops.op(schema, shape or reference, custom=True)(reference)


def check(op: Any, *arguments: Any, target: str = "cpu") -> float:
    """Compile and run an op's kernel on ``target``, a CPU; the relative error next to its reference.

    Arguments are as the op takes them: tensors are activations, their first dim counting rows, and
    ``nn.Parameter`` weights::

        error = check(scale_rows, torch.randn(5, 48), nn.Parameter(torch.ones(48)), 1e-6)
    """
    import tempfile

    from . import api
    from .runtime import Session

    probe = _Probe(op, arguments)
    rows = len(next(x for x in probe.activations if x is not None))
    own = recipe.Recipe(
        weights="fp32", kv="fp32", targets=[target], max_step_tokens=rows, max_step_rows=rows
    )
    with tempfile.TemporaryDirectory() as directory:
        api.optimize(probe, f"{directory}/probe", recipe=own, max_positions=max(rows, 8))
        with Session(f"{directory}/probe", device="cpu") as session:
            got = torch.from_numpy(session.logits(list(range(rows))))
    with torch.no_grad():
        wanted = op(*arguments).reshape(rows, -1)
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


class _Probe(nn.Module):
    """A model whose logits are an op of rows that ids look up."""

    def __init__(self, op: Any, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.op = op
        self.arguments = list(arguments)
        self.activations = [
            x if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else None
            for x in arguments
        ]
        for i, x in enumerate(arguments):
            if self.activations[i] is not None:
                self.register_parameter(f"table{i}", nn.Parameter(x.reshape(len(x), -1)))
            elif isinstance(x, nn.Parameter):
                self.register_parameter(f"weight{i}", x)

    def forward(self, ids: Tensor) -> Tensor:
        given = []
        for i, x in enumerate(self.arguments):
            if self.activations[i] is not None:
                rows = nn.functional.embedding(ids, getattr(self, f"table{i}"))
                given.append(rows.reshape(*ids.shape, *x.shape[1:]))
            else:
                given.append(getattr(self, f"weight{i}", x))
        return self.op(*given).flatten(2)
