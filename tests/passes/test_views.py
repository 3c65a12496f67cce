import operator
from typing import Any

import pytest
import torch
from tokenmill.passes.views import Columns, alias, columns, features, join_column, reshape, width

from .build import Builder, aten


@pytest.fixture
def b() -> Builder:
    return Builder()


def test_rows_are_what_follows_the_tokens(b: Builder) -> None:
    x = b.embed(width=12)
    assert features(x) == (12,)
    assert features(b.view(x, 1, -1, 3, 4)) == (3, 4)
    assert features(flat := b.view(x, -1, 4)) == (3, 4)
    assert width(flat) == 12
    assert features(b.weight("w", 2, 3)) == (2, 3)
    turned = b(aten.transpose.int, b.view(x, 1, -1, 3, 4), 1, 2)
    assert features(turned) is None
    assert width(turned) == 12


def test_views_of_views_add_up(b: Builder) -> None:
    x = b.embed(width=12)
    inner = b.cut(b.cut(x, 4, 12), 2, 5)
    assert columns(inner) == Columns(x, 6, 3)
    assert columns(b.view(inner, 1, -1, 3, 1)) == Columns(x, 6, 3)


@pytest.mark.parametrize(
    ("op", "args", "index", "expected"),
    [
        (aten.split_with_sizes.default, ([3, 4, 5], -1), 2, (7, 5)),
        (aten.split.Tensor, (5, -1), 1, (5, 5)),
        (aten.split.Tensor, (5, 2), 2, (10, 2)),
        (aten.chunk.default, (2, -1), 1, (6, 6)),
        (aten.unbind.int, (-1,), 3, (3, 1)),
    ],
)
def test_pieces(b: Builder, op: Any, args: Any, index: int, expected: tuple[int, int]) -> None:
    x = b.embed(width=12)
    piece = b(operator.getitem, b(op, x, *args), index)
    assert columns(piece) == Columns(x, *expected)


@pytest.mark.parametrize(
    ("args", "expected"),
    [((-1, -4, 12), (8, 4)), ((2, 0, 5), (0, 5)), ((2, 3), (3, 9)), ((1,), (0, 12))],
)
def test_slices(b: Builder, args: Any, expected: tuple[int, int]) -> None:
    x = b.embed(width=12)
    assert columns(b(aten.slice.Tensor, x, *args)) == Columns(x, *expected)


def test_heads_are_runs_of_columns(b: Builder) -> None:
    x = b.embed(width=12)
    heads = b.view(x, 1, -1, 3, 4)
    assert columns(b(aten.slice.Tensor, heads, 2, 1, 3)) == Columns(x, 4, 8)
    assert columns(b(aten.select.int, heads, 2, -1)) == Columns(x, 8, 4)


def test_what_is_not_one_run_of_columns_is_no_view(b: Builder) -> None:
    x = b.embed(width=12)
    heads = b.view(x, 1, -1, 3, 4)
    assert alias(b(aten.slice.Tensor, heads, 3, 0, 2)) is None
    assert alias(b(aten.slice.Tensor, x, 2, 0, 12, 2)) is None
    assert alias(b(aten.slice.Tensor, x, 1, 1)) is None
    assert alias(b(aten.transpose.int, heads, 1, 2)) is None


def test_dims_of_size_one_may_move(b: Builder) -> None:
    one_head = b.view(b.embed(width=12), 1, -1, 1, 12)
    assert alias(b(aten.transpose.int, one_head, 1, 2)) == (one_head, 0)
    assert alias(b(aten.unsqueeze.default, one_head, 0)) == (one_head, 0)


def test_casts_are_views_only_when_they_change_nothing(b: Builder) -> None:
    x = b.embed()
    assert alias(b(aten._to_copy.default, x, dtype=torch.float32)) == (x, 0)
    assert alias(b(aten._to_copy.default, x, dtype=torch.float64)) is None


def test_joins_along_columns(b: Builder) -> None:
    x = b.embed()
    heads = b.view(x, 1, -1, 2, 4)
    assert join_column(b(aten.cat.default, [x, x], -1)) == 0
    assert join_column(b(aten.cat.default, [heads, heads], 2)) == 0
    assert join_column(b(aten.cat.default, [heads, heads], -1)) is None
    assert join_column(b(aten.cat.default, [x, x], 1)) is None


def test_reshape_undoes_reshapes(b: Builder) -> None:
    x = b.embed()
    flat = b.view(x, -1, 8)
    assert reshape(b.program, flat, list(x.meta["val"].shape)) is x
    assert reshape(b.program, x, [*x.meta["val"].shape[1:]]).args == (x, [-1, 8])
