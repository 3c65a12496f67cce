import itertools
import operator

import pytest
import torch
from tokenmill.errors import NotLowered
from tokenmill.ir import plan as ir
from tokenmill.ir import quant
from tokenmill.ir.plan import Capacity, Operand, Plan
from tokenmill.ir.program import Program
from tokenmill.passes.fuse_dequantize import FuseDequantize
from tokenmill.passes.fuse_epilogue import FuseEpilogue
from tokenmill.passes.fuse_gated import FuseGated
from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.fuse_pointwise import FusePointwise
from tokenmill.passes.fuse_residual import FuseResidual
from tokenmill.passes.fuse_residual_norm import FuseResidualNorm
from tokenmill.passes.hoist_views import HoistViews
from tokenmill.passes.lower import lower
from tokenmill.passes.memory import memory
from tokenmill.passes.merge_linears import MergeLinears
from tokenmill.passes.quantize import Quantize
from tokenmill.recipe import Recipe

from .build import (
    LENGTHS,
    Builder,
    apply,
    assert_close,
    aten,
    decoder,
    mill,
    run_placed,
    run_plan,
    tokens,
)


@pytest.fixture(autouse=True)
def exact_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the rounding of activations that formats ask for, a plan computes what its program does."""
    monkeypatch.setattr(quant, "round_inputs", lambda x, fmt: x)


def compiled(program: Program, weights: str = "fp32", **fields: object) -> Plan:
    recipe = Recipe.model_validate({"weights": weights} | fields)
    apply(
        program, FuseLinear(), HoistViews(), FusePointwise(), FuseGated(), FuseResidual(),
        FuseEpilogue(), MergeLinears(recipe), FuseResidualNorm(),
    )  # fmt: skip
    apply(program, Quantize(recipe), FuseDequantize(), exact=False)
    return checked(program)


def checked(program: Program) -> Plan:
    """The plan, after a comparison with the program; both ways of running it must agree."""
    plan = memory(lower(program, Capacity(128, 8)))
    assert ir.load(ir.dump(plan)) == plan
    for length in LENGTHS:
        rows = list(range(length))[-3:]
        want = program.run(tokens(length), rows)
        got = [run(plan, program, tokens(length), rows) for run in (run_plan, run_placed)]
        assert_close(got, [want, want])
    return plan


def kinds(plan: Plan) -> list[str]:
    return [step.spec.kind for step in plan.steps]


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "fp8", "int4", "int4-g128"])
@pytest.mark.parametrize("latent", [True, False])
def test_a_decoder_becomes_kernels_only(latent: bool, weights: str) -> None:
    program = decoder(latent)
    plan = compiled(program, weights)
    assert not plan.extern_steps
    assert "pointwise" not in kinds(plan)
    for buffer in plan.buffers.values():
        if buffer.kind == "weight":
            like = program.weights.like(buffer.name)
            assert (buffer.shape, ir.DTYPE_BYTES[buffer.dtype]) == (like.shape, like.itemsize)


def test_embeddings_in_int8() -> None:
    rules = [{"match": "role:embedding", "format": "int8"}]
    plan = compiled(decoder(), "bf16", rules=rules)
    embed = next(s for s in plan.steps if isinstance(s.spec, ir.Embed) and "q" in s.bind)
    q, scale = (plan.buffers[embed.bind[part].buffer] for part in ("q", "scale"))
    assert (q.dtype, q.shape) == ("i8", (embed.spec.vocab, embed.spec.width))
    assert (scale.dtype, scale.shape) == ("f32", (embed.spec.vocab,))


def test_steps_of_a_layer() -> None:
    plan = compiled(decoder())
    layer = [s.spec.kind for s in plan.steps if s.where.startswith("layers.1")]
    assert layer == [
        "norm", "linear", "norm", "linear", "rope", "norm", "rope", "cache_write", "latent_attend",
        "linear", "norm", "linear", "route", "linear", "linear", "experts", "norm", "select_rows",
        "linear",
    ]  # fmt: skip
    assert [s.rows for s in plan.steps[-3:]] == ["tokens", "rows", "rows"]


def test_layers_share_their_kernels() -> None:
    plan = compiled(decoder())
    first = {s.spec for s in plan.steps if s.where.startswith("layers.0.attn")}
    second = {s.spec for s in plan.steps if s.where.startswith("layers.1.attn")}
    assert first == second


def test_rope_turns_its_input_in_place() -> None:
    plan = compiled(decoder(latent=False))
    ropes = [s for s in plan.steps if isinstance(s.spec, ir.Rope)]
    assert len(ropes) == 4
    assert all(s.bind["x"] == s.bind["out"] for s in ropes)


def test_rope_spares_what_is_needed_later() -> None:
    b = Builder()
    x = b.view(b.linear(b.embed(), "a", 8), 1, -1, 2, 4)
    angles = b.angles(2)
    first = b(mill.rope.default, x, *angles, 0, False)
    second = b(mill.rope.default, x, *angles, 0, True)  # the last to read x
    program = b.finish(b.view(b(aten.add.Tensor, first, second), 1, -1, 8))
    plan = compiled(program)
    spared, turned = (s for s in plan.steps if isinstance(s.spec, ir.Rope))
    assert spared.bind["x"] != spared.bind["out"]
    assert turned.bind["x"] == turned.bind["out"]


def test_rope_of_some_columns_while_the_others_are_read() -> None:
    b = Builder()
    x = b.linear(b.embed(), "a", 8)
    left = b(mill.rope.default, b.view(b.cut(x, 0, 4), 1, -1, 1, 4), *b.angles(2), 0, False)
    joined = b(aten.add.Tensor, b.view(left, 1, -1, 4), b.cut(x, 4, 8))
    (rope,) = (s for s in compiled(b.finish(joined)).steps if isinstance(s.spec, ir.Rope))
    assert rope.bind["x"] == rope.bind["out"]


def test_rope_never_overwrites_overlapping_columns() -> None:
    b = Builder()
    x = b.linear(b.embed(), "a", 8)
    left = b(mill.rope.default, b.view(b.cut(x, 0, 4), 1, -1, 1, 4), *b.angles(2), 0, False)
    joined = b(aten.add.Tensor, b.view(left, 1, -1, 4), b.cut(x, 2, 6))
    (rope,) = (s for s in compiled(b.finish(joined)).steps if isinstance(s.spec, ir.Rope))
    assert rope.bind["x"] != rope.bind["out"]


def test_rope_spares_what_a_join_holds() -> None:
    """The join's buffer holds x: turning x in place would turn it there too."""
    b = Builder()
    x, y = b.linear(b.embed(), "a", 4), b.linear(b.embed("other"), "b", 4)
    joined = b(aten.cat.default, [x, y], -1)
    turned = b(mill.rope.default, b.view(x, 1, -1, 1, 4), *b.angles(2), 0, False)
    turned = b(aten.cat.default, [b.view(turned, 1, -1, 4), y], -1)
    compiled(b.finish(b(aten.add.Tensor, b(aten.silu.default, joined), turned)))


