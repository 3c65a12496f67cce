import pytest
from tokenmill.ir import expr
from tokenmill.passes.fuse_epilogue import FuseEpilogue
from tokenmill.passes.fuse_gated import FuseGated
from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.fuse_pointwise import FusePointwise
from tokenmill.passes.fuse_residual import FuseResidual, without
from tokenmill.passes.hoist_views import HoistViews

from .build import Builder, apply, aten, decoder, found, mill


def passes() -> list:
    fused = [FuseLinear(), HoistViews(), FusePointwise(), FuseGated(), FuseResidual()]
    return [*fused, FuseEpilogue()]


def test_a_block_with_a_shared_expert_adds_up_without_a_step_of_its_own() -> None:
    program = decoder()
    assert apply(program, *passes()) == [16, 1, 6, 2, 1, 4]
    assert not found(program, mill.pointwise)
    (experts,) = found(program, mill.experts)
    assert experts.args[5].target is mill.linear.default


@pytest.mark.parametrize("experts_first", [True, False])
def test_experts_alone(experts_first: bool) -> None:
    b = Builder()
    x = b.embed()
    pair = [b.experts(b.norm(x, "n")), x]
    program = b.finish(b(aten.add.Tensor, *(pair if experts_first else pair[::-1])))
    assert apply(program, *passes())[4] == 1
    (experts,) = found(program, mill.experts)
    assert experts.args[5] is x


def test_a_scaled_shared_expert() -> None:
    """x + (experts + gate * shared): the products stay, the experts add them up."""
    b = Builder()
    x = b.embed()
    shared = b(aten.mul.Tensor, b(aten.sigmoid.default, b.linear(x, "gate", 1)), b.mlp(x))
    total = b(aten.add.Tensor, b.experts(x), shared)
    program = b.finish(b(aten.add.Tensor, x, total))
    assert apply(program, *passes())[4] == 1
    assert [n.args[1] for n in found(program, mill.pointwise)] == ["x0 + x1 * x2"]


def test_scaled_experts_are_left_alone() -> None:
    b = Builder()
    x = b.embed()
    program = b.finish(b(aten.add.Tensor, x, b(aten.mul.Tensor, b.experts(x), 0.5)))
    assert apply(program, *passes())[4] == 0


@pytest.mark.parametrize(
    ("total", "rest"),
    [
        ("x0 + x1", "x1"),
        ("x1 + x0", "x1"),
        ("x1 + (x2 + x0)", "x1 + x2"),
        ("(x0 + x1) + x2 * 2.0", "x1 + x2 * 2.0"),
        ("x1 - x0", None),
        ("x1 + x0 * 2.0", None),
        ("relu(x0 + x1)", None),
    ],
)
def test_without(total: str, rest: str | None) -> None:
    left = without(expr.parse(total), "x0")
    assert (left and expr.text(left)) == rest
