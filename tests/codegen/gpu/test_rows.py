"""Kernels that work row by row, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from tokenmill.ir.plan import KernelSpec, SelectRows

from ..harness import batch_of, inputs_of
from ..test_kernels import BATCHES, COPIES, FUNCTION_KERNELS, IN_PLACE, NORMS, POINTWISES
from .interpreter import Interpreted

PLACED = {s: p for s, p in IN_PLACE.items() if s.kind in ("norm", "pointwise")}
SPECS: tuple[KernelSpec, ...] = (*NORMS, *POINTWISES, *COPIES, *FUNCTION_KERNELS.values(), *PLACED)
TOLERANCE = {"f32": 1e-5, "bf16": 1e-2}


@pytest.fixture(scope="module", params=["f32", "bf16"])
def kernels(request: pytest.FixtureRequest) -> Interpreted:
    column = 3 if request.param == "f32" else 0
    return Interpreted(SPECS, in_place=PLACED, dtype=request.param, column=column)


@pytest.mark.parametrize("name", ["an empty sequence", "one token", "decode", "five tokens"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{SPECS.index(s)}")
def test_rows_match_the_reference(kernels: Interpreted, spec: KernelSpec, name: str) -> None:
    batch = batch_of(*BATCHES[name])
    inputs = inputs_of(kernels, spec, batch)
    rows = None
    if isinstance(spec, SelectRows):
        inputs.pop("index")
        rows = (
            torch.tensor([0, 2, 1])[: len(batch.positions)]
            .int()
            .clamp(max=len(batch.positions) - 1)
        )
    want = kernels.expected(spec, batch, inputs, rows=rows)
    got = kernels.run(spec, batch, inputs, rows=rows)
    for out, value in want.items():
        tolerance = TOLERANCE[kernels.dtype]
        torch.testing.assert_close(
            got[out].float(), value, rtol=tolerance, atol=tolerance, equal_nan=True
        )
