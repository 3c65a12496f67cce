"""Healing: a short training of a few weights, after a change that cost some of what the model could do.

The model as it was before the change is the teacher.  Its distribution at every token says far more than the
text's next token does, so that a short training is enough (Hinton, Vinyals & Dean 2015, at temperature 1).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import lru_cache, partial
from itertools import count
from operator import getitem
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadRequest, BadToken, Unsupported
from ..ir.loss import Loss, Sums, sums
from ..ir.program import Program, Stage
from .base import Pass
from .differentiate import Differentiable
from .workspace import Workspace

STEP_TOKENS = 2048  # that one step of the optimizer learns from, in whole sequences
LOGITS_BYTES = 1 << 28  # of logits that are in memory at once, and a few times as much beside them
KEPT_BYTES = 1 << 30  # of the teacher's answers; past it they are computed again
WARM_UP = 0.05  # of the budget
BETAS = (0.9, 0.95)
INPUTS = 256  # of a matrix that learns at the full rate; wider ones at one in proportion (Yang et al. 2022)
GRADIENT_NORM = 1.0
MEASUREMENTS = 12  # on held-out text, evenly over the budget
SAVE_SECONDS = 120.0  # of work that a kill may cost at most
HEALED = "healed"  # how a workspace calls a finished run

Values = dict[str, Tensor]


@dataclass
class Heal(Pass):
    """W => argmin KL(teacher || program(W)), from where W is, over the tokens of a text

    Only ``weights`` are trained: names of weights that the program uses and no other one is computed from.
    ``text`` and ``held`` are sequences of token ids ``[T]`` that share nothing.  The second is never trained
    on: it gives the curve, tells which weights were best, and ends the training as soon as the rise of its
    loss (nats per token, two standard errors added) is within ``max_loss``.

    ``learning_rate`` is that of matrices with 256 inputs or fewer; wider ones have a smaller one.  It falls
    to zero over ``minutes``, however fast the machine is, or over ``steps``, which gives the same weights
    every time.  With ``relative`` it is in units of the mean magnitude of each weight instead, for scales.
    What is reached goes to ``workspace``, if there is one, every two minutes: a run that was killed goes on
    there, with the minutes that are left.  ``progress`` hears seconds, or steps.

    Tokens must be proven independent, and weights not yet in the arguments of the ops that read them.
    Teacher and program are in memory whole, in fp32, what both have in common once; it runs on a GPU if torch
    finds one.

    Raises BadRequest for a text without a token to predict or with sequences that are too long, BadToken for
    one that is not of the model's vocabulary, Unsupported if a model computes NaN or Inf on a text.
    """

    teacher: Program
    weights: Sequence[str]
    text: Sequence[Tensor]
    held: Sequence[Tensor]
    minutes: float = 10.0
    steps: int | None = None
    max_loss: float | None = None
    learning_rate: float = 1e-3
    relative: bool = False
    seed: int = 0
    workspace: Workspace | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    curve: list[tuple[float, Loss]] = field(default_factory=list, init=False)
    tokens: int = field(default=0, init=False)
    used: float = field(default=0.0, init=False)  # minutes, or steps
    ending: str = field(default="", init=False)

    name = "heal"
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program) -> int:
        self._check(program)
        room = self.workspace and self.workspace.room(self.name, self._key(program))
        label, state = (room and room.load_state()) or ("", {})
        if label == HEALED:
            self.recall(state)
        else:
            best = self._train(program, room, state)
        for name in self.weights:
            source = partial(room.get, name, "w") if room else partial(getitem, best, name)
            program.weights.settle(name, source)
        return len(self.weights)

    def _train(self, program: Program, room: Workspace | None, state: dict[str, Any]) -> Values:
        """The best weights of a training that goes on from ``state``; the room keeps them."""
        training = _Training(self, program)
        if state:
            training.resume(state)
        if room is None:
            training.go_on(lambda state: None)
            return training.best
        training.go_on(partial(room.save_state, "healing"))
        for name, value in training.best.items():
            room.keep(name, {"w": value})
        room.save_state(HEALED, self.record())
        return training.best

    @property
    def unit(self) -> str:
        """What ``used`` and the curve are counted in."""
        return "minutes" if self.steps is None else "steps"

    def record(self) -> dict[str, Any]:
        """What a report says of the training, as a workspace keeps it."""
        return {
            "tokens": self.tokens, "used": self.used, "unit": self.unit, "ending": self.ending,
            "curve": [[minutes, *astuple(loss)] for minutes, loss in self.curve],
        }  # fmt: skip

    def recall(self, record: dict[str, Any]) -> None:
        self.tokens, self.used, self.ending = (record[k] for k in ("tokens", "used", "ending"))
        self.curve = [(minutes, Loss(*loss)) for minutes, *loss in record["curve"]]

    @property
    def before(self) -> Loss:
        """Of the weights as they came, on the held-out text."""
        return self.curve[0][1]

    @property
    def after(self) -> Loss:
        """Of the weights that were taken."""
        return min((loss for _, loss in self.curve), key=self.badness)

    def badness(self, loss: Loss) -> tuple[float, float]:
        """What is least for the weights that are taken: what the budget is about, or the divergence."""
        return 0.0 if self.max_loss is None else loss.guarded, loss.kl

    @property
    def notes(self) -> list[str]:
        if not self.curve:
            return []
        before, after = self.before, self.after
        return [
            f"{len(self.weights)} weights healed in {self.used:.3g} {self.unit} on {self.tokens:,} tokens, "
            f"{sum(map(len, self.text)):,} of them distinct",
            f"held-out loss {before.rise:+.4f} -> {after.rise:+.4f} nats per token, "
            f"divergence {before.kl:.4f} -> {after.kl:.4f}",
            *([self.ending] if self.ending else []),
        ]

    # --- before it starts

    def _check(self, program: Program) -> None:
        for one in (program, self.teacher):
            if not Stage.DIALECT <= one.stage <= Stage.QUANTIZED:
                raise ValueError("healing needs programs from the stage DIALECT to QUANTIZED")
        used = program.used_weights()
        if strange := [name for name in self.weights if name not in used]:
            raise ValueError(f"the program does not use {strange[0]!r}")
        trained = set(self.weights)
        for name in used:
            if found := trained & (_origins(program, name) - {name}):
                raise ValueError(f"{name!r} is computed from {min(found)!r}, which is trained")
        for what, text in (("text to heal on", self.text), ("held-out text", self.held)):
            self._check_text(program, what, text)

    def _check_text(self, program: Program, what: str, text: Sequence[Tensor]) -> None:
        if sum(max(0, ids.numel() - 1) for ids in text) == 0:
            raise BadRequest(
                reason=f"the {what} has no token to predict",
                advice="pass sequences of two tokens or more, better of 512 and 50,000 in all",
            )
        for ids in text:
            if ids.numel() > program.positions:
                raise BadRequest(
                    reason=f"the {what} has a sequence of {ids.numel()} tokens, and the model has "
                    f"{program.positions} positions",
                    advice="cut it into shorter sequences",
                )
            outside = (ids.reshape(-1) < 0) | (ids.reshape(-1) >= program.vocab)
            if outside.any():
                at = int(outside.nonzero()[0])
                token = int(ids.reshape(-1)[at])
                raise BadToken(token=token, position=at, vocab=program.vocab)

    def _key(self, program: Program) -> dict[str, Any]:
        """What the result depends on beside the model, whose work the workspace is."""
        digest = hashlib.sha256()
        for ids in (*self.text, *self.held):
            digest.update(repr(ids.tolist()).encode())
        shapes = {name: list(program.weights.like(name).shape) for name in self.weights}
        return {
            "text": digest.hexdigest(), "sequences": len(self.text), "weights": shapes,
            "minutes": self.minutes, "steps": self.steps, "max_loss": self.max_loss,
            "learning_rate": self.learning_rate, "relative": self.relative, "seed": self.seed,
        }  # fmt: skip


def _origins(program: Program, name: str) -> set[str]:
    sources = program.weights.sources(name)
    return {name}.union(*(_origins(program, source) for source in sources))


class _Training:
    """The state of a training, and one step after the other."""

    def __init__(self, heal: Heal, program: Program) -> None:
        self.heal = heal
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtypes = {name: program.weights.like(name).dtype for name in heal.weights}
        values = {n: program.weights[n].to(self.device) for n in program.used_weights()}
        for name in heal.weights:
            values[name] = values[name].float().clone().requires_grad_()
        self.weights = {name: values[name] for name in heal.weights}
        self.student = Differentiable(program, values)
        self.text, self.held = (
            [ids.reshape(-1).long().to(self.device) for ids in text if ids.numel()]
            for text in (heal.text, heal.held)
        )
        teacher = Differentiable(heal.teacher, _shared(heal.teacher, values, self.device))
        self.lessons = _Answers(teacher, self.text, torch.float16)
        self.expected = _Answers(teacher, self.held, torch.float32)
        size = _magnitude if heal.relative else _scale
        groups = [{"params": [w], "scale": size(w)} for w in self.weights.values()]
        self.optimizer = torch.optim.AdamW(groups, heal.learning_rate, BETAS, weight_decay=0.0)
        self.best = self._snapshot()
        self.step = self.cursor = 0  # steps made, and sequences visited in them
        self.measured = -1  # the last measurement, of MEASUREMENTS

    def go_on(self, save: Callable[[dict[str, Any]], None]) -> None:
        """Train until the budget is used up, or the loss is small enough, or the training diverges."""
        heal = self.heal
        start, saved = time.monotonic() - 60 * heal.used, time.monotonic()
        while True:
            done = self._done()
            if int(done * MEASUREMENTS) > self.measured:
                self.measured = int(done * MEASUREMENTS)
                self._tell()
                loss = self._measure()
                if heal.max_loss is not None and loss.guarded <= heal.max_loss:
                    heal.ending = (
                        f"ended there: {loss.guarded:.4f} is within {heal.max_loss:.4f} nats"
                    )
                    return
            if done == 1:
                if heal.after is heal.before:
                    heal.ending = "nothing was gained, the weights are what they were"
                return
            self._tell()
            if not self._learn(done):
                heal.ending = (
                    f"diverged after {heal.used:.3g} {heal.unit} and ended there: the learning rate "
                    f"{heal.learning_rate:g} is too high for this model"
                )
                return
            heal.used = (time.monotonic() - start) / 60 if heal.steps is None else self.step
            if time.monotonic() - saved > SAVE_SECONDS:
                save(self.state())
                saved = time.monotonic()

    def _done(self) -> float:
        """The part of the budget that is used."""
        heal = self.heal
        if heal.steps is not None:
            return self.step / heal.steps if self.step < heal.steps else 1.0
        return heal.used / heal.minutes if heal.used < heal.minutes else 1.0

    def _tell(self) -> None:
        heal = self.heal
        what = f"heal, divergence {heal.after.kl:.2g}" if heal.curve else "heal"
        if heal.steps is not None:
            return heal.progress(what, self.step, heal.steps)
        seconds = round(60 * heal.minutes)
        heal.progress(what, min(round(60 * heal.used), seconds), seconds)

    # --- learning

    def _learn(self, done: float) -> bool:
        """One step of the optimizer; False, and no step, if the loss or its gradient is not finite."""
        heal = self.heal
        for group in self.optimizer.param_groups:
            group["lr"] = heal.learning_rate * group["scale"] * _rate(done)
        batch = list(self._batch())
        tokens = sum(len(self.text[i]) for i in batch)
        loss = sum(self._backward(part, tokens) for part in self._parts(self.text, batch))
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), GRADIENT_NORM)
        if not (math.isfinite(loss) and norm.isfinite()):
            return False
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.cursor += len(batch)
        heal.tokens += tokens
        return True

    def _backward(self, part: Sequence[int], tokens: int) -> float:
        """Add the gradient of these sequences' share in the mean over ``tokens``; returns the share."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=_has_bf16(self.device)):
            expected = torch.cat([answer.float() for answer in self.lessons.of(part)])
            actual = self.student.logits([self.text[i] for i in part])
        loss = F.kl_div(actual.log_softmax(-1), expected, reduction="sum", log_target=True) / tokens
        loss.backward()
        return float(loss.detach())

    def _batch(self) -> Iterator[int]:
        """Sequences of the next step: all of the text once, in random order, then all of it again."""
        tokens, enough = 0, min(STEP_TOKENS, sum(map(len, self.text)))
        for at in count(self.cursor):
            epoch, place = divmod(at, len(self.text))
            i = _shuffled(len(self.text), self.heal.seed + epoch)[place]
            yield i
            tokens += len(self.text[i])
            if tokens >= enough:
                return

    # --- measuring

    def _measure(self) -> Loss:
        """The loss on held-out text where the training is; the weights are kept if they are the best."""
        heal, each = self.heal, list[Sums]()
        for part in self._parts(self.held, range(len(self.held))):
            sequences = [self.held[i] for i in part]
            with torch.no_grad():
                actual = self.student.logits(sequences).split(list(map(len, sequences)))
            each += map(sums, sequences, self.expected.of(part), actual)
        loss = Loss.of(each)
        if not heal.curve and not math.isfinite(loss.kl):
            raise Unsupported(
                reason="the model computes NaN or Inf on the held-out text, before or after the change",
                where="the pass heal",
                advice="pass another text, or change less of the model",
            )
        if heal.curve and heal.badness(loss) < heal.badness(heal.after):
            self.best = self._snapshot()
        heal.curve.append((heal.used, loss))
        return loss

    def _snapshot(self) -> Values:
        return {
            name: w.detach().to("cpu", self.dtypes[name], copy=True)
            for name, w in self.weights.items()
        }

    def _parts(self, text: Sequence[Tensor], chosen: Iterable[int]) -> Iterator[list[int]]:
        """Sequences in groups whose logits fit the memory; at least one each."""
        limit = LOGITS_BYTES // (4 * self.heal.teacher.vocab)
        part: list[int] = []
        for i in chosen:
            if part and sum(len(text[j]) for j in (*part, i)) > limit:
                yield part
                part = []
            part.append(i)
        yield part

    # --- going on after a kill

    def state(self) -> dict[str, Any]:
        moments = self.optimizer.state_dict()["state"]
        return {
            "weights": self._snapshot(), "best": self.best, "record": self.heal.record(),
            "moments": {str(i): moment for i, moment in moments.items()},
            "at": [self.step, self.cursor, self.measured],
        }  # fmt: skip

    def resume(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, value in state["weights"].items():
                self.weights[name].copy_(value)
        self.best = state["best"]
        groups = self.optimizer.state_dict()["param_groups"]
        moments = {int(i): moment for i, moment in state["moments"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.cursor, self.measured = state["at"]
        self.heal.recall(state["record"])


class _Answers:
    """The teacher's log probabilities ``[T, V]`` of each sequence, kept as far as memory allows."""

    def __init__(self, teacher: Differentiable, text: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.teacher, self.text, self.dtype = teacher, text, dtype
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0

    def of(self, part: Sequence[int]) -> list[Tensor]:
        """Those of a few sequences, by number."""
        answers = {i: self._kept[i] for i in part if i in self._kept}
        if asked := [i for i in part if i not in answers]:
            sequences = [self.text[i] for i in asked]
            with torch.no_grad():
                logits = self.teacher.logits(sequences)
            for i, one in zip(asked, logits.split(list(map(len, sequences))), strict=True):
                answers[i] = self._keep(i, one.log_softmax(-1).to(self.dtype))
        return [answers[i] for i in part]

    def _keep(self, i: int, answer: Tensor) -> Tensor:
        if self._bytes + answer.nbytes <= KEPT_BYTES:
            self._bytes += answer.nbytes
            self._kept[i] = answer
        return answer


def _shared(program: Program, values: Mapping[str, Tensor], device: torch.device) -> Values:
    """The weights of a program; those that are in ``values`` already, frozen, are not held twice."""
    found = {}
    for name in program.used_weights():
        value, twin = program.weights[name].to(device), values.get(name)
        same = twin is not None and not twin.requires_grad and torch.equal(twin, value)
        found[name] = twin if same and twin is not None else value
    return found


def _scale(weight: Tensor) -> float:
    """The learning rate of a weight, as a part of that of a narrow matrix."""
    return min(1.0, INPUTS / weight.shape[-1]) if weight.dim() > 1 else 1.0


def _magnitude(weight: Tensor) -> float:
    return float(weight.detach().abs().mean())


def _rate(done: float) -> float:
    """The learning rate, as a part of its peak: up in a line, and down to zero."""
    return min(0.01 + done / WARM_UP, (1 - done) / (1 - WARM_UP))


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _has_bf16(device: torch.device) -> bool:
    """Whether multiplying in bf16 is fast there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
