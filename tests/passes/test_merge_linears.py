from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.merge_linears import MergeLinears
from tokenmill.recipe import Recipe, Rule
from torch import fx

from .build import Builder, apply, aten, decoder, found, mill


def _weights(program_nodes: list[fx.Node]) -> list[str]:
    return [n.args[1][0].target for n in program_nodes]


def test_projections_of_attention() -> None:
    program = decoder(latent=False)
    # gate and up are here still two maps of one input, and the router is none of their kind
    assert apply(program, FuseLinear(), MergeLinears()) == [16, 4]
    names = _weights(found(program, mill.linear))
    assert "layers.0.attn.q+k+v.weight" in names
    assert "layers.1.mlp.router.weight" in names


def test_biases_of_some() -> None:
    b = Builder()
    x = b.embed()
    parts = [b.linear(x, name, 8, bias) for name, bias in (("q", True), ("k", False), ("v", True))]
    total = b(aten.add.Tensor, b(aten.mul.Tensor, parts[0], parts[1]), parts[2])
    assert apply(b.finish(total), FuseLinear(), MergeLinears()) == [4, 1]


def test_only_weights_of_one_format() -> None:
    b = Builder()
    x = b.embed()
    q, k, v = (b.linear(x, name, 8) for name in ("q", "k", "v"))
    program = b.finish(b(aten.add.Tensor, b(aten.mul.Tensor, q, k), v))
    recipe = Recipe(weights="int8", rules=[Rule(match="k.*", format="bf16")])
    assert apply(program, FuseLinear(), MergeLinears(recipe)) == [4, 1]
    assert "q+v.weight" in _weights(found(program, mill.linear))


def test_the_head_stays_apart() -> None:
    b = Builder()
    x = b.norm(b.embed(), "n")
    left, right = b.linear(x, "left", 4), b.linear(x, "right", 7)
    program = b.end(b(aten.cat.default, [left, right], -1))
    FuseLinear().run(program)
    assert MergeLinears().run(program) == 0
