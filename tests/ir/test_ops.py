"""Dialect ops: every one is declared whole, and related ops agree with each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.ir import cache as kv
from tokenmill.ir import expr, ops
from tokenmill.ir.plan import gqa_cache, latent_cache
from torch import Tensor

RNG = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG)


OURS = {name for name, op in ops.OPS.items() if not op.custom}


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_op_has_its_meaning_beside_it(name: str) -> None:
    op = ops.OPS[name]
    assert op.reference.__doc__
    assert op.overload._schema.name == f"tokenmill::{name}"


def test_shape_rules_agree_with_the_references() -> None:
    """torch's own check of schema, shape rule and aliasing, on one example of each functional op."""
    x, w = rand(1, 5, 8), rand(6, 8)
    tables = rand(1, 5, 2), rand(1, 5, 2)
    ids = torch.tensor([[0, 1]]).expand(5, 2).contiguous().int()[None]
    experts = ([rand(3, 8, 8)], [rand(3, 8, 4)], None, "fp32", "fp32", "silu(acc0) * acc1", True)
    heads = rand(1, 5, 2, 6)
    spec = ops.dump_router(ops.RouterSpec(top_k=2))
    examples = {
        "embed": ([w], torch.tensor([[0, 3]]), "fp32"),
        "rms_norm": (x, rand(8), 1e-6),
        "layer_norm": (x, rand(8), rand(8), 1e-6),
        "add_rms_norm": (x, rand(1, 5, 8), rand(8), 1e-6),
        "linear": (x, [w], None, [rand(1, 5, 3)], "fp32", 2, "silu(acc0) * acc1 + e0"),
        "dequantize": ([w], "fp32", 8),
        "pointwise": ([x, rand(8)], "x0 * x1"),
        "select_rows": (x, torch.tensor([4, 0])),
        "rope": (heads, *tables, 1, False),
        "attention": (heads, heads, heads, None, 0.5, 0, 0.0),
        "latent_attention": (
            heads,
            rand(1, 5, 7),
            rand(1, 5, 2),
            [rand(2, 4, 7)],
            [rand(2, 3, 7)],
            "fp32",
            0.5,
        ),
        "route": (rand(1, 5, 3), None, spec),
        "experts": (x, ids, rand(1, 5, 2), *experts),
    }
    assert set(examples) | {"cached_attention", "cached_latent_attention"} == OURS
    for name, args in examples.items():
        torch.library.opcheck(
            ops.OPS[name].overload, args, test_utils=("test_schema", "test_faketensor")
        )


def batches() -> st.SearchStrategy[list[list[int]]]:
    """Per sequence the sizes of its chunks: how a prompt may be cut into steps."""
    return st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=15, deadline=None)
@given(plans=batches(), window=st.sampled_from([0, 7]))
def test_cached_attention_in_chunks_is_attention(plans: list[list[int]], window: int) -> None:
    heads, heads_kv, dim = 4, 2, 6
    spec = gqa_cache("c", "fp32", heads_kv, dim, dim)
    lengths = [sum(p) for p in plans]
    data = [(rand(n, heads, dim), rand(n, heads_kv, dim), rand(n, heads_kv, dim)) for n in lengths]
    cache, table = _pages(spec, lengths)
    for _, batch, rows in _steps(plans, table):
        q, k, v = (
            torch.cat([d[i][lo:hi] for d, (lo, hi) in zip(data, rows, strict=True)])
            for i in range(3)
        )
        out = ops.cached_attention(q, k, v, None, cache, *batch, 0.3, window, 0.0, "fp32")
        wanted = [
            ops.attention(*d, None, 0.3, window, 0.0)[lo:hi]
            for d, (lo, hi) in zip(data, rows, strict=True)
        ]
        torch.testing.assert_close(out, torch.cat(wanted))


