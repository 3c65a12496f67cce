from tokenmill.passes.fuse_linear import FuseLinear

from .build import Builder, apply, decoder, found, mill, targets


def test_every_linear_of_a_decoder() -> None:
    program = decoder()
    assert apply(program, FuseLinear()) == [16]
    assert targets(program).count("linear") == 16
    assert not found(program, mill.pointwise)


def test_bias_and_weight_used_twice() -> None:
    b = Builder()
    x = b.linear(b.embed(), "a", 8, bias=True)
    program = b.finish(b.linear(x, "a", 8, bias=True))
    assert apply(program, FuseLinear()) == [3]
    first, second, _ = found(program, mill.linear)
    assert first.args[2].target == second.args[2].target == "a.bias"


def test_a_map_of_every_head_is_left_to_torch() -> None:
    b = Builder()
    heads = b.view(b.embed(), 1, -1, 2, 4)
    program = b.finish(b.view(b.linear(heads, "a", 4), 1, -1, 8))
    assert apply(program, FuseLinear()) == [1]
