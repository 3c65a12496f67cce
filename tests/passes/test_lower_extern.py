import json
import operator

import pytest
import torch
from tokenmill.errors import NotLowered
from tokenmill.ir.plan import Extern
from tokenmill.passes.lower import lower

from .build import Builder, aten, mill
from .test_lower import compiled


def externs(b: Builder, result: object) -> list[Extern]:
    plan = compiled(b.finish(result))
    return [s.spec for s in plan.extern_steps]


def test_arguments_are_data() -> None:
    b = Builder()
    (spec,) = externs(
        b, b(aten.cumsum.default, b.cut(b.embed(width=12), 2, 10), -1, dtype=torch.float32)
    )
    assert spec.op == "aten.cumsum.default"
    assert json.loads(spec.args) == {
        "args": [{"operand": "x0", "columns": 8, "shape": [1, -1, 8], "dtype": "float32"}, -1],
        "kwargs": {"dtype": {"dtype": "float32"}},
    }
    assert (spec.out_dtype, spec.out_shape, spec.item) == ("f32", (-1, 8), -1)


def test_sizes_are_multiples_of_the_step() -> None:
    b = Builder()
    x = b.embed()
    count = b(aten.sym_size.int, x, 1)
    twice = b(operator.mul, count, 2)
    y = b(aten.new_ones.default, x, [1, count, 8])
    z = b(aten.new_ones.default, x, [twice, 4])
    total = b(aten.add.Tensor, b(aten.add.Tensor, x, y), b.view(z, 1, -1, 8))
    specs = externs(b, total)
    assert '{"size": "tokens", "times": 1}' in specs[0].args
    assert '{"size": "tokens", "times": 2}' in specs[1].args
    assert specs[1].out_shape == (-1, 2, 4)


def test_one_of_several_results() -> None:
    b = Builder()
    values = b(operator.getitem, b(aten.sort.default, b.embed(), -1), 0)
    indices = b(operator.getitem, values.args[0], 1)
    gathered = b(aten.gather.default, b.embed("other"), -1, indices)
    specs = externs(b, b(aten.add.Tensor, values, gathered))
    assert [(s.op, s.item, s.out_dtype) for s in specs] == [
        ("aten.sort.default", 0, "f32"),
        ("aten.sort.default", 1, "i32"),
        ("aten.gather.default", -1, "f32"),
    ]
    assert '"dtype": "int64"' in specs[2].args


def test_tokens_may_be_elsewhere_between_two_of_them() -> None:
    b = Builder()
    heads = b(aten.transpose.int, b.view(b.embed(), 1, -1, 2, 4), 1, 2)
    turned = b(aten.flip.default, heads, [1])
    back = b.view(b(aten.transpose.int, turned, 1, 2), 1, -1, 8)
    assert [s.out_shape for s in externs(b, back)] == [(1, 2, -1, 4), (1, 2, -1, 4), (-1, 2, 4)]


def test_computed_indices() -> None:
    """Learned positions with an offset: integers between steps."""
    b = Builder()
    at = b(aten.remainder.Scalar, b(aten.add.Tensor, b.ids, b.positions), 11)
    table = b.weight("embed.weight", 11, 8)
    specs = externs(b, b(mill.embed.default, [table], at, "fp32"))
    assert [s.out_dtype for s in specs] == ["i32", "i32"]


def test_a_cut_of_every_head() -> None:
    b = Builder()
    first = b.cut(b.view(b.embed(width=16), 1, -1, 2, 8), 0, 4)
    assert [s.op for s in externs(b, b.view(first, 1, -1, 8))] == ["aten.slice.Tensor"]


def test_weights_are_operands_too() -> None:
    b = Builder()
    y = b(aten.matmul.default, b.embed(), b.weight("w", 8, 8))
    (spec,) = externs(b, y)
    assert spec.operands == ("x0", "x1")


def test_rows_after_the_selection() -> None:
    b = Builder()
    x = b(mill.select_rows.default, b.embed(width=11), b.rows)
    count = b(aten.sym_size.int, x, 1)
    ones = b(aten.new_ones.default, x, [1, count, 11])
    plan = compiled(b.end(b(aten.add.Tensor, x, ones)))
    (step,) = plan.extern_steps
    assert step.rows == "rows"
    assert '{"size": "rows", "times": 1}' in step.spec.args


def test_what_cannot_be_kept() -> None:
    b = Builder()
    double = b(aten._to_copy.default, b.embed(), dtype=torch.float64)
    with pytest.raises(NotLowered, match="float32"):
        lower(b.finish(b(aten._to_copy.default, double, dtype=torch.float32)))


def test_sizes_that_are_no_multiple() -> None:
    b = Builder()
    x = b.embed()
    longer = b(operator.add, b(aten.sym_size.int, x, 1), 1)
    y = b(aten.new_ones.default, x, [1, longer, 8])
    with pytest.raises(NotLowered):
        lower(b.finish(b(aten.add.Tensor, x, b(aten.slice.Tensor, y, 1, 1))))
