"""A damaged program is trained back towards what it was, by the weights that are named, and by no others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenmill.errors import BadRequest, BadToken, Unsupported
from tokenmill.ir.program import Program, Stage
from tokenmill.passes import heal as module
from tokenmill.passes.heal import Heal
from tokenmill.passes.workspace import Workspace
from torch import Tensor

from .build import VOCAB, decoder, found, mill


def _uncached(program: Program) -> Program:
    """The decoder as it is before cache insertion."""
    for node in found(program, mill.cached_attention, mill.cached_latent_attention):
        with program.graph.inserting_before(node):
            if node.target is mill.cached_attention.default:
                new = program.call(mill.attention.default, *node.args[:4], *node.args[8:11])
            else:
                new = program.call(mill.latent_attention.default, *node.args[:5], *node.args[9:11])
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
    for node in [n for n in program.graph.nodes if n.op == "placeholder" and not n.users]:
        program.graph.erase_node(node)
    program.caches.clear()
    program.stage = Stage.DIALECT
    return program


def _text(sequences: int = 6, length: int = 80, seed: int = 1) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=rng) for _ in range(sequences)]


def _damaged(latent: bool = True) -> tuple[Program, Program, list[str]]:
    """A teacher, its twin with noise on all matrices of attention, and their names."""
    teacher = _uncached(decoder(latent))
    program = teacher.copy()
    names = [
        n for n in program.used_weights() if ".attn." in n and program.weights.like(n).dim() > 1
    ]
    rng = torch.Generator().manual_seed(2)
    for name in names:
        value = program.weights[name]
        noisy = value + 0.3 * value.std() * torch.randn(value.shape, generator=rng)
        program.weights.settle(name, lambda noisy=noisy: noisy)
    return teacher, program, names


def _heal(teacher: Program, names: list[str], **options: Any) -> Heal:
    options = {"steps": 16, "learning_rate": 1e-2} | options
    return Heal(teacher, names, _text(), _text(3, seed=7), **options)


def _values(program: Program) -> dict[str, Tensor]:
    return {name: program.weights[name].clone() for name in program.used_weights()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("latent", [True, False])
def test_what_was_damaged_heals(latent: bool) -> None:
    teacher, program, names = _damaged(latent)
    before, original = _values(program), _values(teacher)
    heal = _heal(teacher, names)
    assert heal.run(program) == len(names)
    assert heal.after.kl < 0.4 * heal.before.kl
    after = _values(program)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == set(names)
    assert _same(original, _values(teacher))
    assert all(program.weights.roots(name) == [name] for name in names)
    assert "weights healed" in heal.notes[0]


def test_the_loss_that_is_told_is_that_of_the_program() -> None:
    teacher, program, names = _damaged()
    heal = _heal(teacher, names)
    heal.run(program)
    kl, tokens = 0.0, 0
    for ids in heal.held:
        p, q = (one.run(ids)[:-1].double().log_softmax(-1) for one in (teacher, program))
        kl += float((p.exp() * (p - q)).sum())
        tokens += len(ids) - 1
    assert heal.after.kl == pytest.approx(kl / tokens, rel=1e-3)
    assert heal.after.tokens == tokens
    minutes, losses = zip(*heal.curve, strict=True)
    assert minutes[0] == 0.0
    assert list(minutes) == sorted(minutes)
    assert len(losses) == module.MEASUREMENTS + 1
    assert heal.tokens == 16 * 6 * 80


def test_steps_give_the_same_weights_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP_TOKENS", 100)
    results = []
    for seed in (0, 0, 1):
        teacher, program, names = _damaged()
        _heal(teacher, names, steps=5, seed=seed).run(program)
        results.append(_values(program))
    assert _same(results[0], results[1])
    assert not _same(results[0], results[2])


def test_a_weight_of_many_uses_and_a_derived_one() -> None:
    teacher, program, names = _damaged()
    name = "layers.0.mlp.gate_proj.weight"
    program.weights.derive("gate", partial(torch.mul, other=1.5), name)
    for node in [n for n in program.graph.nodes if n.op == "get_attr"]:
        if node.target == name:
            node.target = "gate"
    _heal(teacher, ["gate", *names]).run(program)
    assert program.weights.roots("gate") == [name]
    assert not torch.equal(program.weights["gate"], 1.5 * program.weights[name])
    assert torch.equal(program.weights[name], teacher.weights[name])


def test_it_ends_when_the_loss_is_small_enough() -> None:
    teacher, program, names = _damaged()
    heal = _heal(teacher, names, max_loss=0.1)
    heal.run(program)
    assert heal.after.guarded <= 0.1 < heal.before.guarded
    assert len(heal.curve) < module.MEASUREMENTS
    assert "is within 0.1000 nats" in heal.notes[-1]
    healed = _values(program)
    again = _heal(teacher, names, max_loss=1.0)
    again.run(program)
    assert again.tokens == 0
    assert _same(_values(program), healed)


def test_the_clock_ends_it_with_a_rate_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rates = [0.0], []

    def monotonic() -> float:
        now[0] += 1.0
        return now[0]

    adam = torch.optim.AdamW.step

    def step(self: Any, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return adam(self, *args)

    monkeypatch.setattr(module.time, "monotonic", monotonic)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    teacher, program, names = _damaged()
    told: list[tuple[int, int]] = []
    heal = _heal(
        teacher, names, steps=None, minutes=1.0,
        progress=lambda what, done, total: told.append((done, total)),
    )  # fmt: skip
    heal.run(program)
    assert 1.0 <= heal.used < 1.1
    assert told[-1] == (60, 60)
    assert max(rates) <= 1e-2
    assert rates[0] < 0.1 * max(rates)
    assert rates[-1] < 0.1 * max(rates)
    assert heal.after.kl < heal.before.kl


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_training_that_diverges_costs_nothing(rate: float) -> None:
    teacher, program, names = _damaged()
    before = _values(program)
    heal = _heal(teacher, names, learning_rate=rate)
    heal.run(program)
    assert heal.after == heal.before
    assert _same(before, _values(program))
    assert ("diverged after" if rate == 1e30 else "nothing was gained") in heal.notes[-1]


def test_logits_that_fit_no_memory_are_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (1 << 28, 4 * VOCAB * 170):
        monkeypatch.setattr(module, "LOGITS_BYTES", limit)
        monkeypatch.setattr(module, "KEPT_BYTES", limit)
        monkeypatch.setattr(module, "_has_bf16", lambda device: False)
        teacher, program, names = _damaged()
        _heal(teacher, names, steps=3).run(program)
        results.append(_values(program))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)


def test_sequences_of_any_length_are_learned_from() -> None:
    teacher, program, names = _damaged()
    text = [ids for n in (0, 1, 128, 5) for ids in _text(1, n)]
    heal = Heal(teacher, names, text, [*_text(2, 30, 7), *_text(1, 1), *_text(1, 0)], steps=2)
    heal.run(program)
    assert heal.tokens == 2 * 134
    assert heal.after.tokens == 2 * 29


# --- going on after a kill --------------------------------------------------------------------------


class Killed(Exception):
    pass


def _until(stop: int | None) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if stop is not None and done >= stop:
            raise Killed

    return progress


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "STEP_TOKENS", 160)
    teacher, whole, names = _damaged()
    uninterrupted = _heal(teacher, names, steps=12)
    uninterrupted.run(whole)
    learned = []
    learn = module._Training._learn

    def counted(self: Any, done: float) -> bool:
        learned.append(done)
        return learn(self, done)

    monkeypatch.setattr(module._Training, "_learn", counted)
    for stop in (4, 9, None, None):
        teacher, program, names = _damaged()
        work = Workspace(tmp_path / "work", {"of": "this"})
        heal = _heal(teacher, names, steps=12, workspace=work, progress=_until(stop))
        if stop is None:
            heal.run(program)
        else:
            with pytest.raises(Killed):
                heal.run(program)
    assert len(learned) == 12
    assert _same(_values(program), _values(whole))
    assert [loss for _, loss in heal.curve] == [loss for _, loss in uninterrupted.curve]
    assert heal.tokens == uninterrupted.tokens
    assert work.load_state() is None  # other passes keep theirs there

    teacher, program, names = _damaged()
    other = _heal(teacher, names, steps=6, workspace=work)
    other.run(program)
    assert len(learned) == 12 + 6


def test_minutes_that_were_used_before_a_kill_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def monotonic() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(module.time, "monotonic", monotonic)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    for stop in (30, None):
        teacher, program, names = _damaged()
        work = Workspace(tmp_path / "work", {})
        options = {"steps": None, "minutes": 1.0, "workspace": work, "progress": _until(stop)}
        heal = _heal(teacher, names, **options)
        began = now[0]
        if stop is None:
            heal.run(program)
        else:
            with pytest.raises(Killed):
                heal.run(program)
        now[0] += 1000.0
    assert now[0] - 1000.0 - began < 40.0
    assert 1.0 <= heal.used < 1.1


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ([], BadRequest, "text to heal on has no token to predict"),
        ([torch.tensor([3])], BadRequest, "no token to predict"),
        ([torch.zeros(129, dtype=torch.int64)], BadRequest, "129 tokens, and the model has 128"),
        ([torch.tensor([1, VOCAB])], BadToken, f"token id {VOCAB} at position 1"),
    ],
)
def test_texts_that_cannot_be_used(text: list[Tensor], error: type[Exception], match: str) -> None:
    teacher, program, names = _damaged()
    with pytest.raises(error, match=match):
        Heal(teacher, names, text, _text(2)).run(program)
    held = match.replace("text to heal on", "held-out text")
    with pytest.raises(error, match=held):
        Heal(teacher, names, _text(2), text).run(program)


def test_a_model_that_overflows_is_refused() -> None:
    teacher, program, names = _damaged()
    broken = program.weights[names[0]] * torch.inf
    program.weights.settle(names[0], lambda: broken)
    with pytest.raises(Unsupported, match="NaN or Inf on the held-out text"):
        _heal(teacher, names).run(program)


def test_weights_that_cannot_be_trained() -> None:
    teacher, program, names = _damaged()
    with pytest.raises(ValueError, match="does not use 'nowhere'"):
        _heal(teacher, ["nowhere"]).run(program)
    program.weights.derive("more", torch.neg, names[0])
    program.graph.output_node().prepend(program.weight("more"))
    with pytest.raises(ValueError, match=f"'more' is computed from '{names[0]}'"):
        _heal(teacher, names).run(program)
    program.stage = Stage.FUSED
    with pytest.raises(ValueError, match="DIALECT"):
        _heal(teacher, names).run(program)
