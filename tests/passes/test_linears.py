import torch
from tokenmill.passes.linears import Linear, joined, part, stack

from .build import Builder


def test_names_tell_what_was_joined() -> None:
    assert joined(["a.q.weight", "a.k.weight", "a.v.weight"]) == "a.q+k+v.weight"
    assert joined(["a.w", "b.w"]) == "a+b.w"
    assert joined(["a.b.q.weight", "a.k.weight"]) == "a.b.q+k.weight"
    assert joined(["q.weight[0:2]", "k.weight"]) == "q.weight[0:2]+k.weight"


def test_missing_biases_are_zeros() -> None:
    b = Builder()
    x, first, second = b.embed(), b.weight("a.w", 2, 8), b.weight("b.w", 3, 8)
    weight, bias = stack(
        b.program, [Linear(x, [first]), Linear(x, [second], b.weight("b.bias", 3))]
    )
    values = b.program.weights
    assert weight.target == "a+b.w"
    assert torch.equal(values["a+b.w"], torch.cat((values["a.w"], values["b.w"])))
    assert bias is not None
    assert torch.equal(values[bias.target], torch.cat((torch.zeros(2), values["b.bias"])))
    assert values.roots(bias.target) == ["a.w", "b.bias"]


def test_part_takes_rows_of_weight_and_bias() -> None:
    b = Builder()
    whole = Linear(b.embed(), [b.weight("a.w", 4, 8)], b.weight("a.bias", 4))
    assert part(b.program, whole, 0, 4) is whole
    some = part(b.program, whole, 1, 2)
    values = b.program.weights
    assert some.bias is not None
    assert torch.equal(values[some.weight[0].target], values["a.w"][1:3])
    assert torch.equal(values[some.bias.target], values["a.bias"][1:3])
