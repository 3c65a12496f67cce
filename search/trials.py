"""Choices measured as a whole, one after the other, until the best within the budget is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import escape

from ..ir.loss import MARGIN
from ..ir.program import Program
from ..passes.pipeline import run_passes
from ..passes.quantize import Quantize
from ..recipe import Budget, Recipe, Rule
from .choose import Choice, Options, held, least, loss, read, stored, total
from .measure import Loss, Yardstick
from .units import CACHE, Candidate, Unit

ROUNDS = 8  # of measuring a choice and moving the level
CLOSE = 0.97  # levels that differ by less are not told apart,
ALIKE = 1.005  # nor costs that do
TINY = 1e-9  # nats
# What a byte of memory costs beside one that is read, until the fastest choice fits.
PRICES = (0.0, 0.25, 1.0, 4.0, 64.0)


@dataclass(frozen=True)
class Trial:
    """A choice, and what it lost where choices are judged."""

    choice: Choice
    loss: Loss

    @property
    def predicted(self) -> float:
        return total(self.choice, loss)


@dataclass
class Trials:
    """Choices that were measured, on the way to the best one."""

    prepare: Callable[[Recipe], Program]
    recipe: Recipe
    budget: Budget
    units: Sequence[Unit]
    yardstick: Yardstick
    round_better: Callable[[Program], None] | None = None
    done: dict[Choice, Trial] = field(default_factory=dict)

    @property
    def options(self) -> Options:
        return [unit.candidates for unit in self.units]

    def cost(self, candidate: Candidate) -> float:
        """What the objective makes small: bytes stored, or held if memory is short, or read."""
        if self.budget.objective == "speed":
            return read(candidate)
        return held(candidate) if self.budget.memory else stored(candidate)

    def guarded(self, trial: Trial) -> float:
        """The loss to hold against the budget: as measured, and two standard errors more."""
        found = trial.loss
        if self.budget.measure == "kl":
            return found.kl + MARGIN * found.kl_error
        return found.guarded

    def within(self, trial: Trial) -> bool:
        return self.budget.nats is None or self.guarded(trial) <= self.budget.nats

    @property
    def best(self) -> Trial:
        good = [trial for trial in self.done.values() if self.within(trial)]
        if good and self.budget.nats is not None:
            return min(good, key=lambda trial: (total(trial.choice, self.cost), trial.predicted))
        return min(self.done.values(), key=self.guarded)

    def run(self) -> Iterator[Trial]:
        """Measure choices until one is the smallest within the budget, or none is left to try."""
        limit = self.budget.nats
        if limit is None:
            yield self.measure(self.finest())
            return
        low, high, level = 0.0, math.inf, math.inf
        for _ in range(ROUNDS):
            choice = self.choose(level)
            if choice in self.done:  # nothing lies between it and the level
                low = level
            else:
                yield (trial := self.measure(choice))
                at = trial.predicted
                if not self.within(trial):
                    high = min(high, at)
                elif math.isinf(high):
                    return  # the smallest there is
                else:
                    low = max(low, at)
                level = at * limit / max(self.guarded(trial), limit / 4, TINY)
            if low >= CLOSE * high or self._narrowed():
                break
            if not low < level < high:
                level = (low + high) / 2
        if not any(map(self.within, self.done.values())):
            yield self.measure(self.finest())

    def _narrowed(self) -> bool:
        """Whether the best choice costs hardly more than one that was not good enough."""
        good, bad = (
            [total(t.choice, self.cost) for t in self.done.values() if self.within(t) == wanted]
            for wanted in (True, False)
        )
        return bool(good and bad) and min(good) <= ALIKE * max(bad)

    def choose(self, level: float) -> Choice:
        """The least cost at this predicted loss that fits the memory; if there is none, the finest."""
        for price in PRICES if self.budget.memory else PRICES[:1]:

            def priced(c: Candidate, price: float = price) -> float:
                return self.cost(c) + price * held(c)

            choice = least(self.options, priced, loss, level)
            if choice is None:
                break
            if total(choice, held) <= self._memory:
                return choice
        return self.finest()

    def finest(self) -> Choice:
        """The least predicted loss that fits the memory."""
        choice = least(self.options, loss, held, self._memory)
        assert choice is not None, "the smallest formats fit"
        return choice

    @property
    def _memory(self) -> float:
        return self.budget.memory_bytes or math.inf

    def measure(self, choice: Choice) -> Trial:
        if choice not in self.done:
            self.done[choice] = Trial(choice, self.yardstick.loss(self.program(choice)))
        return self.done[choice]

    def program(self, choice: Choice) -> Program:
        recipe = self.recipe_of(choice)
        program = self.prepare(recipe)
        run_passes(program, [Quantize(recipe=recipe)])
        if self.round_better is not None:
            self.round_better(program)
        return program

    def recipe_of(self, choice: Choice) -> Recipe:
        """The recipe that makes this choice: the user's rules, then those that were found."""
        rules = list(self.recipe.rules)
        kv: str = self.recipe.kv
        for unit, candidate in zip(self.units, choice, strict=True):
            if unit.role == CACHE:
                kv = candidate.format
            elif unit.searched:
                given = [{"match": escape(n), "format": candidate.format} for n in unit.named]
                rules += map(Rule.model_validate, given)
        return self.recipe.model_copy(update={"rules": rules, "kv": kv})
