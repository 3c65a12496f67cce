"""Keys and values become latents: exact steps are exact, lossy ones lose what they say, and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.capture.module import capture
from tokenmill.errors import BadRecipe, LossTooHigh, Unsupported
from tokenmill.ir.program import Program, Stage
from tokenmill.passes.base import calls, mill
from tokenmill.passes.latent_factors import (
    Heads,
    Inputs,
    Rotation,
    channels,
    factorise,
    linearised,
)
from tokenmill.passes.latent_kv import Choice, LatentKV, _Trials, measured_loss
from tokenmill.passes.latent_sites import find_sites, measure
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import KvCompress, Recipe
from torch import Tensor, nn

from ..models import CONFIGS, VOCAB, hand_written, pretrained

_PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
# What the algebra must cope with, each without a norm on queries or keys, so that no step before the
# factorisation may change the logits.
EXACT: dict[str, Callable[[], Any]] = {
    "grouped": lambda: transformers.LlamaConfig(**_PLAIN),
    "multi_head": lambda: transformers.LlamaConfig(**_PLAIN | {"num_key_value_heads": 4}),
    "one_key": lambda: transformers.LlamaConfig(**_PLAIN | {"num_key_value_heads": 1}),
    "heads_wider_than_hidden": lambda: transformers.LlamaConfig(**_PLAIN, head_dim=20),
    "biases": lambda: transformers.Qwen2Config(**_PLAIN),
    "all_biases": lambda: transformers.LlamaConfig(**_PLAIN, attention_bias=True),
    "partial_and_interleaved": lambda: transformers.GlmConfig(
        **_PLAIN, head_dim=12, pad_token_id=0
    ),
    "scaled_rotation": lambda: transformers.LlamaConfig(**_PLAIN, rope_parameters=_YARN),
}


def dialect(model: nn.Module) -> Program:
    if hasattr(model, "set_attn_implementation"):
        program = capture_pretrained(model, "model")
    else:
        program = capture(model, max_positions=128)
    passes = pipeline(Recipe(weights="fp32", kv="fp32"))
    names = [p.name for p in passes]
    run_passes(program, passes[: names.index("select_rows") + 1])
    return program


def random_model(config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0.0
            parameter.mul_(2.5).add_(noise)
    return model


def text(sequences: int, length: int = 60, seed: int = 0, vocab: int = VOCAB) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=rng) for _ in range(sequences)]


@cache
def _captured(name: str) -> Program:
    if name == "hand_written":
        return dialect(hand_written())
    return dialect(random_model(EXACT[name]()) if name in EXACT else pretrained(name))


def program_of(name: str) -> Program:
    return _captured(name).copy()


def trials(program: Program) -> _Trials:
    sites, refused = find_sites(program)
    assert sites
    assert not refused
    sequences = text(4, vocab=program.vocab)
    return _Trials(program, sites, measure(program, sites, sequences), sequences[:2])


def everything(found: _Trials, fold: int = 1) -> Choice:
    layers = len(found.layers)
    return Choice(fold, torch.arange(found.count), [None] * layers, [1.0] * layers)


def worst(program: Program, other: Program) -> float:
    ids = text(1, 70, seed=9, vocab=program.vocab)[0]
    wanted = program.run(ids)
    return float((other.run(ids) - wanted).abs().max() / wanted.std())


# --- exact steps ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*EXACT, "hand_written"])
def exact(request: pytest.FixtureRequest) -> _Trials:
    return trials(program_of(request.param))


def test_scaling_and_turning_change_nothing(exact: _Trials) -> None:
    assert all(site.exact for site in exact.sites)
    made, _ = exact.convert(everything(exact))
    assert not list(calls(made, mill.attention))
    assert worst(exact.program, made) < 1e-4


def test_without_a_rank_only_dropping_rotations_loses(exact: _Trials) -> None:
    """The parts of keys that keep no rotation are exact at distance 0, so one token alone is exact."""
    some = replace(everything(exact), slots=torch.arange(exact.count // 2))
    made, _ = exact.convert(some)
    assert 1e-4 < worst(exact.program, made) < 2.0
    ids = torch.tensor([5])
    assert torch.allclose(made.run(ids), exact.program.run(ids), atol=1e-4)


def test_the_cache_shrinks_and_holds_what_was_asked_for(exact: _Trials) -> None:
    choice = replace(exact.uniform(1, 2, 16), ranks=[16] * len(exact.layers))
    made, names = exact.convert(choice)
    assert set(names) <= set(made.used_weights())
    for node in calls(made, mill.latent_attention):
        latent, rotary = (node.args[i].meta["val"].shape[-1] for i in (1, 2))
        assert (latent, rotary) == (min(16, latent), 4)
        assert made.weights.like(node.args[3][0].target).shape[-1] == latent


def test_norms_on_queries_and_keys_become_the_closest_linear_maps() -> None:
    found = trials(program_of("qwen3_moe"))
    assert not any(site.exact for site in found.sites)
    made, _ = found.convert(everything(found))
    assert measured_loss(found.program, made, found.held).kl < 0.5


# --- the algebra ------------------------------------------------------------------------------------


def layer(
    heads: int, groups: int, pairs: int, still: int, seed: int
) -> tuple[Heads, Inputs, Rotation]:
    rng = torch.Generator().manual_seed(seed)
    width, n = 2 * pairs + still, 24

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    found = Heads(
        draw(heads, width, n), draw(groups, width, n), draw(groups, 6, n), draw(heads, width),
        draw(groups, width), draw(groups, 6), draw(heads, 6, 20),
    )  # fmt: skip
    x = draw(500, n) @ draw(n, n) + draw(n)
    inputs = Inputs(x.T @ x / len(x), x.mean(0))
    angle = torch.polar(
        torch.ones(40, pairs, dtype=torch.float64),
        torch.arange(40)[:, None] * 10.0 ** -torch.linspace(0, 3, pairs, dtype=torch.float64),
    )
    distance = torch.rand(40, generator=rng, dtype=torch.float64)
    columns = torch.randperm(width, generator=rng)
    rotation = Rotation(
        columns[:pairs], columns[pairs : 2 * pairs], angle, distance / distance.sum()
    )
    return found, inputs, rotation


shapes = st.tuples(
    st.sampled_from([(1, 1), (4, 2), (6, 3), (4, 4)]), st.integers(1, 5), st.integers(0, 3),
    st.integers(0, 99),
)  # fmt: skip


@given(shapes, st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_channels_are_orthonormal_and_stay_in_their_fold(shape: Any, fold: int) -> None:
    (heads, groups), pairs, still, seed = shape
    found = channels(*layer(heads, groups, pairs, still, seed), fold)
    flat = found.axes.flatten(1)
    assert torch.allclose(flat @ flat.T, torch.eye(len(flat), dtype=torch.float64), atol=1e-9)
    for axis, owner in zip(found.axes, found.fold.tolist(), strict=True):
        members = axis.abs().sum(-1).nonzero().flatten() // fold
        assert set(members.tolist()) <= {owner}


@given(shapes, st.sampled_from([1, 2]), st.floats(0.2, 5.0))
@settings(max_examples=25, deadline=None)
def test_at_full_rank_scores_and_outputs_are_those_of_keys_and_values(
    shape: Any, fold: int, balance: float
) -> None:
    """Of unrotated parts: what stays rotary is compared on whole models."""
    (heads, groups), pairs, still, seed = shape
    one, inputs, rotation = layer(heads, groups, pairs, still, seed)
    found = channels(one, inputs, rotation, fold)
    latent = factorise(one, inputs, rotation, found, torch.arange(0), balance).latent()
    x = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    c = x @ latent.down.T
    query = torch.einsum("hdn,tn->htd", one.query, x)
    group = one.group
    keys = torch.einsum("gdn,tn->gtd", one.key, x)
    real, imaginary = rotation.real, rotation.imaginary
    turned = torch.complex(keys[..., real], keys[..., imaginary]) * rotation.constant
    keys[..., real], keys[..., imaginary] = turned.real, turned.imag
    scores = torch.einsum("htd,hsd->hts", query, keys.repeat_interleave(group, 0))
    ours = torch.einsum("htd,hdr,sr->hts", query, latent.w_uk, c)
    assert torch.allclose(ours, scores, atol=1e-6 * float(scores.abs().max() + 1))
    values = torch.einsum("gvn,tn->gtv", one.value, x).repeat_interleave(group, 0)
    bias = one.value_bias.repeat_interleave(group, 0)[:, None]
    added = torch.einsum("htv,hvn->tn", values + bias, one.output)
    made = torch.einsum("hvr,tr->htv", latent.w_uv, c)
    assert torch.allclose(
        torch.einsum("htv,hvn->tn", made, one.output) + latent.output_bias, added,
        atol=1e-6 * float(added.abs().max() + 1),
    )  # fmt: skip


def test_fewer_latents_lose_the_weakest_and_the_mean_value_stays() -> None:
    one, inputs, rotation = layer(4, 2, 3, 2, 7)
    factors = factorise(one, inputs, rotation, channels(one, inputs, rotation, 1), torch.arange(2))
    assert factors.tail[0] == 1
    assert factors.tail[-1] == 0
    assert bool((factors.tail.diff() <= 0).all())
    latent = factors.latent(3)
    mean = torch.einsum("hvr,r->hv", latent.w_uv, latent.down @ inputs.mean)
    added = torch.einsum("hv,hvn->n", mean, one.output) + latent.output_bias
    values = (one.value @ inputs.mean + one.value_bias).repeat_interleave(one.group, 0)
    assert torch.allclose(added, torch.einsum("hv,hvn->n", values, one.output))


def test_the_mean_rotation_is_the_closest_constant() -> None:
    _, _, rotation = layer(4, 2, 3, 0, 1)
    weight = rotation.distance[:, None]

    def error(constant: Tensor) -> Tensor:
        return (weight * (rotation.relative - constant).abs().square()).sum(0)

    best = error(rotation.constant)
    for other in (torch.ones(3), 1.01 * rotation.constant, rotation.constant + 0.01j):
        assert bool((error(other) >= best).all())


def test_a_linear_function_is_found_again() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=rng, dtype=torch.float64)
    w = torch.randn(5, 12, generator=rng, dtype=torch.float64)
    found = linearised(x.T @ x, w @ x.T @ x, torch.zeros_like(w))
    assert torch.allclose(found, w, rtol=1e-3, atol=1e-3)


# --- the pass ---------------------------------------------------------------------------------------


def convert(program: Program, **options: Any) -> LatentKV:
    sequences = text(5, vocab=program.vocab)
    one = LatentKV(KvCompress(**{"heal_steps": 2} | options), sequences[:3], sequences[3:])
    one.run(program)
    return one


@pytest.mark.parametrize("how", [{"save": "50%"}, {"rank": 16}, {"rank": 32, "rotary": 8}])
def test_a_model_is_converted_healed_and_still_runs(how: dict[str, Any]) -> None:
    program = program_of("multi_head")
    original = program.copy()
    one = convert(program, **how)
    assert program.stage == Stage.DIALECT
    assert len(list(calls(program, mill.latent_attention))) == 2
    steps = one.facts["steps"]
    assert [s["exact"] for s in steps] == [True] + [False] * (len(steps) - 1)
    assert steps[0]["kl"] < 1e-7
    assert steps[-1]["step"] == "heal"
    loss = measured_loss(original, program, text(5)[3:])
    assert loss.kl == pytest.approx(steps[-1]["kl"], rel=1e-3)
    after = one.facts["values_after"]
    if "save" in how:
        assert after <= one.facts["values_before"] / 2
    else:
        assert all(layer["rank"] == how["rank"] for layer in one.facts["layers"])
    if "rotary" in how:
        assert all(layer["rotary"] == how["rotary"] for layer in one.facts["layers"])


def test_a_fixed_number_of_steps_gives_the_same_weights() -> None:
    made = []
    for _ in range(2):
        program = program_of("grouped")
        convert(program, save="40%")
        made.append(program.run(text(1)[0]))
    assert torch.equal(*made)


def test_a_dry_run_has_the_shapes_of_the_real_one() -> None:
    program = program_of("multi_head")
    dry = LatentKV(KvCompress(rank=16, rotary=8))
    dry.run(program)
    real = convert(program_of("multi_head"), rank=16, rotary=8)
    assert dry.facts["layers"] == real.facts["layers"]
    assert dry.facts["values_after"] == real.facts["values_after"] == 2 * (16 + 8)


def test_what_loses_too_much_is_refused() -> None:
    program = program_of("grouped")
    with pytest.raises(LossTooHigh, match=r"0\.0001%"):
        convert(program, save="80%", max_loss="0.0001%")
    assert list(calls(program, mill.attention)), "the program stays as it was"


def test_a_rank_that_saves_nothing_is_refused() -> None:
    with pytest.raises(BadRecipe, match="not fewer than the 96"):
        LatentKV(KvCompress(rank=96)).run(program_of("multi_head"))


def test_auto_takes_what_fits() -> None:
    program = program_of("multi_head")
    one = convert(program, save="auto", max_loss="100000%")
    assert one.facts["values_after"] <= one.facts["values_before"] / 8 + 2 * 16


@pytest.mark.parametrize(
    ("model", "reason"),
    [("mixtral", "sliding window"), ("deepseek_v3", "none")],
)
def test_a_model_that_cannot_be_converted_says_why(model: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        convert(program_of(model), save="50%")


def test_sites_are_named_by_their_modules() -> None:
    sites, _ = find_sites(program_of("llama"))
    assert [s.path for s in sites] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert all(s.cached == 2 * 2 * 16 for s in sites)
    assert "llama" in CONFIGS