def test_rope_of_a_join_spares_its_parts() -> None:
    b = Builder()
    x, y = b.linear(b.embed(), "a", 4), b.linear(b.embed("other"), "b", 4)
    heads = b.view(b(aten.cat.default, [x, y], -1), 1, -1, 2, 4)
    turned = b.view(b(mill.rope.default, heads, *b.angles(2), 0, False), 1, -1, 8)
    again = b(aten.cat.default, [b(aten.exp.default, y), b(aten.tanh.default, x)], -1)
    compiled(b.finish(b(aten.add.Tensor, turned, again)))


def test_routing_of_selected_rows() -> None:
    b = Builder()
    x = b(mill.select_rows.default, b.embed(width=11), b.rows)
    weights = b(operator.getitem, b(mill.route.default, x, None, '{"top_k": 11}'), 1)
    plan = checked(b.end(weights))
    assert [s.rows for s in plan.steps] == ["tokens", "rows", "rows"]


# --- joins ----------------------------------------------------------------------------------------


def test_parts_are_written_where_the_whole_is() -> None:
    b = Builder()
    x = b.embed()
    parts = [b.norm(b.linear(x, n, 4), f"{n}.norm") for n in ("a", "b")]
    plan = compiled(b.finish(b(aten.cat.default, parts, -1)))
    assert kinds(plan) == ["embed", "linear", "norm", "norm", "select_rows", "linear"]
    left, right = plan.steps[2].bind["out"], plan.steps[3].bind["out"]
    assert (left.buffer, left.column, right.column) == (right.buffer, 0, 4)


