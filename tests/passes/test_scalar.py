from typing import Any

import pytest
import torch
from tokenmill.ir import expr
from tokenmill.passes.scalar import cost, count, inside_dear, scalar_expression
from torch import Tensor

from .build import Builder, aten

X = torch.tensor([[-3.0, -0.5, 0.0, 0.25, 2.0, 7.5]])
Y = torch.tensor([[0.5, 2.0, -1.0, 3.0, -0.25, 1.0]])

ONE = [
    (aten.neg.default, (), {}),
    (aten.silu.default, (), {}),
    (aten.gelu.default, (), {}),
    (aten.gelu.default, (), {"approximate": "tanh"}),
    (aten.relu.default, (), {}),
    (aten.tanh.default, (), {}),
    (aten.softplus.default, (), {}),
    (aten.softplus.default, (1, 20), {}),
    (aten.leaky_relu.default, (0.2,), {}),
    (aten.mish.default, (), {}),
    (aten.reciprocal.default, (), {}),
    (aten.hardtanh.default, (), {}),
    (aten.clamp.default, (-1.0, 2.0), {}),
    (aten.clamp.default, (None, 2.0), {}),
    (aten.clamp.default, (), {"min": 0.1}),
    (aten.clamp.default, (), {"max": 0.1}),
    (aten.clamp_min.default, (0.3,), {}),
    (aten.clamp_max.default, (0.3,), {}),
    (aten.add.Scalar, (2,), {}),
    (aten.add.Tensor, (2.0,), {"alpha": 3}),
    (aten.rsub.Scalar, (1,), {}),
    (aten.rsub.Scalar, (1.0, 2.0), {}),
    (aten.div.Tensor, (3.0,), {}),
    *[(aten.pow.Tensor_Scalar, (p,), {}) for p in (-1, 1, 2, 3, 4)],
]


@pytest.mark.parametrize(("op", "args", "kwargs"), ONE, ids=str)
def test_one_operand(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    b = Builder()
    found = scalar_expression(b(op, b.embed(), *args, **kwargs))
    assert found is not None
    _same(expr.evaluate(found[0], {"x0": X}), op(X, *args, **kwargs))


TWO = [
    (aten.add.Tensor, {}),
    (aten.add.Tensor, {"alpha": 2}),
    (aten.sub.Tensor, {}),
    (aten.sub.Tensor, {"alpha": -0.5}),
    (aten.mul.Tensor, {}),
    (aten.div.Tensor, {}),
    (aten.maximum.default, {}),
    (aten.minimum.default, {}),
]


@pytest.mark.parametrize(("op", "kwargs"), TWO, ids=str)
def test_two_operands(op: Any, kwargs: dict[str, Any]) -> None:
    b = Builder()
    x, y = b.embed("a"), b.embed("b")
    found = scalar_expression(b(op, x, y, **kwargs))
    assert found is not None
    assert found[1] == [x, y]
    _same(expr.evaluate(found[0], {"x0": X, "x1": Y}), op(X, Y, **kwargs))


def test_one_tensor_twice_is_one_operand() -> None:
    b = Builder()
    x = b.embed()
    assert scalar_expression(b(aten.mul.Tensor, x, x)) == (expr.parse("x0 * x0"), [x])


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        (aten.pow.Tensor_Scalar, (2.5,), {}),
        (aten.div.Tensor_mode, (2.0,), {"rounding_mode": "floor"}),
        (aten.softplus.default, (2.0,), {}),
        (aten.cumsum.default, (-1,), {}),
        (aten.clamp.Tensor, (), {}),
    ],
    ids=str,
)
def test_others_stay_what_they_are(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    b = Builder()
    if op is aten.clamp.Tensor:
        assert scalar_expression(b(op, b.embed(), b.embed("other"))) is not None  # max(x, other)
    else:
        assert scalar_expression(b(op, b.embed(), *args, **kwargs)) is None


def test_integers_are_left_alone() -> None:
    b = Builder()
    assert scalar_expression(b(aten.add.Tensor, b.positions, 2)) is None


def test_measures() -> None:
    body = expr.parse("silu(x0 + 1.0) * x1 + x0")
    assert cost(body) > 100 > cost(expr.parse("x0 * 2.0 + 1.0")) == 2
    assert (count(body, "x0"), count(body, "x1"), count(body, "x2")) == (2, 1, 0)
    assert inside_dear(body) == {"x0"}


def _same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want)
