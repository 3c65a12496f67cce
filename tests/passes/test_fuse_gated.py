import operator
from collections.abc import Callable

import pytest
from tokenmill.passes.fuse_gated import FuseGated
from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.fuse_pointwise import FusePointwise
from tokenmill.passes.linears import Linear
from torch import fx

from .build import Builder, apply, aten, decoder, found, mill

PASSES = (FuseLinear, FusePointwise, FuseGated)


def _fused(b: Builder, y: fx.Node, matches: int = 1) -> list[Linear]:
    program = b.finish(y)
    assert apply(program, *(p() for p in PASSES))[-1] == matches
    return [Linear(*n.args) for n in found(program, mill.linear) if n.args[5] == 2]


def test_both_blocks_of_a_decoder() -> None:
    program = decoder()
    assert apply(program, *(p() for p in PASSES)) == [16, 6, 2]


Act = Callable[[Builder, fx.Node, fx.Node], fx.Node]
ACTS: dict[str, Act] = {
    "silu(acc0) * acc1": lambda b, g, u: b(aten.mul.Tensor, b(aten.silu.default, g), u),
    "acc1 * silu(acc0)": lambda b, g, u: b(aten.mul.Tensor, u, b(aten.silu.default, g)),
    "gelu_tanh(acc0) * acc1": lambda b, g, u: b(
        aten.mul.Tensor, b(aten.gelu.default, g, approximate="tanh"), u
    ),
    "sigmoid(acc0 * 1.702) * (acc1 + 1.0)": lambda b, g, u: b(
        aten.mul.Tensor,
        b(aten.sigmoid.default, b(aten.mul.Tensor, g, 1.702)),
        b(aten.add.Tensor, u, 1.0),
    ),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False)])
def test_activations(act: str, up_first: bool, biases: tuple[bool, bool]) -> None:
    b = Builder()
    x = b.embed()
    sides = [("gate", biases[0]), ("up", biases[1])]
    made = {n: b.linear(x, n, 6, bias) for n, bias in (sides[::-1] if up_first else sides)}
    (linear,) = _fused(b, ACTS[act](b, made["gate"], made["up"]))
    assert linear.epilogue == act
    assert linear.weight[0].target == "gate+up.weight"
    assert (linear.bias is not None) == any(biases)


@pytest.mark.parametrize("gate_first", [True, False])
def test_two_cuts_of_one_map(gate_first: bool) -> None:
    b = Builder()
    both = b(aten.chunk.default, b.linear(b.embed(), "both", 12), 2, -1)
    halves = [b(operator.getitem, both, i) for i in (0, 1)]
    gate, up = halves if gate_first else halves[::-1]
    (linear,) = _fused(b, ACTS["silu(acc0) * acc1"](b, gate, up))
    expected = "both.weight" if gate_first else "both.weight[6:12]+weight[0:6]"
    assert linear.weight[0].target == expected


def test_a_third_operand_becomes_an_extra() -> None:
    b = Builder()
    x = b.embed()
    y = b(aten.mul.Tensor, b(aten.silu.default, b.linear(x, "gate", 8)), b.linear(x, "up", 8))
    y = b(aten.add.Tensor, b(aten.mul.Tensor, y, b.weight("scale", 8)), x)
    (linear,) = _fused(b, y)
    assert linear.epilogue == "silu(acc0) * acc1 * e0 + e1"
    assert linear.extras[1] is x


def test_a_map_that_others_need() -> None:
    b = Builder()
    x = b.embed()
    gate, up = b.linear(x, "gate", 8), b.linear(x, "up", 8)
    y = b(aten.mul.Tensor, b(aten.silu.default, gate), up)
    _fused(b, b(aten.mul.Tensor, b.norm(gate, "n"), y), matches=0)


def test_maps_of_different_inputs() -> None:
    b = Builder()
    x = b.embed()
    gate, up = b.linear(x, "gate", 8), b.linear(b.norm(x, "n"), "up", 8)
    _fused(b, b(aten.mul.Tensor, b(aten.silu.default, gate), up), matches=0)
