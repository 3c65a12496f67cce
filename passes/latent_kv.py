"""Attention with keys and values per head becomes latent attention: what is chosen, by what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadRecipe, LossTooHigh, Unsupported
from ..ir.loss import MARGIN, Loss, sums
from ..ir.program import Program, module_path, shape
from ..recipe import KvCompress
from .base import Pass, calls, mill, sweep
from .heal import Heal
from .latent_factors import Channels, Factors, channels, factorise
from .latent_sites import Layer, Site, find_sites, measure, rewrite, shaped
from .workspace import Workspace

GRAIN = 16  # latents come in so many, which is what kernels compute at once
ROTARY_GRAIN = 8
FOLDS = (1, 2, 4)
ROTARY_SHARES = (0.25, 0.5, 0.75)  # of a cache, that are tried
ALIKE = 1.1  # divergences before healing that differ by less are not told apart
BALANCES = (0.25, 0.5, 1.0, 2.0, 4.0)
SAVINGS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # that are tried within a limit, the largest first
MEASURED_TOKENS = 16384  # of the text that moments are taken from
COMPARED = 8  # of the held-out sequences, on which choices are compared
_HOPELESS = 40.0  # a loss before healing that is so many times the limit is not healed

Conversion = tuple[Program, list[str]]


@dataclass(frozen=True)
class Choice:
    """How the layers are converted.

    ``slots [S]`` are the rotary channels of every layer, mixed over ``fold`` frequencies; ``ranks`` and
    ``balances`` are per layer, and no rank loses nothing.
    """

    fold: int
    slots: Tensor
    ranks: list[int | None]
    balances: list[float]

    @property
    def rotary(self) -> int:
        """Values of a rotary key."""
        return 2 * len(self.slots)


@dataclass
class LatentKV(Pass):
    """softmax(q k^T) v => softmax(q w_uk c + q' r) w_uv c: latents c and one rotary key r for all heads

    For attention with keys and values per head; what comes out is the latent attention of DeepSeek-V2, and
    :mod:`.latent_factors` has the algebra with its sources.  All layers keep the same rotary frequencies.
    How many values of a cache are rotary, over how many neighbouring frequencies channels are mixed, how
    keys and values are balanced and the rank of each layer are chosen by the loss that is measured.

    ``training`` gives moments and heals the new weights (see :mod:`.heal`), ``held`` judges: both are
    sequences of token ids ``[T]``.  Without them only shapes are right, for dry runs.

    Raises Unsupported if no attention can be converted, LossTooHigh if more is lost than ``options`` allow.
    """

    options: KvCompress
    training: Sequence[Tensor] = ()
    held: Sequence[Tensor] = ()
    workspace: Workspace | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    facts: dict[str, Any] = field(default_factory=dict, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    loss: Loss = field(default=Loss(0, 0.0, 0.0, 0.0, 0.0), init=False)

    name = "latent_kv"
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program) -> int:
        sites, self.notes = find_sites(program)
        if not sites:
            reason = (self.notes or ["it has none with keys and values per head"])[0]
            raise Unsupported(
                reason=f"no attention of this model can be made latent: {reason}",
                where="kv_compress",
                advice="leave out kv_compress; kv: int8 or kv: fp8 narrows any cache",
            )
        self.facts["kept"] = list(self.notes)
        made = self._convert(program, sites) if self.training else self._shapes(program, sites)
        program.adopt(made)
        self._describe(program, sites)
        return len(sites)

    def _check_size(self, sites: Sequence[Site], rank: int, rotary: int) -> None:
        cached = min(site.cached for site in sites)
        if rank + rotary >= cached:
            raise BadRecipe(
                where="kv_compress", reason=f"{rank} latents and {rotary} rotary values a token are not "
                f"fewer than the {cached} of keys and values", advice="pass a smaller rank, or a share",
            )  # fmt: skip

    def _shapes(self, program: Program, sites: Sequence[Site]) -> Program:
        copy = program.copy()
        share = 0.5 if self.options.share is None else self.options.share
        budget = 2 * (self.options.rank or 0) or self._values(sites, share)
        rotary = self.options.rotary or _rotary(budget, 0.5, sites)
        rank = self.options.rank or _grained(budget - rotary)
        self._check_size(sites, rank, rotary)
        for site in find_sites(copy)[0]:
            rewrite(copy, site, *shaped(site, rotary, rank))
        sweep(copy)
        return copy

    def _convert(self, program: Program, sites: Sequence[Site]) -> Program:
        limit = self.options.limit.nats if self.options.limit else None
        trials = _Trials(program, sites, self._measured(program, sites), self.held[:COMPARED])
        shares = SAVINGS if self.options.save == "auto" else (self.options.share,)
        for at, share in enumerate(shares):
            choice = self._choose(trials, None if share is None else self._values(sites, share))
            steps = self._steps(trials, choice)
            last = at == len(shares) - 1
            if not last and limit and self._guarded(steps[-1][2]) > _HOPELESS * limit:
                continue
            made, names = trials.convert(choice)
            self.loss = self._heal(program, made, names, limit, steps, choice)
            if limit is None or self._guarded(self.loss) <= limit:
                break
        else:
            raise LossTooHigh(
                loss=f"{self.loss.perplexity_percent:.2f}% of perplexity (KL {self.loss.kl:.4f})",
                limit=self.options.max_loss,
                advice="compress less, heal longer (heal_minutes), or calibrate with more text",
            )
        self.facts["steps"] = [
            {"step": name, "exact": exact, "perplexity_increase_percent": loss.perplexity_percent,
             **asdict(loss)}
            for name, exact, loss in steps
        ]  # fmt: skip
        self.facts["fold"] = choice.fold
        return made

    def _guarded(self, loss: Loss) -> float:
        """What is held against the limit: see :attr:`.Loss.guarded`."""
        kl = self.options.limit is not None and self.options.limit.measure == "kl"
        return loss.kl + MARGIN * loss.kl_error if kl else loss.guarded

    def _measured(self, program: Program, sites: Sequence[Site]) -> list[Layer]:
        count = max(1, MEASURED_TOKENS // max(map(len, self.training)))
        what = "measure attention"
        return measure(
            program,
            sites,
            self.training[:count],
            lambda done: self.progress(what, done, len(sites)),
        )

    def _heal(
        self,
        teacher: Program,
        made: Program,
        names: list[str],
        limit: float | None,
        steps: list[tuple[str, bool, Loss]],
        choice: Choice,
    ) -> Loss:
        """Train the new weights; what is lost then on all of the held-out text."""
        options = self.options
        wanted = options.heal_steps if options.heal_steps is not None else options.heal_minutes
        if not wanted:
            return measured_loss(teacher, made, self.held)
        key = {"slots": choice.slots.tolist(), "fold": choice.fold, "ranks": choice.ranks,
               "balances": choice.balances}  # fmt: skip
        room = self.workspace and self.workspace.room(self.name, key)
        heal = Heal(
            teacher, names, self.training, self.held, options.heal_minutes, options.heal_steps, limit,
            workspace=room, progress=self.progress,
        )  # fmt: skip
        heal.run(made)
        steps.append(("heal", False, heal.after))
        self.facts["healing"] = heal.record()
        self.notes += heal.notes
        return heal.after

    # --- choosing

    def _values(self, sites: Sequence[Site], share: float) -> int:
        """Values per token that a layer's cache may hold."""
        return int((1 - share) * sum(site.cached for site in sites) / len(sites))

    def _choose(self, trials: _Trials, budget: int | None) -> Choice:
        """The choice with the least divergence among those of one size."""
        sites, options = trials.sites, self.options
        if options.rotary is not None:
            widths = [options.rotary]
        elif budget is not None:
            widths = sorted({_rotary(budget, share, sites) for share in ROTARY_SHARES})
        else:
            widths = sorted({_rotary(2 * (options.rank or 0), s, sites) for s in ROTARY_SHARES})
        found: list[tuple[float, Choice]] = []
        for rotary in widths:
            rank = options.rank or _grained((budget or 0) - rotary)
            self._check_size(sites, rank, rotary)
            before = float("inf")
            for fold in FOLDS:
                one = trials.uniform(fold, rotary // 2, rank)
                divergence = trials.loss(one).kl
                found.append((divergence, one))
                if divergence > before:
                    break
                before = divergence
            self.progress("choose rotary dimensions", len(found), len(widths) * len(FOLDS))
        enough = ALIKE * min(divergence for divergence, _ in found)
        # Rotary values cost queries as well, of every head.
        good = [one for divergence, one in found if divergence <= enough]
        best = trials.balanced(min(good, key=lambda one: one.rotary))
        return best if options.rank else trials.spread(best)

    def _steps(self, trials: _Trials, choice: Choice) -> list[tuple[str, bool, Loss]]:
        """The loss after every step, each with those before it."""
        whole = replace(choice, ranks=[None] * len(choice.ranks))
        everything = torch.arange(trials.count)
        linear = all(site.exact for site in trials.sites)
        turned = replace(whole, fold=1, slots=everything)
        steps = [("scale and turn" if linear else "make linear, scale and turn", linear, turned)]
        if choice.fold > 1:
            steps.append((f"fold {choice.fold}", False, replace(turned, fold=choice.fold)))
        steps.append((f"keep {choice.rotary} rotary", False, whole))
        steps.append(("factorise", False, choice))
        return [(name, exact, trials.loss(one)) for name, exact, one in steps]

    # --- reporting

    def _describe(self, program: Program, sites: Sequence[Site]) -> None:
        sizes = {
            module_path(n): {"rank": int(shape(n.args[1])[-1]), "rotary": int(shape(n.args[2])[-1])}
            for n in calls(program, mill.latent_attention)
        }
        layers = [{"path": s.path, **sizes[s.path], "before": s.cached} for s in sites]
        before = sum(site.cached for site in sites)
        after = sum(sum(sizes[site.path].values()) for site in sites)
        self.facts |= {"layers": layers, "values_before": before, "values_after": after}
        self.notes.insert(
            0, f"{len(sites)} caches hold {after:,} values per token, {100 * (1 - after / before):.0f}% "
            f"fewer than the {before:,} of keys and values",
        )  # fmt: skip


def _grained(values: int) -> int:
    return max(GRAIN, values // GRAIN * GRAIN)


def _rotary(budget: int, share: float, sites: Sequence[Site]) -> int:
    """Rotary values that are about ``share`` of a budget, so that what is left comes in grains."""
    most = 2 * len(sites[0].pairs[0]) * sites[0].groups
    left = _grained(round((1 - share) * budget))
    wanted = (budget - left) // ROTARY_GRAIN * ROTARY_GRAIN
    return min(most, max(ROTARY_GRAIN, wanted))


def measured_loss(original: Program, made: Program, text: Sequence[Tensor]) -> Loss:
    """What a program loses on sequences of token ids, run one by one."""
    return Loss.of([sums(ids, original.run(ids), made.run(ids)) for ids in text])


@dataclass
class _Trials:
    """Conversions of one program, tried and measured on ``held``."""

    program: Program
    sites: Sequence[Site]
    layers: Sequence[Layer]
    held: Sequence[Tensor]
    _channels: dict[int, list[Channels]] = field(default_factory=dict)
    _factors: dict[int, tuple[Any, Factors]] = field(default_factory=dict)  # the last of each layer

    @cached_property
    def answers(self) -> list[Tensor]:
        """The original's logits."""
        return [self.program.run(ids) for ids in self.held]

    @property
    def count(self) -> int:
        """Channels of a layer."""
        rotation = self.layers[0].rotation
        return len(rotation.real) * len(self.layers[0].heads.key)

    def channels(self, fold: int) -> list[Channels]:
        if fold not in self._channels:
            self._channels[fold] = [
                channels(one.heads, one.inputs, one.rotation, fold) for one in self.layers
            ]
        return self._channels[fold]

    def uniform(self, fold: int, slots: int, rank: int | None) -> Choice:
        """The rotary channels whose loss would be the greatest, over all layers."""
        pairs = zip(self.channels(fold), self.layers, strict=True)
        loss = torch.stack([c.loss * layer.scale**2 for c, layer in pairs]).sum(0)
        chosen = loss.topk(min(slots, len(loss))).indices.sort().values
        return Choice(fold, chosen, [rank] * len(self.layers), [1.0] * len(self.layers))

    def frequency(self, choice: Choice) -> Tensor:
        """The middle one of a fold, ``[S]``."""
        fold = self.channels(choice.fold)[0].fold[choice.slots]
        pairs = len(self.layers[0].rotation.real)
        return (fold * choice.fold + (choice.fold - 1) // 2).clamp(max=pairs - 1)

    def factors(self, choice: Choice, at: int, balance: float | None = None) -> Factors:
        layer, balance = self.layers[at], choice.balances[at] if balance is None else balance
        key = choice.fold, choice.slots.tolist(), balance
        if at not in self._factors or self._factors[at][0] != key:
            found = self.channels(choice.fold)[at]
            made = factorise(
                layer.heads, layer.inputs, layer.rotation, found, choice.slots, balance
            )
            self._factors[at] = key, made
        return self._factors[at][1]

    def convert(self, choice: Choice) -> Conversion:
        """A converted copy, and the names of its new weights."""
        copy = self.program.copy()
        names: list[str] = []
        frequency = self.frequency(choice)
        for at, site in enumerate(find_sites(copy)[0]):
            latent = self.factors(choice, at).latent(choice.ranks[at])
            names += rewrite(copy, site, latent, frequency)
        sweep(copy)
        return copy, names

    def loss(self, choice: Choice) -> Loss:
        made, _ = self.convert(choice)
        pairs = zip(self.held, self.answers, strict=True)
        return Loss.of([sums(ids, answer, made.run(ids)) for ids, answer in pairs])

    def balanced(self, choice: Choice) -> Choice:
        """Per layer the balance of keys and values with the least error of its attention."""
        found = [
            min(BALANCES, key=lambda b, at=at: self._error(choice, at, b))  # type: ignore[misc]
            for at in range(len(self.layers))
        ]
        return replace(choice, balances=found)

    def _error(self, choice: Choice, at: int, balance: float) -> float:
        latent = self.factors(choice, at, balance).latent(choice.ranks[at])
        return self.layers[at].error(latent, self.frequency(choice))

    def spread(self, choice: Choice) -> Choice:
        """Ranks that add up to the same, higher where a layer's own truncation was seen to cost more."""
        ranks = [r or 0 for r in choice.ranks]
        tails = [self.factors(choice, at).tail for at in range(len(ranks))]
        worth = list(self._worth(choice, tails))
        given, left = [GRAIN] * len(ranks), (sum(ranks) - GRAIN * len(ranks)) // GRAIN

        def gain(at: int) -> float:
            tail = tails[at]
            now, then = (float(tail[min(r, len(tail) - 1)]) for r in (given[at], given[at] + GRAIN))
            return worth[at] * (now - then)

        for _ in range(left):
            given[max(range(len(given)), key=gain)] += GRAIN
        other = replace(choice, ranks=list(given))
        return min((choice, other), key=lambda one: self.loss(one).kl)

    def _worth(self, choice: Choice, tails: Sequence[Tensor]) -> Iterator[float]:
        """Of each layer the divergence per share of its latents, seen where it alone has half its rank."""
        whole: list[int | None] = [None] * len(choice.ranks)
        base = self.loss(replace(choice, ranks=whole)).kl
        for at, rank in enumerate(choice.ranks):
            half = max(GRAIN, _grained((rank or 0) // 2))
            tail = tails[at]
            share = float(tail[min(half, len(tail) - 1)])
            ranks = [*whole[:at], half, *whole[at + 1 :]]
            yield max(0.0, self.loss(replace(choice, ranks=ranks)).kl - base) / max(share, 1e-12)
