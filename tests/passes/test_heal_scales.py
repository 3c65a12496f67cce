"""Scales learn from what the weights were: they alone, and a kernel's program gains by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenmill import Recipe, load, optimize
from tokenmill.errors import BadRecipe
from tokenmill.ir.loss import divergence
from tokenmill.ir.program import Program
from tokenmill.passes.calibrate import Calibrate
from tokenmill.passes.differentiate import Differentiable
from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.heal_scales import HealScales, before_rounding
from tokenmill.passes.pipeline import Fit, pipeline
from tokenmill.passes.quantize import Quantize
from tokenmill.passes.workspace import Workspace
from tokenmill.recipe import Budget, Healing, Rule
from torch import Tensor

from .build import VOCAB, apply, decoder, logits

INT4 = Recipe(
    weights="int4-g32", rules=[Rule(match="role:linear", format="int4-g32")]
)  # the head is INT8
STEPS = Healing(steps=24)


def _text(sequences: int, seed: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (64,), generator=rng) for _ in range(sequences)]


def _quantized(latent: bool = True) -> Program:
    program = decoder(latent)
    apply(program, FuseLinear(), exact=False)
    apply(program, Quantize(INT4), exact=False)
    return program


def _values(program: Program) -> dict[str, Tensor]:
    return {name: program.weights[name].clone() for name in program.used_weights()}


@pytest.mark.parametrize("latent", [True, False])
def test_scales_of_four_bits_heal_and_nothing_else_changes(latent: bool) -> None:
    program = _quantized(latent)
    before = _values(program)
    heal = HealScales(STEPS, _text(8, 1), _text(3, 2))
    apply(program, heal, exact=False)
    after = _values(program)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(".int4-g32.scale") for name in changed)
    assert all(after[name].dtype == before[name].dtype for name in after)
    assert heal.facts is not None
    (_, _, _, _, first, _), *_, (_, _, _, _, last, _) = heal.facts["curve"]
    assert last < 0.8 * first


@pytest.mark.parametrize("latent", [True, False])
def test_it_learns_from_the_weights_as_they_were(latent: bool) -> None:
    program = _quantized(latent)
    apply(program, Calibrate(_text(8, 1)), exact=False)
    teacher, scales = before_rounding(program)
    for got, want in zip(logits(teacher), logits(decoder(latent)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert scales
    assert set(scales) <= set(program.used_weights())


@pytest.mark.parametrize("latent", [True, False])
def test_training_computes_what_the_program_does(latent: bool) -> None:
    """With caches and dequantization in the graph, of several sequences at once."""
    program, sequences = _quantized(latent), _text(3, 4)
    got = Differentiable(program, _values(program)).logits(sequences).split([64] * 3)
    for one, ids in zip(got, sequences, strict=True):
        torch.testing.assert_close(one, program.run(ids.tolist()), rtol=1e-4, atol=1e-4)


def test_a_finished_run_is_kept(tmp_path: Path) -> None:
    heals = [
        HealScales(STEPS, _text(8, 1), _text(3, 2), Workspace(tmp_path / "work", {}))
        for _ in range(2)
    ]
    programs = [_quantized() for _ in heals]
    for program, heal in zip(programs, heals, strict=True):
        apply(program, heal, exact=False)
    first, second = map(_values, programs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert heals[0].facts == heals[1].facts


def test_without_four_bits_there_is_nothing_to_heal() -> None:
    program = decoder()
    apply(program, FuseLinear(), exact=False)
    apply(program, Quantize(Recipe(weights="int8")), exact=False)
    heal = HealScales(STEPS, _text(8, 1), _text(3, 2))
    with pytest.raises(BadRecipe, match="fewer than 8 bits"):
        heal.run(program)


def test_it_is_in_the_pipeline_behind_the_rounding() -> None:
    fit = Fit(_text(2, 1), _text(2, 1), _text(2, 2))
    recipe = INT4.model_copy(update={"rounding": "gptq", "heal_scales": STEPS})
    names = [one.name for one in pipeline(recipe, fit)]
    assert names.index("quantize") < names.index("calibrate") < names.index("heal_scales")
    assert "heal_scales" not in [one.name for one in pipeline(recipe)]  # a dry run


def test_a_number_is_minutes_and_a_budget_is_refused() -> None:
    assert Recipe(heal_scales=3).heal_scales == Healing(minutes=3.0)
    with pytest.raises(BadRecipe, match="search first"):
        Recipe(heal_scales=3, budget=Budget(max_loss="1%"))
    with pytest.raises(BadRecipe, match="heal_scales"):
        Recipe(heal_scales=0)


def test_an_artifact_is_closer_to_its_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    rng = torch.Generator().manual_seed(3)
    *text, unseen = [torch.randint(0, 64, (96,), generator=rng) for _ in range(49)]
    with torch.no_grad():
        wanted = model(unseen[None]).logits[0]
    losses = []
    for heal in (None, Healing(steps=40)):
        recipe = INT4.model_copy(update={"heal_scales": heal})
        path = tmp_path / ("healed" if heal else "rounded")
        compiled = optimize(model, path, recipe=recipe, calibration_ids=text)
        assert (compiled.facts["heal_scales"] is None) == (heal is None)
        with load(path) as session:
            got = torch.from_numpy(session.logits(unseen.tolist()))
        losses.append(float(divergence(wanted, got).mean()))
    assert losses[1] < 0.95 * losses[0]
