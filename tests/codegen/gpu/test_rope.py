"""RoPE under the interpreter: in place and not, pairs side by side and apart."""

from __future__ import annotations

import pytest
import torch
from tokenmill.ir.plan import Rope

from ..harness import batch_of, inputs_of
from ..test_kernels import BATCHES, IN_PLACE, ROPES
from .interpreter import Interpreted

PLACED = {s: p for s, p in IN_PLACE.items() if isinstance(s, Rope)}
SPECS = (*ROPES, *PLACED)
TOLERANCE = {"f32": 1e-6, "bf16": 1e-2}


@pytest.fixture(scope="module", params=["f32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> Interpreted:
    column = 3 if request.param == "f32" else 0
    return Interpreted(SPECS, in_place=PLACED, dtype=request.param, column=column)


@pytest.mark.parametrize("name", ["none", "an empty sequence", "one token", "five tokens"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rope_matches_the_reference(kernels: Interpreted, spec: Rope, name: str) -> None:
    batch = batch_of(*BATCHES[name])
    inputs = inputs_of(kernels, spec, batch)
    want = kernels.expected(spec, batch, inputs)["out"]
    got = kernels.run(spec, batch, inputs)["out"].float()
    tolerance = TOLERANCE[kernels.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spec", ROPES, ids=str)
def test_other_columns_are_copied_bit_by_bit(kernels: Interpreted, spec: Rope) -> None:
    batch = batch_of((7, 2))
    inputs = inputs_of(kernels, spec, batch)
    x = inputs["x"].to(torch.float32 if kernels.dtype == "f32" else torch.bfloat16)
    got = kernels.run(spec, batch, inputs)["out"]
    columns = torch.arange(spec.head_dim)
    rest = (columns < spec.offset) | (columns >= spec.offset + spec.rotary)
    shape = (-1, spec.heads, spec.head_dim)
    assert torch.equal(got.view(shape)[..., rest], x.view(shape)[..., rest])
