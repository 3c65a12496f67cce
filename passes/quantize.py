"""Step one of quantization: weights are stored in their formats, and read back before use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..errors import WrongFormat
from ..ir import quant
from ..ir.ops import custom_op
from ..ir.program import Program, Stage, module_path, shape, where
from ..recipe import Recipe, Role, Rule
from .base import Pass, aten, is_call, mill, sweep
from .weight_slots import Slot, role, slots

_LOOKUPS = (aten.index, aten.index_select, aten.gather, aten.slice, aten.select)
_NAMED = 8  # weights that escaped, in the notes


@dataclass(frozen=True)
class Decision:
    """One weight as it will be stored; ``originals`` are the parameters that it comes from.

    A weight that ``escaped`` (empty, or where and why) is not stored in the format that the recipe
    gives it, ``wanted``: no kernel reads it, so it stays in fp32.
    """

    weight: str
    role: Role
    format: str
    parameters: int
    bytes: int
    originals: tuple[str, ...]
    wanted: str
    escaped: str = ""


@dataclass
class Quantize(Pass):
    """W => dequantize(q, scale), in the format that the recipe gives the weight's role and names

    ``decisions`` tells what was decided for every weight, also for those that stay in fp32, and for
    those that should not have: matrices that an op outside of the dialect multiplies with.  ``idle`` are
    the patterns of rules over names that no such weight has.
    """

    recipe: Recipe = field(default_factory=Recipe)
    decisions: list[Decision] = field(default_factory=list, init=False)
    idle: list[str] = field(default_factory=list, init=False)

    name = "quantize"
    produces: ClassVar[Stage | None] = Stage.QUANTIZED
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program) -> int:
        decisions = _vectors(program)
        for slot in slots(program):
            names = [parts[0].target for parts in slot.weights]
            if (purpose := role(program, slot.node)) is None:
                continue
            originals = [o for name in names for o in program.weights.roots(name)]
            format = self.recipe.format_for(originals, purpose)
            for name in names:
                decisions[name, format] = _decide(program, name, purpose, format)
            if format != "fp32":
                with program.graph.inserting_before(slot.node):
                    slot.fill([[stored(program, name, format)] for name in names], slot.format)
        sweep(program)
        for escape in self._escapes(program):
            decisions[escape.weight, escape.format] = escape
        self.decisions = list(decisions.values())
        self.idle = [rule.match for rule in self.recipe.rules if self._is_idle(rule)]
        return sum(d.format != "fp32" for d in self.decisions)

    @property
    def notes(self) -> list[str]:
        """The share of the parameters that each format has, so that none is skipped silently."""
        shares: Counter[str] = Counter()
        for decision in self.decisions:
            shares[decision.format] += decision.parameters
        escaped = [d for d in self.decisions if d.escaped]
        rest = [f"and {len(escaped) - _NAMED} weights more"] if len(escaped) > _NAMED else []
        return [
            *(f"{name}: {n / shares.total():.2%} of the parameters" for name, n in shares.items()),
            *(
                f"{d.weight} is not {d.wanted} but {d.format}: {d.escaped}"
                for d in escaped[:_NAMED]
            ),
            *rest,
            *(f"rule {pattern!r} matches no weight that has a format" for pattern in self.idle),
        ]

    def _is_idle(self, rule: Rule) -> bool:
        """Whether a rule over names is for none; one over a role may be meant for other models too."""
        named = (d for d in self.decisions if d.role != "norm")
        return rule.role is None and not any(rule.applies(d.originals, d.role) for d in named)

    def _escapes(self, program: Program) -> Iterator[Decision]:
        """Decisions for matrices in use that the recipe wants in a format, and that no slot holds."""
        for node in program.graph.nodes:
            if node.op != "get_attr" or not (reader := _multiplier(node)):
                continue
            originals = program.weights.roots(node.target)
            wanted = self.recipe.format_for(originals, "linear")
            if wanted != "fp32":
                kept = _decide(program, node.target, "linear", "fp32")
                why = "takes plain tensors" if custom_op(reader.target) else "is left to torch"
                reason = f"{reader.target} at {module_path(reader)} reads it, which {why}"
                yield replace(kept, wanted=wanted, escaped=reason)


def shares(decisions: Sequence[Decision]) -> tuple[float, float]:
    """Of all parameters, those stored in fewer than 16 bits, and those that the recipe wants so."""
    total = sum(d.parameters for d in decisions) or 1
    stored = sum(d.parameters for d in decisions if quant.parse(d.format).bits < 16)
    wanted = sum(d.parameters for d in decisions if quant.parse(d.wanted).bits < 16)
    return stored / total, wanted / total


def check_stored(program: Program, decisions: Sequence[Decision]) -> None:
    """Raise WrongFormat unless a finished program stores each weight as was decided, and only so."""
    stored: dict[tuple[str, str], str] = {}
    for slot in slots(program):
        if role(program, slot.node) is not None:
            stored |= {(name, slot.format): where(slot.node) for name in _full_names(slot)}
    decided = {(d.weight, d.format) for d in decisions if d.role != "norm" and not d.escaped}
    if differing := sorted(decided ^ set(stored)):
        weight, format = differing[0]
        found, wanted = (
            " and ".join(sorted(f for name, f in pairs if name == weight)) or "no format"
            for pairs in (stored, decided)
        )
        at = stored.get((weight, format), "no kernel")
        raise WrongFormat(name=weight, found=found, wanted=wanted, where=at)


def _full_names(slot: Slot) -> list[str]:
    """What the weights of a slot were called before they had formats."""
    suffix = f".{slot.format}.{quant.parse(slot.format).parts[0]}"
    return [parts[0].target.removesuffix(suffix) for parts in slot.weights]


def _multiplier(weight: fx.Node) -> fx.Node | None:
    """An op of torch that reads a weight as a matrix: not number by number, and not rows of a table."""
    if sum(size > 1 for size in shape(weight)) < 2:
        return None
    for user in weight.users:
        known = getattr(user.target, "namespace", "") == "tokenmill" and not custom_op(user.target)
        pointwise = torch.Tag.pointwise in getattr(user.target, "tags", ())
        if user.op == "call_function" and not (known or pointwise or is_call(user, *_LOOKUPS)):
            return user
    return None


def _decide(program: Program, name: str, purpose: Role, format: str) -> Decision:
    weight = program.weights.like(name)
    rows, inputs = (1, 1, *weight.shape)[-2:]
    matrices = weight.numel() // max(rows * inputs, 1)
    size = matrices * quant.parse(format).bytes(rows, inputs)
    originals = tuple(program.weights.roots(name))
    return Decision(name, purpose, format, weight.numel(), size, originals, wanted=format)


def _vectors(program: Program) -> dict[tuple[str, str], Decision]:
    """Vectors (of norms, biases, routers) stay as they are."""
    names = [n for n in program.used_weights() if program.weights.like(n).dim() < 2]
    return {(n, "fp32"): _decide(program, n, "norm", "fp32") for n in names}


def stored(program: Program, name: str, format: str) -> fx.Node:
    """A node that reads the weight back from its parts, computed when they are asked for."""
    parts = []
    for part in quant.parse(format).parts:
        full = f"{name}.{format}.{part}"
        if full not in program.weights:
            program.weights.derive(full, partial(_part, format, part), name, each=True)
        parts.append(program.weight(full))
    inputs = program.weights.like(name).shape[-1]
    return program.call(mill.dequantize.default, parts, format, inputs)


def _part(format: str, part: str, weight: Tensor) -> Tensor:
    """One part; the scales alone cost less than both, and nothing large is kept between the two."""
    fmt = quant.parse(format)
    if part == "scale":
        return quant.scales(weight.float(), fmt)
    return quant.quantize(weight, fmt)[part]
