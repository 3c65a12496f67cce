"""Formats under a budget: the smallest or fastest model that loses no more than the user allows.

Four steps.  :mod:`.units` lists what can be chosen.  :mod:`.sensitivity` measures what each unit loses in
each format, all others untouched.  :mod:`.choose` picks formats whose losses add up to a level.  The choice
is then measured as a whole, and the level moved until the measured loss is just within the budget.

*Losses do not quite add up.*  Errors of two layers amplify or cancel each other; a near tie of a router that
one error has decided the other way is not decided again by the next; calibrated rounding loses less than the
rounding to the nearest that sensitivities are measured with.  So only the order of the candidates, and the
rough shape of the curve, is taken from the sum; whether a choice is within the budget is always measured.

*What is measured* is the graph in fp32 arithmetic, with rounded weights and caches.  That kernels round
activations too is not part of it.

*The text has three parts* that share no token: one for sensitivities, one on which choices are judged
(:meth:`.Trials.guarded`: with a margin, because the luckiest of several choices is picked), and one that is
only read at the end, whose loss is what the user should expect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..errors import BadRequest, BudgetTooSmall
from ..ir.program import Program
from ..recipe import CACHE_FORMATS, Budget, Recipe
from ..units import size
from .facts import describe
from .measure import Yardstick
from .sensitivity import Sensitivity
from .trials import ROUNDS, Trials
from .units import CACHE, Unit, find_units

if TYPE_CHECKING:
    from ..api import Progress

PIECE = 256  # tokens, of text for sensitivities
SENSITIVITY_TOKENS = 2048
JUDGING_TOKENS = 12288
UNSEEN_TOKENS = 8192
FEWEST_SEQUENCES = 12


@dataclass(frozen=True)
class Found:
    """The recipe with its formats decided, ``facts`` for report and manifest (JSON, no times in it), and
    the ``seconds`` that the search took.
    """

    recipe: Recipe
    facts: dict[str, Any]
    seconds: float


class Parts(NamedTuple):
    sensitivity: list[Tensor]
    judging: list[Tensor]
    unseen: list[Tensor]


def search(
    prepare: Callable[[Recipe], Program],
    recipe: Recipe,
    text: Sequence[Tensor],
    progress: Progress | None = None,
    round_better: Callable[[Program], None] | None = None,
) -> Found:
    """Find formats for a recipe with a budget.

    ``prepare(recipe)`` yields a fresh program, ready for Quantize; ``text`` is token ids ``[T]``, best two
    dozen sequences of a few hundred; ``round_better`` rounds a quantized program's weights better than to the
    nearest, in place.  What the user's rules name stays as they say, and the cache too if the recipe gives
    ``kv``.

    A budget of loss that cannot be met is no error: the best that was found is given, and
    ``facts["met"]`` is False.  Raises BudgetTooSmall if not even the smallest formats fit the memory, and
    BadRequest if the text is too short.
    """
    start = time.perf_counter()
    budget = recipe.budget
    if budget is None:
        raise ValueError("the recipe has no budget")
    say = progress or (lambda what, done, total: None)
    recipe = recipe.model_copy(update={"budget": None})
    reference = prepare(recipe.model_copy(update={"kv": "fp32"}))
    parts = split(text, reference.positions)
    caches = {kv: prepare(recipe.model_copy(update={"kv": kv})) for kv in _cache_formats(recipe)}
    row_bytes = {kv: sum(c.row_bytes for c in program.caches) for kv, program in caches.items()}
    units = find_units(reference, recipe, row_bytes, budget.context, _unwanted(recipe, budget))
    _check_memory(units, budget)

    sensitivity = Sensitivity(
        reference, caches, units, budget.nats or 0.0,
        lambda done, most: say("measure formats (runs, at most)", done, most),
    )  # fmt: skip
    units = sensitivity.measure(parts.sensitivity)
    trials = Trials(
        prepare, recipe, budget, units, Yardstick(reference, parts.judging), round_better
    )
    for done, _ in enumerate(trials.run()):
        say("verify choices (at most)", done + 1, ROUNDS + 1)
    best = trials.best
    unseen = Yardstick(reference, parts.unseen).loss(trials.program(best.choice))
    facts = describe(trials, best, unseen, sensitivity.forks)
    return Found(trials.recipe_of(best.choice), facts, time.perf_counter() - start)


def split(text: Sequence[Tensor], positions: int) -> Parts:
    """Of six sequences one for sensitivities, three for judging, and two that decide nothing.

    Few sequences are cut first, none is longer than the model's positions, and of many some are left out.
    """
    pieces = [piece for ids in text for piece in ids.reshape(-1).split(positions)]
    tokens = sum(map(len, pieces))
    while pieces and len(pieces) < FEWEST_SEQUENCES and tokens >= 4 * FEWEST_SEQUENCES:
        pieces = [half for ids in pieces for half in ids.tensor_split(2)]
    pieces = [ids for ids in pieces if len(ids) > 1]
    if len(pieces) < FEWEST_SEQUENCES:
        raise BadRequest(
            reason=f"a text of {tokens} tokens is too short to measure a loss on",
            advice="pass a longer text: some ten thousand tokens are right",
        )
    short = [ids[:PIECE] for ids in pieces[0::6]]
    unseen = [ids for i, ids in enumerate(pieces) if i % 6 in (2, 4)]
    return Parts(
        _spread(short, SENSITIVITY_TOKENS),
        _spread(pieces[1::2], JUDGING_TOKENS),
        _spread(unseen, UNSEEN_TOKENS),
    )


def _spread(sequences: list[Tensor], tokens: int) -> list[Tensor]:
    """About so many tokens, in whole sequences from all over; two at the least."""
    count = min(len(sequences), max(2, tokens // max(map(len, sequences))))
    return [sequences[i * len(sequences) // count] for i in range(count)]


def _cache_formats(recipe: Recipe) -> list[str]:
    """The cache's format if it was asked for; else those that save something."""
    if "kv" in recipe.model_fields_set:
        return [recipe.kv]
    return [format for format in CACHE_FORMATS if format != "fp32"]


def _unwanted(recipe: Recipe, budget: Budget) -> tuple[str, ...]:
    """CPUs have no FP8 arithmetic: what fewer bytes save, converting costs."""
    on_gpus = all(target.startswith("sm_") for target in recipe.targets)
    return ("fp8",) if budget.objective == "speed" and not on_gpus else ()


def _check_memory(units: Sequence[Unit], budget: Budget) -> None:
    limit = budget.memory_bytes
    smallest = {unit: min(c.held for c in unit.candidates) for unit in units}
    needed = sum(smallest.values())
    if limit is not None and needed > limit:
        cache = sum(count for unit, count in smallest.items() if unit.role == CACHE)
        raise BudgetTooSmall(
            budget=limit, context=budget.context, needed=needed,
            parts=f"weights {size(needed - cache)}, cache {size(cache)}",
            advice=f"allow {needed}B, or a shorter context, or drop rules that keep weights large",
        )  # fmt: skip