def test_joins_in_joins() -> None:
    b = Builder()
    x = b.embed()
    a, c, d = (b.norm(b.linear(x, n, 4), f"{n}.norm") for n in "acd")
    inner = b(aten.cat.default, [a, c], 2)
    plan = compiled(b.finish(b(aten.cat.default, [d, b.view(inner, 1, -1, 8)], -1)))
    assert "pointwise" not in kinds(plan)


def test_parts_that_live_elsewhere_are_copied() -> None:
    """A part used twice, a cut of something, an input of another join, a constant table."""
    b = Builder()
    x = b.linear(b.embed(), "a", 8)
    once = b(aten.cat.default, [x, x, b.cut(x, 2, 5)], -1)
    again = b(aten.cat.default, [b.norm(x, "n"), x], -1)
    plan = compiled(b.finish(b(aten.cat.default, [once, again], -1)))
    assert kinds(plan).count("pointwise") == 3


def test_a_join_that_is_the_output() -> None:
    b = Builder()
    x = b(mill.select_rows.default, b.embed(), b.rows)
    parts = [b.linear(x, n, w) for n, w in (("a", 4), ("b", 7))]
    plan = checked_after_linear(b.end(b(aten.cat.default, parts, -1)))
    assert kinds(plan) == ["embed", "select_rows", "linear", "linear"]


def test_a_cut_that_is_the_output_is_copied() -> None:
    b = Builder()
    x = b(mill.select_rows.default, b.embed(), b.rows)
    plan = checked_after_linear(b.end(b.cut(b.linear(x, "a", 16), 2, 13)))
    assert kinds(plan)[-1] == "pointwise"
    assert plan.buffers[plan.output].width == 11


def checked_after_linear(program: Program) -> Plan:
    apply(program, FuseLinear())
    return checked(program)


# --- single ops -----------------------------------------------------------------------------------


def test_operands_of_pointwise_steps() -> None:
    b = Builder()
    x = b.norm(b.embed(), "n")
    y = b(aten.mul.Tensor, x, b(aten.sigmoid.default, b.linear(x, "gate", 1)))
    y = b(aten.mul.Tensor, y, b.weight("scale", 1, 8))
    plan = compiled(b.finish(b(aten.add.Tensor, y, b.weight("shift", 1))))
    (step,) = (s for s in plan.steps if isinstance(s.spec, ir.Pointwise))
    assert step.spec == ir.Pointwise(
        8, "x0 * x1 * x2 + x3", ("row", "scalar", "channel", "channel")
    )
    assert plan.buffers[step.bind["x2"].buffer].shape == (8,)


def test_a_weight_that_is_one_number() -> None:
    b = Builder()
    b.program.weights.add("embed_scale", torch.tensor(5.5))
    plan = compiled(b.finish(b(aten.mul.Tensor, b.embed(), b.weight("embed_scale"))), "int8")
    assert plan.steps[1].spec == ir.Pointwise(8, "x0 * x1", ("row", "channel"))


def test_weights_over_heads_are_spread_over_columns() -> None:
    b = Builder()
    heads = b.view(b.embed(), 1, -1, 2, 4)
    y = b(aten.mul.Tensor, heads, b.weight("per_head", 2, 1))
    y = b(aten.add.Tensor, y, b.weight("per_dim", 4))
    plan = compiled(b.finish(b.view(y, 1, -1, 8)))
    (step,) = (s for s in plan.steps if isinstance(s.spec, ir.Pointwise))
    assert step.spec.inputs == ("row", "channel", "channel")


@pytest.mark.parametrize(("weight", "bias"), itertools.product([True, False], repeat=2))
def test_layer_norm(weight: bool, bias: bool) -> None:
    b = Builder()
    affine = [b.weight(n, 8) if used else None for n, used in (("w", weight), ("b", bias))]
    x = b(mill.layer_norm.default, b.embed(), *affine, 1e-5)
    spec = compiled(b.finish(x)).steps[1].spec
    assert spec == ir.Norm(8, 1e-5, center=True, weight=weight, bias=bias)


