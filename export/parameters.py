"""What an artifact keeps about its checkpoint, so that one can be made of it again.

``source/parameters.json``: the tensors that the checkpoint's files held, and of each stored weight the rows
of these tensors that its rows hold, in the order in which they stand there.  ``made`` says the same of
tensors that passes put in the place of others, and that no file held.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx

from ..capture.shards import Source
from ..ir import quant
from ..ir.program import Program, Weights
from ..ir.provenance import ZEROS, Rows, compose, trace
from ..ir.serialize import DTYPES
from ..passes.weight_slots import role, slots

FILE = "source/parameters.json"
VERSION = 1


class Use(NamedTuple):
    """A weight as it is stored: its name before it had a format, the format, what it is for."""

    name: str
    format: str
    role: str

    @property
    def parts(self) -> dict[str, str]:
        """The names of its parts."""
        if self.format == "fp32":
            return {"w": self.name}
        return {
            part: f"{self.name}.{self.format}.{part}" for part in quant.parse(self.format).parts
        }


def uses(program: Program) -> list[Use]:
    """All weights of a finished program, one used for two purposes under both."""
    found: list[Use] = []
    seen: set[fx.Node] = set()
    for slot in slots(program):
        for parts in slot.weights:
            seen.update(parts)
            name = str(parts[0].target)
            if slot.format != "fp32":
                name = name.removesuffix(f".{slot.format}.{quant.parse(slot.format).parts[0]}")
            if (purpose := role(program, slot.node)) is not None:
                found.append(Use(name, slot.format, purpose))
    rest = (n for n in program.graph.nodes if n.op == "get_attr" and n not in seen)
    found += [Use(str(node.target), "fp32", "norm") for node in rest]
    return list(dict.fromkeys(found))


def describe(program: Program, sources: Mapping[str, Source]) -> dict[str, Any]:
    """The content of :data:`FILE`; ``sources`` tell where the parameters of the model were read."""
    stored: list[dict[str, Any]] = []
    computed: dict[str, list[str]] = {}
    made: list[dict[str, Any]] = []
    fresh: dict[str, Tensor] = {}

    def of_files(name: str) -> Rows | None:
        return sources[name].rows() if name in sources else None

    def of_any(name: str) -> Rows | None:
        if name in sources:
            return of_files(name)
        fresh[name] = program.weights.like(name)
        return Rows.whole(name, fresh[name])

    for use in uses(program):
        moved = trace(program.weights, use.name)
        rows = moved and compose(moved, of_files)
        if rows is not None and rows.sources != (ZEROS,):
            stored.append(_stored(program.weights, use, rows))
            continue
        if roots := [r for r in program.weights.roots(use.name) if r in sources]:
            computed[use.name] = roots
        rows = moved and compose(moved, of_any)
        if rows is not None and rows.sources != (ZEROS,):
            made.append(_stored(program.weights, use, rows))
    return {
        "version": VERSION,
        "tensors": _shapes({n: like for s in sources.values() for n, like in s.files.items()}),
        "tied": _tied(sources),
        "stored": stored,
        "computed": computed,
        "made": {"tensors": _shapes(fresh), "stored": made},
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: {"dtype": DTYPES[like.dtype], "shape": list(like.shape)}
        for name, like in tensors.items()
    }


def _stored(weights: Weights, use: Use, rows: Rows) -> dict[str, Any]:
    return (
        use._asdict()
        | {"edited": _is_edited(weights, use.name)}
        | {"rows": [list(run) for run in rows.runs()], "transposed": rows.transposed}
    )


def _is_edited(weights: Weights, name: str) -> bool:
    """Whether a pass changed the numbers, and others so that the model stays."""
    edited = weights.stands_for(name) is not None
    return edited or any(_is_edited(weights, source) for source in weights.sources(name))


def _tied(sources: Mapping[str, Source]) -> dict[str, str]:
    """Parameters that are read where another one is, and the tensor of the files that this is."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, source in sources.items():
        if first.setdefault(id(source), name) != name and len(source.files) == 1:
            (file,) = source.files
            found |= dict.fromkeys({first[id(source)], name} - {file}, file)
    return found
