"""Scales folded into weights: exact, put wherever they cost nothing, and good for rounding."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.ir import expr
from tokenmill.ir.expr import Call, Const, Expr, Ref
from tokenmill.ir.plan import gqa_cache
from tokenmill.ir.program import Program
from tokenmill.passes.balance import Balance, Site, _scaling, find_sites
from tokenmill.passes.base import Pass
from tokenmill.passes.fuse_dequantize import FuseDequantize
from tokenmill.passes.fuse_epilogue import FuseEpilogue
from tokenmill.passes.fuse_gated import FuseGated
from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.fuse_pointwise import FusePointwise
from tokenmill.passes.fuse_residual import FuseResidual
from tokenmill.passes.fuse_residual_norm import FuseResidualNorm
from tokenmill.passes.hoist_views import HoistViews
from tokenmill.passes.merge_linears import MergeLinears
from tokenmill.passes.pipeline import pipeline, relative_error, run_passes
from tokenmill.passes.quantize import Quantize
from tokenmill.passes.rotate import Rotate
from tokenmill.recipe import Recipe, Rule
from torch import Tensor, fx

from ..models import pretrained
from .build import HIDDEN, VOCAB, Builder, apply, aten, decoder, found, mill, targets

INT4 = Recipe(
    weights="int4", rules=[Rule(match=f"role:{r}", format="int4-g32") for r in ("linear", "head")]
)
TEXT = [torch.arange(n) * 5 % VOCAB for n in (3, 40, 17)]


def fused(program: Program, recipe: Recipe = INT4, *first: Pass) -> Program:
    """The program as it is just before its weights are rounded."""
    for one in (
        *first, FuseLinear(), HoistViews(), FusePointwise(), FuseGated(), FuseResidual(), FuseEpilogue(),
        MergeLinears(recipe), FuseResidualNorm(),
    ):  # fmt: skip
        one.run(program)
    return program


@cache
def _ready(latent: bool) -> Program:
    return fused(decoder(latent))


def ready(latent: bool = True) -> Program:
    """A decoder just before its weights are rounded."""
    return _ready(latent).copy()


def readers(site: Site) -> list[str]:
    """What reads a site's value: weights, by the end of their names."""
    return [_short(r.node, r.at) for r in site.readers]


def makers(site: Site) -> list[str]:
    return [_short(s.node, s.at) for s in site.shrinks]


def _short(node: fx.Node, at: int) -> str:
    weight = node.args[at]
    name = str((weight[0] if isinstance(weight, list | tuple) else weight).target)
    return re.sub(r"^layers\.\d\.(attn|mlp)\.|\.weight$", "", name)


# --- where scales go ------------------------------------------------------------------------------


def test_every_pair_of_maps_in_a_decoder_of_latents() -> None:
    pairs = {tuple(makers(s)): readers(s) for s in find_sites(ready(), INT4)}
    assert pairs == {
        ("layers.0.norm1",): ["kv_a+q_a"],
        ("layers.1.norm1",): ["kv_a+q_a"],
        ("q_norm",): ["q_b"],
        ("kv_norm",): ["w_uk", "w_uv"],
        ("w_uv",): ["o"],
        ("layers.0.norm2",): ["gate_proj+up_proj"],
        ("layers.1.norm2",): ["gate_proj+up_proj", "experts.gate_up", "router"],
        ("gate_proj+up_proj",): ["down_proj"],
        ("experts.gate_up",): ["experts.down"],
        ("norm",): ["head"],
    }


def test_heads_that_share_values_share_scales() -> None:
    sites = find_sites(ready(latent=False), INT4)
    (first, _) = [s for s in sites if s.heads]
    assert (makers(first), readers(first), first.heads) == (["q+k+v"], ["o"], (2, 2, 4))
    assert first.shrinks[0].start == 24, "values come after 16 columns of queries and 8 of keys"
    columns = torch.arange(16.0)
    assert first.pooled(columns).tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    assert first.spread(first.pooled(columns)).tolist() == [2, 3, 4, 5] * 2 + [10, 11, 12, 13] * 2


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_a_balanced_decoder_is_the_same_decoder(latent: bool, rotated: bool) -> None:
    program = fused(decoder(latent), INT4, Rotate(INT4)) if rotated else ready(latent)
    before, balance = targets(program), Balance(INT4, TEXT)
    (matches,) = apply(program, balance)
    assert matches > 5
    assert targets(program) == before, "nothing more is computed"
    assert balance.notes == [
        f"{matches} of {len(find_sites(program, INT4))} inputs balanced by 60 tokens"
    ]


def test_a_real_architecture_stays_what_it_is() -> None:
    program = capture_pretrained(pretrained("deepseek_v2"), "deepseek_v2")
    recipe = Recipe(weights="int4", kv="fp32", rotate=True, balance=True)
    passes = {one.name: one for one in pipeline(recipe)}
    passes["balance"] = Balance(recipe, [torch.arange(64) % 61], grid=2)
    names = list(passes)
    at = names.index("rotate")
    run_passes(program, [passes[n] for n in names[:at]])
    want = program.run(list(range(40)))
    results = run_passes(program, [passes[n] for n in names[at : names.index("quantize")]])
    assert relative_error(want, program.run(list(range(40)))) < 1e-5
    notes = {r.name: r.notes for r in results}
    assert notes["rotate"] == [f"turned: {n} of width {w}" for n, w in ((1, 64), (2, 32), (2, 12))]
    assert notes["balance"][0].endswith("of 12 inputs balanced by 64 tokens")