def test_norm_of_flattened_heads() -> None:
    b = Builder()
    x = b.view(b.norm(b.view(b.embed(), -1, 4), "n"), 1, -1, 8)
    assert compiled(b.finish(x)).steps[1].spec == ir.Norm(4, 1e-6, heads=2)


def test_a_tuple_of_which_one_part_is_read() -> None:
    b = Builder()
    x = b.linear(b.embed(), "a", 4)
    spec = '{"top_k": 2}'
    weights = b(operator.getitem, b(mill.route.default, x, None, spec), 1)
    plan = compiled(b.finish(weights))
    (route,) = (s for s in plan.steps if isinstance(s.spec, ir.Route))
    assert plan.buffers[route.bind["ids"].buffer].dtype == "i32"


def test_window_softcap_and_sinks() -> None:
    b = Builder()
    x = b.view(b.embed(), 1, -1, 2, 4)
    cache = b.cache(ir.gqa_cache("cache", "fp32", 2, 4, 4))
    batch = (cache, b.positions, b.starts, b.table)
    sinks = b.weight("sinks", 2)
    y = b(mill.cached_attention.default, x, x, x, sinks, *batch, 0.5, 3, 20.0, "fp32")
    plan = compiled(b.finish(b.view(y, 1, -1, 8)))
    (attend,) = (s for s in plan.steps if isinstance(s.spec, ir.Attend))
    assert attend.spec == ir.Attend(2, 2, 4, 4, 0.5, "fp32", 3, 20.0, True)


def test_names_of_weights_and_buffers_do_not_clash() -> None:
    b = Builder()
    b.program.weights.add("rms_norm_default", torch.ones(8))
    plan = compiled(b.finish(b.norm(b.norm(b.embed(), "ids"), "rms_norm_default")))
    assert plan.steps[1].bind["weight"] == Operand("weight.ids")
    outs = [plan.steps[i].bind["out"].buffer for i in (1, 2)]
    assert outs == ["arena.rms_norm_default", "rms_norm_default_2"]


def test_where_is_the_users_module() -> None:
    plan = compiled(decoder())
    assert {s.where for s in plan.steps if s.spec.kind == "experts"} == {"layers.1.mlp"}


# --- refusals -------------------------------------------------------------------------------------


def test_the_missing_pass_is_named() -> None:
    b = Builder()
    x = b.view(b.embed(), 1, -1, 2, 4)
    y = b(mill.attention.default, x, x, x, None, 0.5, 0, 0.0)
    with pytest.raises(NotLowered, match="insert_cache"):
        lower(b.finish(b.view(y, 1, -1, 8)))


def test_rows_must_be_selected() -> None:
    b = Builder()
    with pytest.raises(NotLowered, match="select_rows"):
        lower(b.end(b.embed(width=11)))


def test_tokens_must_be_outermost() -> None:
    b = Builder()
    heads = b(aten.transpose.int, b.view(b.embed(), 1, -1, 2, 4), 1, 2)
    normed = b.norm(heads, "n")
    with pytest.raises(NotLowered, match="outermost"):
        lower(b.finish(b.view(b(aten.transpose.int, normed, 1, 2), 1, -1, 8)))


def test_tokens_squared_has_no_place() -> None:
    b = Builder()
    x = b.embed()
    scores = b(aten.matmul.default, x, b(aten.transpose.int, x, 1, 2))
    with pytest.raises(NotLowered, match="one dim"):
        lower(b.finish(b(aten.matmul.default, scores, x)))


def test_other_libraries_are_refused() -> None:
    torch.library.define("elsewhere::twice", "(Tensor x) -> Tensor")
    torch.library.impl("elsewhere::twice", "CompositeImplicitAutograd", lambda x: x * 2)
    b = Builder()
    with pytest.raises(NotLowered, match="elsewhere"):
        lower(b.finish(b(torch.ops.elsewhere.twice.default, b.embed())))
