from tokenmill.passes.fuse_epilogue import FuseEpilogue
from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.fuse_pointwise import FusePointwise
from tokenmill.passes.linears import Linear
from torch import fx

from .build import Builder, apply, aten, found, mill


def _fused(b: Builder, y: fx.Node, matches: int = 1) -> list[Linear]:
    program = b.finish(y)
    assert apply(program, FuseLinear(), FusePointwise(), FuseEpilogue())[-1] == matches
    return [Linear(*n.args) for n in found(program, mill.linear)]


def test_residual_on_either_side() -> None:
    b = Builder()
    x = b.embed()
    y = b(aten.add.Tensor, x, b.linear(x, "a", 8))
    z = b(aten.add.Tensor, b.linear(y, "b", 8), y)
    first, second, _ = _fused(b, z, matches=2)
    assert (first.epilogue, second.epilogue) == ("e0 + acc0", "acc0 + e0")
    assert first.extras[0] is first.x


def test_activation_with_bias_and_channel() -> None:
    b = Builder()
    y = b(aten.gelu.default, b.linear(b.embed(), "a", 8, bias=True))
    first, _ = _fused(b, b(aten.mul.Tensor, y, b.weight("scale", 8)))
    assert (first.epilogue, [e.target for e in first.extras]) == ("gelu(acc0) * e0", ["scale"])


def test_the_last_of_two_maps_takes_both() -> None:
    b = Builder()
    x = b.embed()
    y = b(aten.sub.Tensor, b.linear(x, "a", 8), b.linear(b.norm(x, "n"), "b", 8))
    first, second, _ = _fused(b, y)
    assert (first.epilogue, second.epilogue) == ("acc0", "e0 - acc0")


def test_a_result_used_twice_in_one_expression() -> None:
    b = Builder()
    y = b.linear(b.embed(), "a", 8)
    first, _ = _fused(b, b(aten.mul.Tensor, y, b(aten.sigmoid.default, y)))
    assert first.epilogue == "acc0 * sigmoid(acc0)"


def test_what_is_not_taken() -> None:
    """A map with two users, one number per token, and a map onto one number per token."""
    b = Builder()
    x = b.embed()
    twice = b.linear(x, "a", 8)
    y = b(aten.add.Tensor, b.norm(twice, "n"), b(aten.silu.default, twice))
    gate = b(aten.sigmoid.default, b.linear(x, "gate", 1))
    z = b(aten.mul.Tensor, b.linear(y, "b", 8), gate)
    *_, _head = linears = _fused(b, z, matches=1)
    assert sorted(linear.epilogue for linear in linears) == [
        "acc0",
        "acc0",
        "acc0",
        "sigmoid(acc0)",
    ]
