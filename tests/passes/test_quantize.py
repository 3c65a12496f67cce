from dataclasses import replace

import pytest
import torch
from tokenmill.errors import WrongFormat
from tokenmill.ir import quant
from tokenmill.ir.program import Program
from tokenmill.passes.fuse_dequantize import FuseDequantize
from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.quantize import Quantize, check_stored, shares
from tokenmill.recipe import Recipe, Rule

from .build import (
    HIDDEN,
    LENGTHS,
    POSITIONS,
    Builder,
    apply,
    assert_close,
    aten,
    decoder,
    found,
    logits,
    mill,
)


def _quantized(recipe: Recipe, latent: bool = True) -> tuple[Quantize, float]:
    program = decoder(latent)
    apply(program, FuseLinear())
    before = logits(program)
    quantize = Quantize(recipe)
    apply(program, quantize, exact=False)
    error = max(
        float((a - b).norm() / b.norm()) for a, b in zip(logits(program), before, strict=True)
    )
    apply(program, FuseDequantize())
    assert not found(program, mill.dequantize)
    return quantize, error


def test_roles_come_from_structure() -> None:
    quantize, _ = _quantized(Recipe(weights="int4"))
    roles = {d.weight: (d.role, d.format) for d in quantize.decisions}
    assert roles["embed.weight"] == ("embedding", "bf16")
    assert roles["head.weight"] == ("head", "int8")
    assert roles["layers.0.attn.q_a.weight"] == ("linear", "int8")
    assert roles["layers.0.attn.w_uk"] == ("latent_up", "int8")
    assert roles["layers.1.mlp.router.weight"] == ("router", "fp32")
    assert roles["layers.1.mlp.router.bias"] == ("norm", "fp32")
    assert roles["layers.1.mlp.experts.gate_up"] == ("expert", "int4-g32")
    assert roles["layers.1.mlp.down_proj.weight"] == ("linear", "int8")
    assert roles["norm"] == ("norm", "fp32")
    assert not any("rope" in name for name in roles)


def test_notes_tell_the_shares() -> None:
    quantize, _ = _quantized(Recipe(weights="int4"))
    shares = {note.split(":")[0]: float(note.split()[1].rstrip("%")) for note in quantize.notes}
    assert set(shares) == {"fp32", "bf16", "int8", "int4-g32"}
    assert abs(sum(shares.values()) - 100) < 0.1


def test_rules_that_match_nothing_are_told() -> None:
    rules = [
        Rule(match="layers.*.mlp.*", format="bf16"),
        Rule(match="layer.*", format="bf16"),  # a typo
        Rule(match="norm", format="bf16"),  # norms have no format
        Rule(match="role:router", format="bf16"),
    ]
    quantize, _ = _quantized(Recipe(weights="int4", rules=rules))
    assert quantize.idle == ["layer.*", "norm"]
    assert quantize.notes[-2:] == [
        f"rule {name!r} matches no weight that has a format" for name in quantize.idle
    ]
    assert _quantized(Recipe(weights="int4"))[0].idle == []


def test_bytes_are_what_is_stored() -> None:
    program = decoder()
    quantize = Quantize(Recipe(weights="int4"))
    apply(program, FuseLinear())
    apply(program, quantize, FuseDequantize(), exact=False)
    stored = sum(
        program.weights[name].nbytes
        for name in program.used_weights()
        if not name.startswith("rope.")
    )
    assert sum(d.bytes for d in quantize.decisions) == stored


@pytest.mark.parametrize(
    ("weights", "limit"),
    [("fp32", 0.0), ("bf16", 0.05), ("int8", 0.05), ("fp8", 0.5), ("int4-g128", 0.5)],
)
@pytest.mark.parametrize("latent", [True, False])
def test_every_preset_runs(weights: str, limit: float, latent: bool) -> None:
    recipe = Recipe.model_validate({"weights": weights})
    quantize, error = _quantized(recipe, latent)
    assert error <= limit
    assert all(d.bytes > 0 for d in quantize.decisions)