def _mlp(b: Builder, act: Callable[[fx.Node], fx.Node], bias: bool = False) -> Program:
    x = b.embed()
    inner = act(b.linear(b.norm(x, "n"), "up", 12, bias))
    return b.finish(b(aten.add.Tensor, x, b.linear(inner, "down", HIDDEN)))


def _square_relu(b: Builder) -> Callable[[fx.Node], fx.Node]:
    return lambda x: b(aten.square.default, b(aten.relu.default, x))


def _relu(b: Builder) -> Callable[[fx.Node], fx.Node]:
    return lambda x: b(aten.relu.default, x)


def _silu(b: Builder) -> Callable[[fx.Node], fx.Node]:
    return lambda x: b(aten.silu.default, x)


@pytest.mark.parametrize(
    ("act", "power"), [(_square_relu, 0.5), (_relu, 1.0), (_silu, None)]
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_activations_that_pass_a_scale_on(
    act: Callable[[Builder], Callable[[fx.Node], fx.Node]], power: float | None, bias: bool
) -> None:
    b = Builder()
    program = fused(_mlp(b, act(b), bias))
    down = [s for s in find_sites(program, INT4) if readers(s) == ["down"]]
    assert [x.power for s in down for x in s.shrinks] == (
        [] if power is None else [power] * (1 + bias)
    )
    apply(program, Balance(INT4, TEXT))


_EXPRESSIONS = st.recursive(
    st.sampled_from([Ref("acc0"), Ref("acc1"), Ref("e0"), Const(2.0)]),
    lambda inner: st.one_of(
        st.builds(
            lambda fn, x: Call(fn, (x,)),
            st.sampled_from(["relu", "square", "silu", "neg", "abs", "tanh"]), inner,
        ),
        st.builds(
            lambda fn, x, y: Call(fn, (x, y)),
            st.sampled_from(["add", "mul", "div", "min", "max", "sub"]), inner, inner,
        ),
    ),
    max_leaves=6,
)  # fmt: skip


@given(_EXPRESSIONS, st.sampled_from([0.25, 2.0, 8.0]))
@settings(max_examples=100, deadline=None)
def test_a_scale_leaves_an_expression_as_it_went_in(tree: Expr, s: float) -> None:
    scaling = _scaling(expr.text(tree))
    if scaling is None:
        return
    part, power = scaling
    operands = {n: torch.tensor([-1.5, 0.25, 3.0], dtype=torch.float64) + i
                for i, n in enumerate(("acc0", "acc1", "e0"))}  # fmt: skip
    want = expr.evaluate(tree, operands) / s
    got = expr.evaluate(tree, operands | {f"acc{part}": operands[f"acc{part}"] / s**power})
    assert torch.allclose(got, want, equal_nan=True)


def test_a_norm_that_adds_first() -> None:
    b = Builder()
    x = b.embed()
    both = b(mill.add_rms_norm.default, x, x, b.weight("n", HIDDEN), 1e-6)
    total, normed = (b(operator.getitem, both, i) for i in (0, 1))
    program = fused(b.finish(b(aten.add.Tensor, total, b.linear(normed, "up", HIDDEN))))
    assert [makers(s) for s in find_sites(program, INT4)] == [["n"]]
    assert apply(program, Balance(INT4, TEXT)) == [1]


# --- where they must not go -----------------------------------------------------------------------


def _also_read_by_a_sum(b: Builder, x: fx.Node) -> fx.Node:
    normed = b.norm(x, "n")
    return b(aten.add.Tensor, b.linear(normed, "up", HIDDEN), normed)


def _only_a_part_is_read(b: Builder, x: fx.Node) -> fx.Node:
    return b.linear(b.cut(b.norm(x, "n"), 0, 4), "up", HIDDEN)


def _one_matrix_for_two_inputs(b: Builder, x: fx.Node) -> fx.Node:
    for n in ("n1", "n2"):
        x = b(aten.add.Tensor, x, b.linear(b.norm(x, n), "up", HIDDEN))
    return x


def _a_norm_of_heads(b: Builder, x: fx.Node) -> fx.Node:
    normed = b.norm(b.view(x, 1, -1, 2, 4), "n")
    return b.linear(b.view(normed, 1, -1, 8), "up", HIDDEN)


@pytest.mark.parametrize(
    "write",
    [_also_read_by_a_sum, _only_a_part_is_read, _one_matrix_for_two_inputs, _a_norm_of_heads],
)
def test_values_that_stay(write: Callable[[Builder, fx.Node], fx.Node]) -> None:
    b = Builder()
    program = fused(b.finish(b(aten.silu.default, write(b, b.embed()))))
    assert find_sites(program, INT4) == []


def test_values_that_are_also_keys_stay() -> None:
    b = Builder()
    q, k = (b.view(b.linear(b.embed(), n, 8), 1, -1, 2, 4) for n in ("q", "k"))
    cache = b.cache(gqa_cache("c", "fp32", 2, 4, 4))
    batch = (cache, b.positions, b.starts, b.table)
    out = b(mill.cached_attention.default, q, k, k, None, *batch, 0.5, 0, 0.0, "fp32")
    program = fused(b.finish(b.linear(b.view(out, 1, -1, 8), "o", HIDDEN)))
    assert not any("o" in readers(s) for s in find_sites(program, INT4))


def test_a_tied_head_is_balanced_apart_from_its_table() -> None:
    b = Builder()
    program = fused(b.finish(b.norm(b.embed(), "n"), head="embed.weight"))
    assert apply(program, Balance(INT4, TEXT)) == [1]
    assert "embed.weight" in program.used_weights()


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_formats_of_sixteen_bits_are_left_alone(weights: str) -> None:
    recipe = Recipe.model_validate({"weights": weights})
    assert find_sites(fused(decoder(), recipe), recipe) == []


def test_without_text_nothing_is_balanced() -> None:
    program, balance = ready(), Balance(INT4)
    used = program.used_weights()
    assert (apply(program, balance), program.used_weights()) == ([0], used)
    assert balance.notes == ["no text to measure inputs on: nothing is balanced"]


# --- which scales ---------------------------------------------------------------------------------


def test_experts_that_saw_nothing_keep_their_weights() -> None:
    program = ready()
    before = program.weights["layers.1.mlp.experts.down"]
    apply(program, Balance(INT4, [torch.tensor([4])]))  # one token, two experts of four
    (experts,) = found(program, mill.experts)
    after = program.weights[experts.args[4][0].target]
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(same) == 2


def test_dead_channels_have_scales_too() -> None:
    program = decoder()
    program.weights["norm"][:3] = 0.0
    apply(fused(program), Balance(INT4, TEXT))
    assert all(torch.isfinite(program.weights[n]).all() for n in program.used_weights())


def test_two_runs_are_the_same_numbers() -> None:
    first, second = ready(), fused(decoder())
    for program in (first, second):
        Balance(INT4, TEXT).run(program)
    assert first.used_weights() == second.used_weights()
    for name in first.used_weights():
        assert torch.equal(first.weights[name], second.weights[name])


def test_copies_of_a_program_do_not_mix() -> None:
    """What copies compute they share by name, so other scales must have other names."""
    names: list[set[str]] = []
    for text in (TEXT, [torch.tensor([9, 1])]):
        Balance(INT4, text).run(program := ready())
        names.append({n for n in program.used_weights() if "balanced" in n})
    assert all(names)
    assert not names[0] & names[1]


def test_of_a_long_text_few_rows_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    search = Balance._search

    def spy(self: Balance, program: Program, site: Site, seen: object) -> Tensor | None:
        kept.append(sum(map(len, seen.rows)))  # type: ignore[attr-defined]
        return search(self, program, site, seen)  # type: ignore[arg-type]

    monkeypatch.setattr(Balance, "_search", spy)
    Balance(INT4, [torch.arange(90) % VOCAB] * 4, samples=10).run(ready())
    assert kept
    assert max(kept) <= 12


# --- what it is for -------------------------------------------------------------------------------


def _outlying(seed: int, channels: int = 64) -> Program:
    """Gated layers in which two channels of 64 carry inputs thirty times the others'."""
    b = Builder(seed)
    x = b.embed(width=channels)
    for i in range(3):
        for name, *shape in (("gate", 96, channels), ("up", 96, channels), ("down", channels, 96)):
            b.weight(f"{name}{i}.weight", *shape, scale=0.15)
        normed = b.norm(x, f"n{i}")
        gate, up = (b.linear(normed, f"{n}{i}", 96) for n in ("gate", "up"))
        inner = b(aten.mul.Tensor, b(aten.silu.default, gate), up)
        x = b(aten.add.Tensor, x, b.linear(inner, f"down{i}", channels))
        norm = b.program.weights[f"n{i}"].fill_(0.3)
        norm[[5, 41]] *= 30.0
    return b.finish(b.norm(x, "norm"))


@pytest.mark.parametrize("format", ["int4-g128", "int8"])
def test_rounding_hurts_less_where_inputs_stood_out(format: str) -> None:
    rules = [Rule(match=f"role:{r}", format=format) for r in ("linear", "head")]
    recipe = Recipe(weights="int8", rules=rules)
    ratios = []
    for seed in range(3):
        errors = []
        for passes in ([], [Balance(recipe, TEXT)]):
            program = fused(_outlying(seed), recipe)
            want = program.run(list(range(VOCAB)))
            for one in (*passes, Quantize(recipe), FuseDequantize()):
                one.run(program)
            errors.append(relative_error(want, program.run(list(range(VOCAB)))))
        ratios.append(errors[1] / errors[0])
    assert sum(ratios) / 3 < 0.75
    assert max(ratios) < 0.9
