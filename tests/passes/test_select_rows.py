"""Rows are selected before the head, and before whatever else sees each token alone."""

from __future__ import annotations

import pytest
import torch
from tokenmill.capture.module import capture
from tokenmill.passes.base import aten, calls, mill
from tokenmill.passes.canonicalize import Canonicalize
from tokenmill.passes.fuse_norm import FuseNorm
from tokenmill.passes.select_rows import SelectRows
from torch import Tensor, nn


class Decoder(nn.Module):
    """A residual, a norm, a head, and a soft cap after it."""

    def __init__(self, reused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 16)
        self.reused = reused

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.mix(x)
        normed = self.norm(x)
        logits = 5.0 * torch.tanh(self.head(normed) / 5.0)
        return logits + normed.sum(-1, keepdim=True) if self.reused else logits


@pytest.mark.parametrize("reused", [False, True])
def test_selection_moves_up_to_where_activations_meet(reused: bool) -> None:
    model = Decoder(reused).eval()
    program = capture(model, max_positions=64)
    for one in (Canonicalize(), FuseNorm(), SelectRows()):
        one.run(program)
    (selected,) = calls(program, mill.select_rows)
    (reader,) = selected.users
    assert selected.args[0].target is aten.add.Tensor
    assert reader.target is ("output" if reused else mill.rms_norm.default)
    ids = [3, 1, 4, 1, 5]
    with torch.no_grad():
        wanted = model(torch.tensor([ids]))[0]
    for rows in ([4], [0, 3], [2, 2], []):
        torch.testing.assert_close(program.run(ids, rows), wanted[torch.tensor(rows).long()])