def test_gate_up_and_down_may_differ() -> None:
    rule = Rule(match="*.experts.down", format="int8")
    program = decoder()
    apply(program, FuseLinear())
    apply(program, Quantize(Recipe(weights="int4", rules=[rule])), exact=False)
    apply(program, FuseDequantize())
    (experts,) = found(program, mill.experts)
    assert experts.args[6:8] == ("int4-g32", "int8")


def test_a_tied_head_is_stored_in_two_formats() -> None:
    b = Builder()
    program = b.finish(b.norm(b.embed(), "n"), head="embed.weight")
    apply(program, FuseLinear())
    quantize = Quantize(Recipe(weights="int8"))
    apply(program, quantize, exact=False)
    assert [(d.role, d.format, d.originals) for d in quantize.decisions if d.role != "norm"] == [
        ("embedding", "bf16", ("embed.weight",)),
        ("head", "int8", ("embed.weight",)),
    ]


def test_nothing_is_read_before_it_is_asked_for() -> None:
    program = decoder()
    for name in list(program.weights):
        program.weights._given[name] = program.weights._given[name].to("meta")
    for step in (FuseLinear(), Quantize(Recipe(weights="int4")), FuseDequantize()):
        step.run(program)
    assert program.weights.like("layers.1.mlp.experts.down.int4-g32.q").dtype == torch.uint8


def test_parts_are_those_of_the_format() -> None:
    program = decoder()
    apply(program, FuseLinear())
    apply(program, Quantize(Recipe(weights="int8")), exact=False)
    weights = program.weights
    expected = quant.quantize(weights["head.weight"], quant.parse("int8"))
    for part, value in expected.items():
        assert torch.equal(weights[f"head.weight.int8.{part}"], value)


def test_the_middle_runs_at_every_length() -> None:
    program = decoder()
    apply(program, FuseLinear())
    apply(program, Quantize(Recipe(weights="bf16")), exact=False)
    before = logits(program)
    apply(program, FuseDequantize())
    assert len(before) == len(LENGTHS)
    assert_close(logits(program), before)


# --- what is stored, next to what the recipe wants ------------------------------------------------


def _with_a_matmul(size: int = HIDDEN, tied: bool = False) -> Program:
    """A model that multiplies with a matrix by itself, beside its linear maps."""
    b = Builder()
    x = b.linear(b.norm(b.embed(), "n"), "proj", size)
    b.path = "mixer"
    name = "proj.weight" if tied else "mix"
    return b.finish(b(aten.matmul.default, x, b.weight(name, size, HIDDEN)))


def _quantize(program: Program, recipe: Recipe) -> Quantize:
    quantize = Quantize(recipe)
    for step in (FuseLinear(), quantize, FuseDequantize()):
        step.run(program)
    program.run([1, 2])
    return quantize


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "fp8", "int4-g64"])
@pytest.mark.parametrize("latent", [True, False])
def test_nothing_escapes_from_a_model_of_known_parts(weights: str, latent: bool) -> None:
    program = decoder(latent)
    quantize = _quantize(program, Recipe.model_validate({"weights": weights}))
    stored, expected = shares(quantize.decisions)
    assert stored == expected
    assert (stored > 0.5) == (weights not in ("fp32", "bf16"))
    assert not any(d.escaped for d in quantize.decisions)
    check_stored(program, quantize.decisions)


