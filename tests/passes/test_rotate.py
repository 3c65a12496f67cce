"""Rotations folded into weights: exact, found by what the graph computes, and good for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.ir.program import Program
from tokenmill.passes.fuse_dequantize import FuseDequantize
from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.hadamard import turn, turn_bias, turn_columns, turn_rows
from tokenmill.passes.pipeline import relative_error
from tokenmill.passes.quantize import Quantize
from tokenmill.passes.rotate import Rotate
from tokenmill.recipe import Recipe, Rule
from torch import Tensor, fx

from .build import HIDDEN, VOCAB, Builder, apply, aten, decoder, found, mill, targets

# --- the rotation ---------------------------------------------------------------------------------


@given(st.integers(1, 96), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_a_rotation_is_orthogonal_and_spreads(block: int, runs: int) -> None:
    q = turn(torch.eye(runs * block, dtype=torch.float64), block)
    assert torch.allclose(q @ q.T, torch.eye(runs * block, dtype=torch.float64), atol=1e-12)
    assert torch.count_nonzero(q) <= runs * block * block, "runs are turned apart"
    assert float(q.abs().max()) <= (2 / block) ** 0.5 + 1e-12


def test_signs_keep_equal_numbers_from_adding_up() -> None:
    assert turn(torch.ones(64), 64).abs().max() < 4.0  # of 8 if they did


@given(
    st.sampled_from([1, 2, 3, 6, 12, 40]),
    st.lists(st.integers(1, 4), max_size=1),
    st.booleans(),
    st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_columns_undo_rows(block: int, experts: list[int], gained: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(*experts, 2 * block, 2 * block, generator=random) for _ in "12")
    gain = torch.rand(block, generator=random) + 0.5 if gained else None
    plain = second if gain is None else second * gain.repeat(2)
    together = turn_columns(block, second, gain) @ turn_rows(block, first)
    assert torch.allclose(together, plain @ first, atol=1e-4)


@pytest.mark.parametrize("turned", [turn_columns, turn_rows, turn_bias])
def test_meta_tensors_and_narrow_ones_keep_their_kind(turned: Callable[..., Tensor]) -> None:
    shape = (6,) if turned is turn_bias else (2, 6, 6)
    for like in (torch.empty(shape, device="meta"), torch.zeros(shape, dtype=torch.bfloat16)):
        out = turned(3, like)
        assert (out.shape, out.dtype, out.device) == (like.shape, like.dtype, like.device)
        assert out.is_contiguous()


# --- what is turned -------------------------------------------------------------------------------


@pytest.mark.parametrize(("latent", "turned"), [(True, {8: 3, 3: 2}), (False, {8: 1, 4: 2})])
def test_the_stream_the_latents_and_the_values(latent: bool, turned: dict[int, int]) -> None:
    program = decoder(latent)
    before, rotate = targets(program), Rotate()
    sizes = {n: program.weights.like(n).numel() for n in program.used_weights()}
    assert apply(program, rotate) == [sum(turned.values())]
    # Latents of 6 stay: a cut of the map that makes them still gives the rotary key.
    assert rotate.notes == [f"turned: {count} of width {width}" for width, count in turned.items()]
    assert targets(program) == before, "nothing more is computed"
    after = {n: program.weights.like(n).numel() for n in program.used_weights()}
    assert sum(after.values()) <= sum(sizes.values()), "and nothing more is stored"


def test_norms_in_the_stream_scale_no_more() -> None:
    program = decoder()
    apply(program, Rotate())
    weights = {n.args[1].target for n in found(program, mill.rms_norm)}
    assert not weights & {"norm", "layers.0.norm1", "layers.1.norm2"}
    assert program.weights.stands_for("norm.ones") == "norm"
    assert torch.equal(program.weights["norm.ones"], torch.ones(HIDDEN))


def test_a_turned_matrix_is_still_that_matrix() -> None:
    program = decoder()
    apply(program, Rotate(), FuseLinear())
    head = next(n for n in program.used_weights() if n.startswith("head.weight"))
    assert head != "head.weight"
    assert program.weights.roots(head) == ["head.weight"]
    assert Recipe(weights="int8", rules=[Rule(match="norm", format="fp32")]).format_for(
        program.weights.roots(head), "head"
    ) == ("int8")


def test_no_number_is_read() -> None:
    program = decoder()
    for name in list(program.weights):
        program.weights._given[name] = program.weights._given[name].to("meta")
    assert Rotate().run(program) == 5
    assert all(program.weights.like(n).is_meta for n in program.used_weights())


def test_two_runs_are_the_same_numbers() -> None:
    first, second = decoder(), decoder()
    for program in (first, second):
        Rotate().run(program)
    assert first.used_weights() == second.used_weights()
    for name in first.used_weights():
        assert torch.equal(first.weights[name], second.weights[name])


# --- streams of other kinds -----------------------------------------------------------------------


def _stream(write: Callable[[Builder, fx.Node], fx.Node], b: Builder | None = None) -> Program:
    """Embedding, ``write``, norm, head."""
    b = b or Builder()
    return b.finish(b.norm(write(b, b.embed()), "norm"))


def _block(b: Builder, x: fx.Node, name: str = "o", bias: bool = False) -> fx.Node:
    inner = b(aten.relu.default, b.linear(b.norm(x, f"{name}.norm"), f"{name}.up", 12))
    return b.linear(inner, name, HIDDEN, bias)


def _scaled_embedding(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.add.Tensor, b(aten.mul.Tensor, x, 2.5), _block(b, x))


def _biased(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.sub.Tensor, x, _block(b, x, bias=True))


def _gated_by_row(b: Builder, x: fx.Node) -> fx.Node:
    gate = b(aten.sigmoid.default, b.linear(b.norm(x, "gate.norm"), "gate", 1))
    return b(aten.add.Tensor, x, b(aten.mul.Tensor, gate, _block(b, x)))


def _read_as_it_is(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.add.Tensor, x, b.linear(x, "mix", HIDDEN))


def _residual_of_experts(b: Builder, x: fx.Node) -> fx.Node:
    b.path = "moe"
    added = b.experts(b.norm(x, "n1"))
    (experts,) = found(b.program, mill.experts)
    with b.program.graph.inserting_before(experts):
        flat = b.program.call(aten.reshape.default, x, [-1, HIDDEN])
    experts.update_arg(5, flat)
    return added


def _doubled(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.add.Tensor, x, x)


@pytest.mark.parametrize(
    "write",
    [
        _scaled_embedding, _biased, _gated_by_row, _read_as_it_is, _residual_of_experts, _doubled,
    ],
)  # fmt: skip
def test_streams_that_turn(write: Callable[[Builder, fx.Node], fx.Node]) -> None:
    program, rotate = _stream(write), Rotate()
    apply(program, rotate)
    assert rotate.notes == [f"turned: 1 of width {HIDDEN}"]
    assert not {"embed.weight", "head.weight"} & set(program.used_weights())


def _layer_norm(b: Builder, x: fx.Node) -> fx.Node:
    w = b.weight("ln", HIDDEN)
    normed = b(mill.layer_norm.default, x, w, None, 1e-5)
    return b(aten.add.Tensor, x, b.linear(normed, "o", HIDDEN))


def _nonlinear(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.tanh.default, x)


def _product(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.mul.Tensor, x, _block(b, x))


def _norm_written_back(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.add.Tensor, x, b.norm(_block(b, x), "post"))


def _norm_read_by_no_map(b: Builder, x: fx.Node) -> fx.Node:
    normed = b(aten.silu.default, b.norm(x, "n"))
    return b(aten.add.Tensor, x, b.linear(normed, "o", HIDDEN))


def _channel_scales(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.add.Tensor, x, b(aten.mul.Tensor, _block(b, x), b.weight("gamma", HIDDEN)))


def _cut(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.add.Tensor, x, b.linear(b.cut(b.norm(x, "n"), 0, 4), "o", HIDDEN))


def _offset(b: Builder, x: fx.Node) -> fx.Node:
    return b(aten.add.Tensor, x, 1.0)


def _shared_by_norms(b: Builder, x: fx.Node) -> fx.Node:
    for i in range(2):
        x = b(aten.add.Tensor, x, b.linear(b.norm(x, f"n{i}"), "shared", HIDDEN))
    return x


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (_layer_norm, "read by layer_norm"),
        (_nonlinear, "read by tanh"),
        (_product, "read by mul"),
        (_norm_written_back, "add of a norm's result"),
        (_norm_read_by_no_map, "read by silu"),
        (_channel_scales, "made by mul"),
        (_cut, "read by slice"),
        (_offset, "read by add"),
        (_shared_by_norms, "shared.weight would need two different matrices"),
    ],
)
def test_streams_that_do_not(write: Callable[[Builder, fx.Node], fx.Node], why: str) -> None:
    program, rotate = _stream(write), Rotate()
    used = program.used_weights()
    apply(program, rotate)
    assert rotate.notes[0].startswith("the residual stream stays as it is: ")
    assert why in rotate.notes[0]
    assert {"embed.weight", "head.weight"} <= set(used) & set(program.used_weights())


def _tied() -> Program:
    b = Builder()
    return b.finish(b.norm(b.embed(), "n"), head="embed.weight")


def test_a_tied_head_turns_where_it_is_stored_apart_anyway() -> None:
    assert apply(_tied(), kept := Rotate(Recipe(weights="bf16"))) == [0]
    assert "two different matrices" in kept.notes[0]
    program = _tied()
    assert apply(program, Rotate(Recipe(weights="int8"))) == [1]
    assert {program.weights.roots(n)[0] for n in program.used_weights()} == {
        "embed.weight",
        "n",
    }


def test_attention_whose_values_are_keys_too_keeps_them() -> None:
    b = Builder()
    x = b.norm(b.embed(), "n")
    q, kv = (b.view(b.linear(x, n, 8), 1, -1, 2, 4) for n in ("q", "kv"))
    out = b(mill.attention.default, q, kv, kv, None, 0.5, 0, 0.0)
    program = b.finish(b.linear(b.view(out, 1, -1, 8), "o", HIDDEN))
    apply(program, Rotate())
    assert "kv.weight.scale_turn_columns_8" in program.used_weights(), "its input only"
    assert "o.weight.turn_columns_4" not in program.used_weights()


# --- what it is for -------------------------------------------------------------------------------


def _outlying(channels: int = 64) -> Program:
    """Three layers, in which an eighth of the inputs have weights eight times the others'."""
    b = Builder()
    x = b.embed(width=channels)
    for i in range(3):
        inner = b(aten.silu.default, b.linear(b.norm(x, f"n{i}"), f"up{i}", 96))
        x = b(aten.add.Tensor, x, b.linear(inner, f"down{i}", channels))
        b.program.weights[f"n{i}"].fill_(1.0)
        b.program.weights[f"up{i}.weight"][:, ::8] *= 8.0
    return b.finish(b.norm(x, "norm"))


@pytest.mark.parametrize("format", ["int4-g32", "int4-g128", "int8"])
def test_rounding_hurts_less_where_weights_stood_out(format: Any) -> None:
    rules = [Rule(match=f"role:{role}", format=format) for role in ("linear", "head")]
    recipe = Recipe(weights="int8", rules=rules)
    errors = []
    for passes in ([], [Rotate(recipe)]):
        program = _outlying()
        want = program.run(list(range(VOCAB)))
        for one in (*passes, FuseLinear(), Quantize(recipe), FuseDequantize()):
            one.run(program)
        errors.append(relative_error(want, program.run(list(range(VOCAB)))))
    assert errors[1] < 0.75 * errors[0]