@settings(max_examples=15, deadline=None)
@given(plans=batches())
def test_absorbed_in_chunks_is_expanded(plans: list[list[int]]) -> None:
    heads, nope, rotary, rank, value = 3, 5, 4, 9, 6
    up, down = [rand(heads, nope, rank)], [rand(heads, value, rank)]
    spec = latent_cache("c", "fp32", rank, rotary)
    lengths = [sum(p) for p in plans]
    data = [(rand(n, heads, nope + rotary), rand(n, rank), rand(n, rotary)) for n in lengths]
    cache, table = _pages(spec, lengths)
    for _, batch, rows in _steps(plans, table):
        q, c, r = (
            torch.cat([d[i][lo:hi] for d, (lo, hi) in zip(data, rows, strict=True)])
            for i in range(3)
        )
        out = ops.cached_latent_attention(q, c, r, up, down, cache, *batch, "fp32", 0.3, "fp32")
        wanted = [
            ops.latent_attention(*d, up, down, "fp32", 0.3)[lo:hi]
            for d, (lo, hi) in zip(data, rows, strict=True)
        ]
        torch.testing.assert_close(out, torch.cat(wanted), atol=1e-4, rtol=1e-4)


def _pages(spec: kv.CacheSpec, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """A cache and a block table with the sequences' pages interleaved."""
    count = max(-(-n // kv.PAGE) for n in lengths)
    table = torch.arange(count * len(lengths)).view(count, -1).T.contiguous().int()
    return kv.allocate(spec, table.numel()), table


def _steps(plans: list[list[int]], table: Tensor):
    """Step by step: (index, batch, the (begin, end) of every sequence in it)."""
    done = [0] * len(plans)
    for i in range(max(map(len, plans))):
        rows = [(n, n + (p[i] if i < len(p) else 0)) for n, p in zip(done, plans, strict=True)]
        sizes = [hi - lo for lo, hi in rows]
        starts = torch.tensor([0, *sizes]).cumsum(0).int()
        positions = torch.cat([torch.arange(lo, hi) for lo, hi in rows]).int()
        yield i, kv.Batch(positions, starts, table), rows
        done = [hi for _, hi in rows]


def test_softcap_and_sinks() -> None:
    q, k, v, sinks = rand(3, 2, 4), rand(3, 2, 4), rand(3, 2, 4), rand(2)
    out = ops.attention(q, k, v, sinks, 0.5, 0, 20.0)
    scores = 20 * torch.tanh(torch.einsum("shd,lhd->hsl", q, k) * 0.5 / 20)
    scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    p = torch.cat((scores, sinks[:, None, None].expand(2, 3, 1)), -1).softmax(-1)[..., :3]
    torch.testing.assert_close(out, torch.einsum("hsl,lhd->shd", p, v))


# --- expressions ------------------------------------------------------------------------------------

leaves = st.one_of(
    st.sampled_from(["x0", "x1"]).map(expr.Ref),
    st.floats(-4, 4, allow_nan=False).map(expr.Const),
)


def calls(inner: st.SearchStrategy[expr.Expr]) -> st.SearchStrategy[expr.Expr]:
    unary = st.sampled_from(["neg", "silu", "tanh", "sigmoid", "abs"])
    binary = st.sampled_from(["add", "sub", "mul", "min", "max"])
    return st.one_of(
        st.builds(lambda f, a: expr.Call(f, (a,)), unary, inner),
        st.builds(lambda f, a, b: expr.Call(f, (a, b)), binary, inner, inner),
    )


trees = st.recursive(leaves, calls, max_leaves=8)


@settings(max_examples=100, deadline=None)
@given(tree=trees)
def test_text_and_parse_are_inverse(tree: expr.Expr) -> None:
    operands = {"x0": torch.tensor([0.3, -2.0]), "x1": torch.tensor([1.5, 0.1])}
    again = expr.parse(expr.text(tree))
    torch.testing.assert_close(expr.evaluate(again, operands), expr.evaluate(tree, operands))
    assert expr.text(again) == expr.text(expr.parse(expr.text(again)))


@pytest.mark.parametrize(
    "source", ["x0 ** 2", "import os", "f(x0)", "x0[1]", "'a'", "x0 if x1 else 2"]
)
def test_only_the_table_is_an_expression(source: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        expr.parse(source)