@pytest.mark.parametrize("tied", [False, True])
def test_a_matrix_that_torch_multiplies_with_is_reported(tied: bool) -> None:
    program = _with_a_matmul(tied=tied)
    quantize = _quantize(program, Recipe(weights="int4"))
    (escape,) = (d for d in quantize.decisions if d.escaped)
    assert (escape.weight, escape.format, escape.wanted, escape.parameters) == (
        "proj.weight" if tied else "mix", "fp32", "int8", HIDDEN * HIDDEN,
    )  # fmt: skip
    assert escape.escaped == "aten.matmul.default at mixer reads it, which is left to torch"
    assert quantize.notes[-1] == f"{escape.weight} is not int8 but fp32: {escape.escaped}"
    stored, expected = shares(quantize.decisions)
    total = sum(d.parameters for d in quantize.decisions)
    assert expected - stored == pytest.approx(escape.parameters / total)
    check_stored(program, quantize.decisions)  # known, and so no defect of a pass


@pytest.mark.parametrize("rule", [Rule(match="mix", format="fp32"), None])
def test_what_the_recipe_keeps_does_not_escape(rule: Rule | None) -> None:
    recipe = Recipe(weights="int4", rules=[rule]) if rule else Recipe(weights="fp32")
    quantize = _quantize(_with_a_matmul(), recipe)
    assert not any(d.escaped for d in quantize.decisions)


def test_a_linear_map_over_heads_escapes() -> None:
    b = Builder()
    heads = b.view(b.norm(b.embed(), "n"), 1, -1, 2, HIDDEN // 2)
    mixed = b.linear(heads, "heads", HIDDEN // 2)
    quantize = _quantize(b.finish(b.view(mixed, 1, -1, HIDDEN)), Recipe(weights="int8"))
    assert [d.weight for d in quantize.decisions if d.escaped] == ["heads.weight"]


def test_scales_and_tables_are_not_taken_for_matrices() -> None:
    b = Builder()
    heads = b.view(b.norm(b.embed(), "n"), 1, -1, 2, HIDDEN // 2)
    scaled = b(aten.mul.Tensor, heads, b.weight("gains", 2, HIDDEN // 2))
    rows = b(aten.index_select.default, b.weight("table", POSITIONS, HIDDEN), 0,
             b.view(b.positions, -1))  # fmt: skip
    shifted = b(aten.add.Tensor, b.view(scaled, 1, -1, HIDDEN), b.view(rows, 1, -1, HIDDEN))
    quantize = _quantize(b.finish(shifted), Recipe(weights="int8"))
    assert not any(d.escaped for d in quantize.decisions)


def test_many_escapes_make_few_notes() -> None:
    b = Builder()
    x = b.norm(b.embed(), "n")
    for layer in range(20):
        x = b(aten.matmul.default, x, b.weight(f"layers.{layer}.mix", HIDDEN, HIDDEN))
    quantize = _quantize(b.finish(x), Recipe(weights="int8"))
    assert sum("mix" in note for note in quantize.notes) == 8
    assert quantize.notes[-1] == "and 12 weights more"


def test_a_weight_in_another_format_than_decided_is_a_defect() -> None:
    program = decoder()
    quantize = _quantize(program, Recipe(weights="int8"))
    lost = next(d for d in quantize.decisions if d.weight == "layers.0.attn.q_a.weight")
    rest = [d for d in quantize.decisions if d is not lost]
    with pytest.raises(WrongFormat, match=r"q_a.weight' is stored in int8 and was to be in bf16"):
        check_stored(program, [*rest, replace(lost, format="bf16")])
    with pytest.raises(WrongFormat, match="stored in int8 and was to be in no format"):
        check_stored(program, rest)
    gone = replace(lost, weight="gone")
    with pytest.raises(WrongFormat, match="stored in no format and was to be in int8"):
        check_stored(program, [*quantize.decisions, gone])


def test_the_check_sees_a_slot_that_was_passed_over() -> None:
    program = decoder()
    apply(program, FuseLinear())
    untouched = program.copy()
    quantize = Quantize(Recipe(weights="int8"))
    apply(program, quantize, exact=False)
    with pytest.raises(WrongFormat, match="stored in fp32 and was to be in "):
        check_stored(untouched, quantize.decisions)
