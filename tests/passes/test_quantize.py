import pytest
import torch
from tokenmill.ir import quant
from tokenmill.passes.fuse_dequantize import FuseDequantize
from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.quantize import Quantize
from tokenmill.recipe import Recipe, Rule

from .build import LENGTHS, Builder, apply, assert_close, decoder, found, logits, mill


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
