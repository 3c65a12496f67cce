from tokenmill.passes.fuse_pointwise import FusePointwise
from tokenmill.passes.fuse_residual_norm import FuseResidualNorm

from .build import Builder, apply, aten, found, mill


def test_the_sum_is_used_before_and_after() -> None:
    b = Builder()
    total = b(aten.add.Tensor, b.embed(), b.embed("other"))
    early = b.linear(total, "a", 8)
    late = b(aten.mul.Tensor, b.norm(total, "n"), early)
    program = b.finish(b(aten.add.Tensor, late, total))
    assert apply(program, FusePointwise(), FuseResidualNorm())[1] == 1
    assert len(found(program, mill.add_rms_norm)) == 1
    assert not found(program, mill.rms_norm)


def test_two_norms_of_one_sum() -> None:
    b = Builder()
    total = b(aten.add.Tensor, b.embed(), b.embed("other"))
    program = b.finish(b(aten.mul.Tensor, b.norm(total, "n"), b.norm(total, "m")))
    assert apply(program, FusePointwise(), FuseResidualNorm())[1] == 1
    assert len(found(program, mill.rms_norm)) == 1


def test_other_sums() -> None:
    b = Builder()
    x = b.embed()
    shifted = b.norm(b(aten.add.Tensor, x, b.weight("shift", 8)), "n")
    doubled = b.norm(b(aten.add.Tensor, x, shifted, alpha=2), "m")
    program = b.finish(doubled)
    assert apply(program, FusePointwise(), FuseResidualNorm())[1] == 0
