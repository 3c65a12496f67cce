"""Scales of rounded weights, trained together: what no rounding of one weight after the other can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..errors import BadRecipe
from ..ir import quant
from ..ir.program import Program
from ..recipe import Healing
from .base import Pass, calls, mill, replace, sweep
from .heal import Heal
from .workspace import Workspace

RATE = 4e-3  # of a step, in mean magnitudes of a weight's scales


@dataclass
class HealScales(Pass):
    """w = q s => q s': integers q stay, s' = argmin KL(before rounding || after) over the tokens of a text

    The second half of EfficientQAT (Chen et al. 2024, arXiv:2407.11062), with the model's own distribution to
    learn from in place of the text's next tokens.  Formats of fewer than 8 bits are healed, but for weights
    that came rounded; kernels and sizes stay what they are.  ``text`` is learned from, ``held`` judges
    (:mod:`.heal` has the training, and what it raises).
    """

    options: Healing
    text: Sequence[Tensor] = ()
    held: Sequence[Tensor] = ()
    workspace: Workspace | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    facts: dict[str, Any] | None = field(default=None, init=False)
    notes: list[str] = field(default_factory=list, init=False)

    name = "heal_scales"
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program) -> int:
        teacher, scales = before_rounding(program)
        if not scales:
            raise BadRecipe(
                where="heal_scales", reason="no weight is rounded to fewer than 8 bits",
                advice="leave it out, or choose int4 for some weights",
            )  # fmt: skip
        # A room of its own: a conversion of the same model may have been healed too.
        room = self.workspace and self.workspace.room(self.name, {})
        heal = Heal(
            teacher, scales, self.text, self.held, self.options.minutes, self.options.steps,
            learning_rate=RATE, relative=True, workspace=room, progress=self.progress,
        )  # fmt: skip
        heal.run(program)
        self.facts, self.notes = heal.record(), heal.notes
        return len(scales)


def before_rounding(program: Program) -> tuple[Program, list[str]]:
    """A copy of a quantized program that reads its weights as they were, and names of scales to heal."""
    teacher, scales = program.copy(), dict[str, None]()
    for node in calls(teacher, mill.dequantize):
        parts, format, _ = node.args
        sources = teacher.weights.sources(parts[0].target)
        if not sources:  # a checkpoint brought the parts along
            continue
        fmt = quant.parse(format)
        if fmt.bits < 8:
            scales[parts[fmt.parts.index("scale")].target] = None
        with teacher.graph.inserting_before(node):
            replace(teacher, node, teacher.weight(sources[0]))
    sweep(teacher)
    return teacher, list(scales)
