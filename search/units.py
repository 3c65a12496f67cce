"""What can be chosen: weights that share a format, the formats they may have, and what each costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from torch import fx

from ..ir import quant
from ..ir.program import Program, shape
from ..passes.base import is_call, mill
from ..passes.weight_slots import Slot, role, slots
from ..recipe import Recipe, Role, allowed

CACHE = "cache"  # the role of the unit that stands for the caches of all layers


@dataclass(frozen=True)
class Candidate:
    """One format of a unit.  ``stored`` are its bytes in the artifact, ``held`` in memory, ``read`` those
    that decoding one token reads of it; ``loss`` is what it alone adds, in nats per token.
    """

    format: str
    stored: int
    held: int
    read: float
    loss: float = 0.0


@dataclass(frozen=True)
class Unit:
    """Weights ``names`` of the graph that have one format, from the model's parameters ``originals``.

    Those that are not ``searched`` are fixed: by a rule of the user's, or because the role admits no choice.
    ``parameters`` counts what was trained.
    """

    names: tuple[str, ...]
    originals: tuple[str, ...]
    role: str
    parameters: int
    candidates: tuple[Candidate, ...]
    searched: bool = False

    @property
    def named(self) -> tuple[str, ...]:
        """The parameters that rules must name.

        Linear maps have the same format before they are merged; of what is stacked otherwise, such as experts
        that are modules of their own, one name says it.
        """
        return self.originals if "linear" in self.role else self.originals[:1]


def find_units(
    program: Program,
    recipe: Recipe,
    row_bytes: Mapping[str, int],
    context: int,
    unwanted: Collection[str] = (),
) -> list[Unit]:
    """All units of a program that is ready for Quantize, in the order in which they act.

    ``row_bytes`` are those of a token in all caches, by cache format; ``context`` tokens are held.
    ``unwanted`` formats are taken only where a rule asks for them.
    """
    groups: list[_Group] = []
    for slot in slots(program):
        if (purpose := role(program, slot.node)) is None:
            continue
        names = _originals(program, [slot])
        named = any(rule.applies(names, purpose) for rule in recipe.rules)
        if named or purpose == "router":
            groups.append(_Group([slot], [purpose], [recipe.format_for(names, purpose)]))
        else:
            _join(program, groups, _Group([slot], [purpose]))
    units = []
    for group in groups:
        formats = group.fixed or [f for f in _formats(group.roles) if f not in unwanted]
        units.append(_unit(program, group, formats))
    return [*units, *_rest(program), _cache(row_bytes, context)]


@dataclass
class _Group:
    """Slots that have one format, ``fixed`` or to be found."""

    slots: list[Slot]
    roles: list[Role]
    fixed: list[str] = field(default_factory=list)


def _join(program: Program, groups: list[_Group], new: _Group) -> None:
    """Add a group, or to one that comes from the same parameter: a rule cannot tell the two apart."""
    names = set(_originals(program, new.slots))
    for group in [g for g in groups if not g.fixed]:
        if not names.isdisjoint(_originals(program, group.slots)):
            groups.remove(group)
            new = _Group(group.slots + new.slots, group.roles + new.roles)
    groups.append(new)


def _formats(roles: Iterable[Role]) -> list[str]:
    """What all the roles may be."""
    sets = [allowed(role) for role in roles]
    return [name for name in quant.NAMES if all(name in formats for formats in sets)]


def _unit(program: Program, group: _Group, formats: Iterable[str]) -> Unit:
    reads: dict[str, float] = defaultdict(float)
    for slot in group.slots:
        for weight, *_ in slot.weights:
            reads[weight.target] += _share_read(slot.node, weight)
    shapes = {name: tuple(program.weights.like(name).shape) for name in reads}
    candidates = []
    for format in formats:
        sizes = {name: stored_bytes(size, format) for name, size in shapes.items()}
        stored, read = sum(sizes.values()), sum(reads[name] * size for name, size in sizes.items())
        candidates.append(Candidate(format, stored, stored, read))
    return Unit(
        tuple(reads),
        tuple(_originals(program, group.slots)),
        " and ".join(dict.fromkeys(group.roles)),
        sum(map(prod, shapes.values())),
        tuple(sorted(candidates, key=lambda c: (c.stored, c.format))),
        searched=not group.fixed,
    )


def stored_bytes(shape: tuple[int, ...], format: str) -> int:
    """
    >>> stored_bytes((8, 64, 128), "int4-g128"), stored_bytes((64, 128), "bf16")
    (33792, 16384)
    """
    rows, inputs = shape[-2:]
    return prod(shape[:-2]) * quant.parse(format).bytes(rows, inputs)


def _share_read(node: fx.Node, weight: fx.Node) -> float:
    """The share of a weight that one token needs: of a table one row, of experts those it is sent to."""
    if is_call(node, mill.embed):
        return 1 / int(shape(weight)[0])
    if is_call(node, mill.experts):
        return int(shape(node.args[1])[-1]) / int(shape(weight)[0])
    return 1.0


def _originals(program: Program, group: Iterable[Slot]) -> list[str]:
    names = [weight.target for slot in group for weight, *_ in slot.weights]
    return list(dict.fromkeys(o for name in names for o in program.weights.roots(name)))


def _rest(program: Program) -> list[Unit]:
    """What is fp32 always: vectors of norms and biases, and tables over positions, which nobody trained."""
    tables: dict[str, float] = {}
    taken: set[str] = set()
    for slot in slots(program):
        names = [weight.target for weight, *_ in slot.weights]
        taken.update(names)
        if role(program, slot.node) is None:
            tables |= {name: _share_read(slot.node, slot.weights[0][0]) for name in names}
    others = {name: 1.0 for name in program.used_weights() if name not in taken}
    found = (_plain(program, "norm", others), _plain(program, "positions", tables))
    return [unit for unit in found if unit.names]


def _plain(program: Program, purpose: str, reads: Mapping[str, float]) -> Unit:
    sizes = {name: 4 * program.weights.like(name).numel() for name in reads}
    stored, read = sum(sizes.values()), sum(reads[name] * size for name, size in sizes.items())
    parameters = stored // 4 if purpose == "norm" else 0
    return Unit(tuple(reads), (), purpose, parameters, (Candidate("fp32", stored, stored, read),))


def _cache(row_bytes: Mapping[str, int], context: int) -> Unit:
    sizes = {format: context * size for format, size in row_bytes.items()}
    candidates = [Candidate(format, 0, size, size) for format, size in sizes.items()]
    return Unit((), (), CACHE, 0, tuple(sorted(candidates, key=lambda c: (c.held, c.format))))
