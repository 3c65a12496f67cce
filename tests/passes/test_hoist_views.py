from tokenmill.passes.fuse_linear import FuseLinear
from tokenmill.passes.hoist_views import HoistViews

from .build import Builder, apply, aten, decoder, found, mill, targets


def test_blocks_on_flattened_tokens() -> None:
    program = decoder()
    assert apply(program, FuseLinear(), HoistViews()) == [16, 1]
    (experts,) = found(program, mill.experts)
    assert len(experts.meta["val"].shape) == 3
    assert all(u.target is aten.add.Tensor for u in experts.users)


def test_a_chain_of_ops_between_two_reshapes() -> None:
    b = Builder()
    x = b.embed()
    y = b(aten.silu.default, b.linear(b.view(x, -1, 8), "a", 8))
    y = b(aten.mul.Tensor, b.norm(y, "n"), b.weight("scale", 8))
    program = b.finish(b.view(y, 1, -1, 8))
    assert apply(program, FuseLinear(), HoistViews()) == [2, 4]
    assert "reshape" not in targets(program)


def test_what_stays() -> None:
    """Views that regroup columns, and views of what others use too."""
    b = Builder()
    x = b.linear(b.embed(), "a", 8)
    heads = b.view(x, 1, -1, 2, 4)
    y = b(aten.add.Tensor, b.view(heads, 1, -1, 8), x)
    z = b.linear(y, "b", 8)
    program = b.finish(b(aten.add.Tensor, b.view(b.view(z, -1, 8), 1, -1, 8), z))
    before = targets(program).count("reshape")
    assert apply(program, FuseLinear(), HoistViews()) == [3, 0]
    assert targets(program).count("reshape") == before


def test_one_head_keeps_its_dim() -> None:
    """[1, T, F] -> [1, T, 1, F] makes a head; that is no mere regrouping of rows."""
    b = Builder()
    one = b.view(b.linear(b.embed(), "a", 4), 1, -1, 1, 4)
    program = b.finish(b.view(b(mill.rope.default, one, *b.angles(2), 0, False), 1, -1, 4))
    assert apply(program, FuseLinear(), HoistViews()) == [2, 0]
