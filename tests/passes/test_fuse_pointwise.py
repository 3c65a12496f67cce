from tokenmill.passes.fuse_pointwise import FusePointwise

from .build import Builder, apply, aten, found, mill, targets


def _expressions(b: Builder) -> list[str]:
    return [n.args[1] for n in found(b.program, mill.pointwise)]


def test_a_chain_with_constants() -> None:
    b = Builder()
    x = b(aten.mul.Tensor, b.embed(), 2.0)
    x = b(aten.clamp.default, b(aten.add.Tensor, x, b.embed("other"), alpha=3), -1.0, None)
    b.finish(b(aten.pow.Tensor_Scalar, x, 2))
    assert apply(b.program, FusePointwise()) == [1]
    assert _expressions(b) == ["square(max(x0 * 2.0 + x1 * 3.0, (-1.0)))"]


def test_a_diamond() -> None:
    b = Builder()
    x, y = b.embed(), b.embed("other")
    total = b(aten.add.Tensor, x, y)
    b.finish(b(aten.mul.Tensor, b(aten.sigmoid.default, total), b(aten.tanh.default, total)))
    assert apply(b.program, FusePointwise()) == [2]
    assert _expressions(b) == ["x0 + x1", "sigmoid(x0) * tanh(x0)"]  # two rows are read once


def test_dear_work_is_done_once() -> None:
    b = Builder()
    dear = b(aten.exp.default, b.embed())
    b.finish(b(aten.mul.Tensor, b(aten.add.Tensor, dear, 1.0), b(aten.sub.Tensor, dear, 1.0)))
    assert apply(b.program, FusePointwise()) == [2]
    assert _expressions(b) == ["exp(x0)", "(x0 + 1.0) * (x0 - 1.0)"]


def test_dear_work_used_twice_in_one_place() -> None:
    b = Builder()
    dear = b(aten.exp.default, b.embed())
    b.finish(b(aten.mul.Tensor, dear, dear))
    assert apply(b.program, FusePointwise()) == [2]


def test_cheap_work_is_repeated() -> None:
    b = Builder()
    cheap = b(aten.mul.Tensor, b.embed(), 0.5)
    left, right = b(aten.exp.default, cheap), b(aten.relu.default, cheap)
    b.finish(b(aten.mul.Tensor, left, right))
    assert apply(b.program, FusePointwise()) == [1]
    assert _expressions(b) == ["exp(x0 * 0.5) * relu(x0 * 0.5)"]


def test_one_number_per_token_is_not_computed_per_column() -> None:
    b = Builder()
    x = b.embed()
    gate = b(aten.sigmoid.default, b.cut(x, 0, 1))
    b.finish(b(aten.mul.Tensor, x, gate))
    assert apply(b.program, FusePointwise()) == [2]
    assert _expressions(b) == ["sigmoid(x0)", "x0 * x1"]


def test_weights_are_operands() -> None:
    b = Builder()
    x = b(aten.add.Tensor, b.embed(), b.weight("shift", 8))
    b.finish(b(aten.mul.Tensor, x, b.weight("scale", 1)))
    assert apply(b.program, FusePointwise()) == [1]
    assert _expressions(b) == ["(x0 + x1) * x2"]


def test_work_that_others_need_too_is_not_repeated() -> None:
    b = Builder()
    x = b(aten.add.Tensor, b.embed(), 1.0)
    b.finish(b(aten.mul.Tensor, b.norm(x, "n"), b(aten.neg.default, x)))
    assert apply(b.program, FusePointwise()) == [2]
    assert _expressions(b) == ["x0 + 1.0", "x0 * (-x1)"] or _expressions(b)[1] == "x0 * neg(x1)"


def test_other_ways_to_broadcast_are_left_to_torch() -> None:
    b = Builder()
    x = b.embed()
    per_head = b.view(b.cut(x, 0, 2), 1, -1, 2, 1)
    y = b(aten.mul.Tensor, b.view(x, 1, -1, 2, 4), per_head)
    b.finish(b.view(y, 1, -1, 8))
    assert apply(b.program, FusePointwise()) == [0]
    assert "mul" in targets(b.program)
