"""What a search found, as plain facts for the report and the manifest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..recipe import Budget
from ..units import size
from .choose import Choice, held, loss, path, read, stored, total
from .measure import Loss
from .trials import Trial, Trials
from .units import CACHE, Unit

FRONTIER_POINTS = 60


def describe(trials: Trials, best: Trial, unseen: Loss, forks: int) -> dict[str, Any]:
    """Facts in JSON: sizes in bytes, losses in nats per token, perplexity in percent.

    Losses have four digits, so that the last bits of another machine's sums do not show.
    """
    budget, units = trials.budget, trials.units
    limit, lost = budget.nats, trials.guarded(best)
    measured = sorted(trials.done.values(), key=lambda trial: total(trial.choice, trials.cost))
    return _rounded(
        {
            "budget": budget.model_dump(mode="json")
            | {"nats": limit, "memory_bytes": budget.memory_bytes, "measure": budget.measure},
            "met": trials.within(best),
            "over": 0.0 if limit is None else max(0.0, lost - limit),
            "verdict": _verdict(trials, best, unseen),
            "cost": _cost_name(budget),
            "choice": _point(trials, best.choice) | {"kv": _kv(units, best.choice)},
            "judged": _loss(best.loss),
            "unseen": _loss(unseen),
            "forks": forks,
            "units": [_unit(u, c.format) for u, c in zip(units, best.choice, strict=True)],
            "frontier": [
                _point(trials, choice)
                for choice in _thinned(list(path(trials.options, trials.cost, loss)))
            ],
            "measured": [
                _point(trials, trial.choice) | _loss(trial.loss)
                | {"kv": _kv(units, trial.choice), "within": trials.within(trial),
                   "chosen": trial is best}
                for trial in measured
            ],
        }
    )  # fmt: skip


def _verdict(trials: Trials, best: Trial, unseen: Loss) -> str:
    """In words: what was asked for, whether it is so, and what to expect."""
    budget, found = trials.budget, unseen
    said = []
    if budget.memory is not None:
        taken = size(total(best.choice, held))
        said.append(
            f"Weights and the cache of {budget.context:,} tokens take {taken} of {budget.memory}."
        )
    if budget.max_loss is not None and trials.within(best):
        said.append(f"The loss is within the budget of {budget.max_loss}.")
    elif budget.max_loss is not None:
        said.append(
            f"The budget of {budget.max_loss} is not met: the best that was found loses "
            f"{_amount(budget, trials.guarded(best))}, two standard errors included."
        )
    said.append(
        f"On {found.tokens:,} tokens that the search did not use, perplexity changes by "
        f"{found.perplexity_percent:+.2f}% (standard error {100 * found.rise_error:.2f}%), and the KL "
        f"divergence from the original is {found.kl:.2g} nats per token."
    )
    return " ".join(said)


def _amount(budget: Budget, nats: float) -> str:
    if budget.measure == "kl":
        return f"{nats:.2g} nats"
    return f"{100 * math.expm1(nats):.2f}% of perplexity"


def _cost_name(budget: Budget) -> str:
    """What :meth:`.Trials.cost` counts, in words."""
    if budget.objective == "speed":
        return "read per token"
    return "weights and cache" if budget.memory else "weights"


def _unit(unit: Unit, chosen: str) -> dict[str, Any]:
    return {
        "weights": list(unit.named),
        "role": unit.role,
        "parameters": unit.parameters,
        "searched": unit.searched,
        "chosen": chosen,
        "candidates": [
            {"format": c.format, "bytes": c.held, "loss": c.loss} for c in unit.candidates
        ],
    }


def _point(trials: Trials, choice: Choice) -> dict[str, Any]:
    pairs = list(zip(trials.units, choice, strict=True))
    trained = sum(candidate.stored for unit, candidate in pairs if unit.parameters)
    return {
        "bytes": int(total(choice, stored)),
        "bits_per_weight": 8 * trained / max(sum(unit.parameters for unit, _ in pairs), 1),
        "held_bytes": int(total(choice, held)),
        "read_bytes": int(total(choice, read)),
        "cost": int(total(choice, trials.cost)),
        "predicted": total(choice, loss),
    }


def _kv(units: Sequence[Unit], choice: Choice) -> str:
    pairs = zip(units, choice, strict=True)
    return next(candidate.format for unit, candidate in pairs if unit.role == CACHE)


def _loss(found: Loss) -> dict[str, Any]:
    return {
        "tokens": found.tokens,
        "perplexity_percent": found.perplexity_percent,
        "rise": found.rise,
        "rise_error": found.rise_error,
        "kl": found.kl,
        "kl_error": found.kl_error,
    }


def _thinned(choices: list[Choice]) -> list[Choice]:
    """At most so many, the first and the last among them."""
    last = len(choices) - 1
    count = min(FRONTIER_POINTS, last)
    return [choices[i * last // count] for i in range(count + 1)] if last else choices


def _rounded(value: Any) -> Any:
    """The same with floats of four digits."""
    match value:
        case dict():
            return {k: _rounded(v) for k, v in value.items()}
        case list():
            return [_rounded(v) for v in value]
        case float():
            return float(f"{value:.4g}")
    return value
